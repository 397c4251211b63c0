"""quantize_linears: the linears of a model of any library, one by one."""

from __future__ import annotations

from typing import Any

from torch import nn

from qops.models.quantize import (
    QuantizationReport,
    check_quantizable,
    check_skip,
    read_by_owner,
    replaced_parts,
    unquantizable,
    weight_bytes,
)
from qops.models.replacement import is_replaced, require_kernels, take_hooks
from qops.models.schemes import Asked, Scheme, choose, matches

__all__ = ["quantize_linears"]

_CALLER = "qops.models.quantize_linears"


def quantize_linears(model: Any, scheme: Asked = "int4", skip: tuple[str, ...] = ()) -> Any:
    """Quantises the linears of any `nn.Module` by round-to-nearest, in place; a diffusion model, for one.

    For models of Transformers there is :func:`qops.quantize_model`, which knows their layers: it fuses and proves them,
    and leaves output layers dense. Here nothing is known of the model, so its linears alone are replaced: all but those
    that `skip` names, that are of a subclass of nn.Linear, or whose N or K is no multiple of 8. A linear whose weight
    is read as a tensor somewhere in the source of the model stays dense, too, unless the scheme is a mapping with a
    pattern that is its name, or the last part of it: who writes that knows that what reads it is not called.

    Args:
        model: with floating-point weights; it is frozen and put into eval mode.
        scheme: as of :func:`qops.quantize_model`.
        skip: patterns of linears to leave dense, as there.

    Returns:
        The same model; `model.quantization_report` is a :class:`qops.models.QuantizationReport`.

    Numerics:
        Those of :func:`qops.quantize_model` for a linear.

    Raises:
        TypeError: `model` is no `nn.Module`, or a linear itself.
        ValueError: as there. The model is then unchanged.
        RuntimeError: as there.
    """
    if not isinstance(model, nn.Module) or isinstance(model, nn.Linear):
        raise TypeError(f"{_CALLER}: model must be an nn.Module that has linears, got {type(model).__name__}")
    if is_replaced(model):
        raise ValueError(f"{_CALLER}: model has qops parts already")
    modules = dict(model.named_modules())
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    check_skip(_CALLER, skip, linears)
    choice = choose(_CALLER, scheme, tuple(linears))
    read = {name: why for name, why in read_by_owner(modules).items() if not choice.names(name)}
    chosen, kept = dict[str, Scheme](), dict[str, str]()
    for name, linear in linears.items():
        wanted = choice.scheme_of(name)
        why = "skipped" if any(matches(pattern, name) for pattern in skip) else read.get(name) or unquantizable(linear)
        if why is None and wanted is not None:
            check_quantizable(f"{_CALLER}: {name}", linear, wanted)
            chosen[name] = wanted
        else:
            kept[name] = why or "its scheme is None, or there is none for it"
    if not chosen:
        reasons = "; ".join(dict.fromkeys(kept.values())) or "it has no linears"
        raise ValueError(f"{_CALLER}: model must have linears to quantise, {type(model).__name__} has none: {reasons}")
    alike = {(linears[name].weight.device, linears[name].weight.dtype) for name in chosen}
    for device, dtype in alike:
        here = [n for n in chosen if (linears[n].weight.device, linears[n].weight.dtype) == (device, dtype)]
        require_kernels(_CALLER, {name: chosen[name].linear for name in here}, device, dtype, None)

    before, kept_bytes = weight_bytes(model), {name: _bytes(linears[name]) for name in kept}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if owner not in linears:
            kept[name] = f"a parameter of {type(modules[owner]).__name__}, which is no linear"
            kept_bytes[name] = parameter.nbytes
    # Names alone, so that each original is freed when it is replaced. A linear of several is replaced at all of them.
    places = {name: [] for name in chosen}
    first = {id(linears[name]): name for name in chosen}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in first:
            places[first[id(module)]].append(name)
    del module, linear
    linears.clear()
    modules.clear()
    for name, wanted in chosen.items():
        old: Any = model.get_submodule(name)
        new = take_hooks(wanted._quantize(old), old)
        for place in places[name]:
            model.set_submodule(place, new)
    model.eval().requires_grad_(False)
    quantised: Any = model
    quantised.quantization_report = QuantizationReport(
        scheme=str(choice),
        architecture=type(model).__name__,
        not_fused="of another library than Transformers",
        own={},
        proof="not needed",
        replaced=replaced_parts(model),
        smoothed={},
        kept=kept,
        kept_bytes=kept_bytes,
        bytes_before=before,
        bytes_after=weight_bytes(model),
        passes_before=None,
        passes_after=None,
    )
    return quantised


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
