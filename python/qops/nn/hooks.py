"""Who looks into a module: hooks, and a forward that somebody put in the place of its own."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as _of_all_modules
from torch.utils.hooks import RemovableHandle

# Where Transformers defines the hooks that record hidden states and attentions.
_RECORDING = "transformers.utils.output_capturing"


def is_watched(module: nn.Module) -> bool:
    """Whether somebody sees or changes what goes into or comes out of a module: hooks, or another forward in its place.

    The hooks with which Transformers records hidden states and attentions do not count.
    """
    if "_hf_hook" in module.__dict__ or "forward" in module.__dict__:
        return True
    if _of_all_modules._global_forward_pre_hooks or _of_all_modules._global_forward_hooks:
        return True
    if not (module._forward_pre_hooks or module._forward_hooks):
        return False
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(getattr(hook, "__module__", None) != _RECORDING for hook in hooks)


def forget_recording(model: nn.Module) -> None:
    """Takes back the hooks with which Transformers records, for it to put them on anew where something is recorded."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__module__", None) == _RECORDING]:
                del hooks[key]


def newest_hook() -> int:
    """Changes whenever any module of the process gets a hook, or a `Noticed` one another forward."""
    return RemovableHandle.next_id
