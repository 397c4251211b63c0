"""Modules that say when something about them changes."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from torch.utils.hooks import RemovableHandle


class Noticed(nn.Module):
    """Base of modules that a fused layer may compute without a call, and of weights: another forward counts as a hook.

    Attributes:
        changes: how often an attribute of any of them was set or deleted.
    """

    changes: ClassVar[int] = 0

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        Noticed.changes += 1
        if name == "forward":
            RemovableHandle.next_id += 1

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        Noticed.changes += 1
