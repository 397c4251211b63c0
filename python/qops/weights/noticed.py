"""Modules that say when something about them changes."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

from torch import nn
from torch.utils.hooks import RemovableHandle

_KINDS = ("_modules", "_parameters", "_buffers")


class Entries(dict[str, Any]):
    """Modules or tensors of a :class:`Noticed` by their names. Who puts one there changes the module and is noticed."""

    def __reduce__(self) -> Any:
        """Made whole, as to fill it would count."""
        return Entries, (dict(self),)


def _counts(name: str) -> None:
    write = getattr(dict, name)

    def noticed(self: Entries, *args: Any, **kwargs: Any) -> Any:
        try:
            return write(self, *args, **kwargs)
        finally:  # who looks from then on sees what was written
            Noticed._changed()

    setattr(Entries, name, noticed)


for _name in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
    _counts(_name)


class Noticed(nn.Module):
    """Base of modules that a fused layer may compute without a call, and of weights: another forward counts as a hook.

    Attributes:
        changes: how often an attribute of any of them was set or deleted, or an entry of those that count.
        keepers: who holds something of theirs until the next change, and is told by ``let_go()``.
    """

    changes: ClassVar[int] = 0
    keepers: ClassVar[dict[int, weakref.ref[Any]]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._count_entries()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._count_entries()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        Noticed._changed()
        if name in _KINDS:
            self._count_entries()
        if name == "forward":
            RemovableHandle.next_id += 1

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        Noticed._changed()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Tensors that somebody else holds cannot be swapped, which torch may be asked to do here.
        Noticed._changed()
        super()._load_from_state_dict(*args, **kwargs)

    def _count_entries(self) -> None:
        own = self.__dict__
        for kind in _KINDS:
            if type(own.get(kind)) is dict:
                own[kind] = Entries(own[kind])

    @staticmethod
    def _changed() -> None:
        Noticed.changes += 1
        if Noticed.keepers:
            keepers, Noticed.keepers = Noticed.keepers, {}
            for reference in list(keepers.values()):
                if (keeper := reference()) is not None:
                    keeper.let_go()


def tell_of_change(keeper: Any) -> None:
    """Calls its ``let_go()`` at the next change of a :class:`Noticed`, in whichever thread."""
    key, keepers = id(keeper), Noticed.keepers
    keepers[key] = weakref.ref(keeper, lambda _: keepers.pop(key, None))
