"""Offload by accelerate, for modules whose tensors are packed or merged, or read without a forward of their owner.

accelerate hooks each module: it moves the module's own tensors away, keeps them by their names in the state_dict of the
model, and brings them back around the module's forward. The packed tensors of a weight have no such names, a weight has
no forward, and a fused layer reads the weights of its norms directly. So the module that computes with them takes over:
a linear, an embedding, an MLP or a fused layer drops all tensors below it when accelerate hooks it to offload, and
loads its state from where accelerate keeps it around each forward of its own. The operators do not notice, and a model
that is not offloaded pays nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qops.weights.noticed import Noticed
from qops.weights.state import QuantizedWeight

# Where accelerate leaves its hook on a module.
_HOOK = "_hf_hook"
# What is below an offloaded module comes and goes with it.
_OWNED = "_offloaded_from_above"


class Offloadable(Noticed):
    """Base of modules that load and drop everything below them as one."""

    def _be_hooked(self) -> None:
        """Gives the module a tensor of its own: accelerate hooks no module without one."""
        self.register_buffer("offload_marker", torch.empty(0, dtype=torch.uint8), persistent=False)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == _HOOK:
            _hooked(self, value)

    def __delattr__(self, name: str) -> None:
        if name == _HOOK and (offload := self.__dict__.pop("_offload", None)) is not None:
            offload.end()
        super().__delattr__(name)


class _Offload:
    """An offloaded module: where its state is, and its coming and going.

    Args:
        module: it is dropped.
        state: accelerate's map of names below the module to tensors.
        device: where the forward runs.
    """

    def __init__(self, module: nn.Module, state: Mapping[str, torch.Tensor], device: Any):
        self.module = module
        self.state = state
        self.device = torch.device(device)
        self.home = next((t.device for t in (*module.parameters(), *module.buffers()) if not t.is_meta), self.device)
        self.keys = list(module.state_dict())
        # Iterating over accelerate's map gives names with the prefix that looking up leaves out.
        prefix = getattr(state, "prefix", "")
        missing = set(self.keys).difference(key.removeprefix(prefix) for key in state)
        if missing:
            raise RuntimeError(
                f"qops: {prefix}{min(missing)}, which {type(module).__name__} is to be offloaded with, "
                "must be in the state_dict that accelerate got"
            )
        self.parts = [part for part in module.modules() if part is not module]
        self._own(True)
        self.drop()
        self.handles = (
            module.register_forward_pre_hook(lambda *_: self.load(self.device), prepend=True),
            module.register_forward_hook(lambda *_: self.drop(), always_call=True),
        )

    def drop(self) -> None:
        for part in self.module.modules():
            if isinstance(part, QuantizedWeight):
                part._drop()
                continue
            for key, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[key] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            for key, buffer in part._buffers.items():
                if buffer is not None and key not in part._non_persistent_buffers_set:
                    part._buffers[key] = buffer.to("meta")

    def load(self, device: torch.device) -> None:
        self._unhook_parts()
        state = {key: self.state[key].to(device) for key in self.keys}
        self.module.load_state_dict(state, strict=True, assign=True)

    def end(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.load(self.home)
        self._own(False)

    def _own(self, owned: bool) -> None:
        for part in self.parts:
            if isinstance(part, Offloadable):
                part.__dict__[_OWNED] = owned

    def _unhook_parts(self) -> None:
        """Takes back the hooks that accelerate has put on what is below: they would look for tensors one by one."""
        for part in self.parts:
            hook = part.__dict__.get(_HOOK)
            if hook is not None and _offloading(hook) is not None:
                from accelerate.hooks import add_hook_to_module, remove_hook_from_module

                remove_hook_from_module(part)
                for other in _hooks(hook):
                    if not getattr(other, "offload", False):
                        add_hook_to_module(part, other, append=True)


def _hooked(module: Offloadable, hook: Any) -> None:
    """What follows when accelerate hooks a module."""
    offloading = _offloading(hook)
    if offloading is None:
        # It may just have moved every tensor to another device, one by one.
        for part in module.modules():
            if isinstance(part, QuantizedWeight):
                part._settle()
    elif not module.__dict__.get(_OWNED):
        module.__dict__["_offload"] = _Offload(module, offloading.weights_map, offloading.execution_device)


def _hooks(hook: Any) -> tuple[Any, ...]:
    """accelerate chains several hooks of a module into one."""
    return tuple(getattr(hook, "hooks", (hook,)))


def _offloading(hook: Any) -> Any:
    """The one that offloads; None if none does."""
    return next((one for one in _hooks(hook) if getattr(one, "offload", False)), None)
