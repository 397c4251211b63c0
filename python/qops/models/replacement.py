"""Surgery on Transformers models: what can be replaced, replacing it, and what a replaced model holds."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from qops.formats._transformers import require_transformers
from qops.nn import Int8Embedding, MergedLinear, MergingModule, QuantizedLinear, RMSNorm, frozen
from qops.nn.experts import merge_experts, names_of_experts
from qops.nn.hooks import forget_recording, is_watched
from qops.nn.smoothed import neutral_input
from qops.ops import rms_norm
from qops.weights import Int8Weight
from qops.weights.state import QuantizedWeight

if TYPE_CHECKING:
    from qops.models.decoder import Known

# Linears and norms ---------------------------------------------------------------------------------------------------


def own_state(module: nn.Module) -> set[str]:
    """The names of the parameters and buffers that stand in a module itself."""
    return {key for key, value in (*module._parameters.items(), *module._buffers.items()) if value is not None}


def odd_linear(module: nn.Linear) -> str | None:
    """Why an nn.Linear is not what it seems, so that nothing may take its place; None if it is.

    Subclasses compute more (routers), or are read by their owners without being called (the output of
    nn.MultiheadAttention). Parametrisations and weight norms compute the weight from something else.
    """
    if not is_linear(module):
        return f"{type(module).__name__} is a linear of another kind"
    if not own_state(module) <= {"weight", "bias"} or "weight" not in module._parameters:
        return f"its weight is made of {', '.join(sorted(own_state(module) - {'bias'})) or 'nothing'}"
    if "forward" in vars(module):
        return "its forward was replaced by its owner"
    return None


def looks_like_norm(module: nn.Module) -> bool:
    """Whether its state is that of an RMSNorm; what it computes is another question."""
    weight = module._parameters.get("weight")
    return own_state(module) == {"weight"} and weight is not None and weight.dim() == 1 and _eps(module) is not None


def _eps(module: nn.Module) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


def norm_style(module: Any) -> dict[str, Any] | None:
    """The arguments of `qops.nn.RMSNorm` that compute what `module` does; None if none do.

    Found by asking it: models name and write their norms in many ways, but those compute one of three things.
    """
    h = module.weight.numel()
    rng = torch.Generator().manual_seed(0)
    rows = 4 + 512 // max(h, 1)
    x = (3 * torch.randn(rows, h, generator=rng)).bfloat16()
    weight = (1 + 0.5 * torch.randn(h, generator=rng)).bfloat16()
    # A copy with another weight, asked without a call, which would fire hooks.
    probe = copy.copy(module)
    probe._parameters = {**module._parameters, "weight": frozen(weight)}
    try:
        theirs = type(module).forward(probe, x)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None
    if not isinstance(theirs, torch.Tensor) or theirs.shape != x.shape or theirs.dtype != x.dtype:
        return None
    for offset, rounding in ((0.0, "hf"), (0.0, "fp32"), (1.0, "fp32")):
        ours = rms_norm(x, weight, _eps(module) or 0.0, weight_offset=offset, rounding=rounding)
        # A reciprocal square root or a sum of other roundings moves one element in thousands; where a product is
        # rounded decides about every third.
        if (ours == theirs).double().mean() > 0.98:
            return {"weight_offset": offset, "rounding": rounding}
    return None


class Norms:
    """The norms of a model: what each computes is found once, by asking it."""

    def __init__(self) -> None:
        self._styles: weakref.WeakKeyDictionary[nn.Module, dict[str, Any] | None] = weakref.WeakKeyDictionary()

    def style(self, module: nn.Module) -> dict[str, Any] | None:
        """See :func:`norm_style`."""
        if module not in self._styles:
            self._styles[module] = norm_style(module)
        return self._styles[module]

    def odd(self, module: Any) -> str | None:
        """Why a module that looks like a norm cannot be replaced; None if it can."""
        name = type(module).__name__
        if "forward" in vars(module):
            return "its forward was replaced by its owner"
        parameters = list(inspect.signature(type(module).forward).parameters)[1:]
        if len(parameters) != 1:
            return f"{name} takes more than x: {', '.join(parameters)}"
        if self.style(module) is None:
            return f"{name} is not an RMSNorm that qops computes"
        return None

    def like(self, module: Any, weight: torch.Tensor) -> RMSNorm:
        """The norm that computes what `module` does, with a weight of its own; `odd(module)` is None."""
        style = self.style(module)
        assert style is not None
        return RMSNorm(weight, _eps(module) or 0.0, **style)


def take_hooks(new: nn.Module, old: nn.Module) -> nn.Module:
    """`new` with the forward hooks of the module that it replaces; their handles stay valid."""
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    return new


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_OTHER_HOOKS = ("_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")


def require_kernels(
    caller: str,
    linears: Mapping[str, type[QuantizedLinear]],
    device: str | torch.device,
    dtype: torch.dtype,
    output: str | None,
) -> None:
    """Raises where linears would have no kernel: a small one of each class runs on the device.

    Args:
        caller: to name in the message.
        linears: what each becomes, by its name.
        device: where they will be.
        dtype: of the activations.
        output: the name of the output layer, which computes in float32.

    Raises:
        RuntimeError: packing or the product fails there; a linear, its operator and the device are named.
    """
    alike: dict[tuple[type[QuantizedLinear], bool], list[str]] = {}
    for name, kind in linears.items():
        alike.setdefault((kind, name == output), []).append(name)
    for (kind, logits), names in alike.items():
        weight: Any = kind.weight_class
        try:
            static = neutral_input(kind, 16, device)
            weight = weight(16, 16, -1, scale_dtype=torch.float32, device=device)
            kind(weight, None, float32_output=logits, **static)(torch.zeros(1, 16, dtype=dtype, device=device))
        # What torch raises for a device that it was not built for is an AssertionError.
        except (RuntimeError, AssertionError) as error:
            more = f" and {len(names) - 1} more linears" if len(names) > 1 else ""
            raise RuntimeError(f"{caller}: {names[0]}{more}: no {kind.operator} on {device}: {error}") from error


# Replacing -----------------------------------------------------------------------------------------------------------


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear to replace. A subclass, as some routers are, may compute more than its base."""
    return type(module) is nn.Linear


class Fusion(NamedTuple):
    """What became of the decoder layers.

    Attributes:
        not_fused: why they stayed Transformers' own; None if they were fused.
        proof: what was compared before that was decided, and with which result.
        own: why a part of fused layers stayed Transformers' own, by "attention", "mlp" and "stream".
    """

    not_fused: str | None
    proof: str
    own: dict[str, str]


class FusionPlan(NamedTuple):
    """What is to become of the decoder layers.

    Attributes:
        not_fused: why they cannot be fused; None if they can.
        known: the parts that are fused then.
    """

    not_fused: str | None
    known: Known | None


# What a module becomes, by its name.
Replace = Callable[[str, Any], nn.Module]


def plan_fusion(model: Any, norms: Norms) -> FusionPlan:
    """Whether the layers of a model can be fused, and which parts, found without changing it.

    Warns where what is fused elsewhere is not, for a reason that its user may remove.
    """
    from qops.models.decoder import known_parts

    known = known_parts(model)
    if known.why_nothing is not None:
        return FusionPlan(known.why_nothing, None)
    reason = _unfusable(model, known, norms)
    if reason is not None:
        warn_not_fused(model, reason)
    return FusionPlan(reason, known)


def _unfusable(model: Any, known: Known, norms: Norms) -> str | None:
    """Why the parts that are known cannot be replaced all the same."""
    seen: set[int] = set()
    for index, layer in enumerate(model.model.layers):
        for name, module in layer.named_modules(remove_duplicate=False):
            full = f"model.layers.{index}.{name}".rstrip(".")
            if "forward" in vars(module):
                return f"the forward of {full} was replaced by its owner"
            if is_watched(module) or any(getattr(module, hooks) for hooks in _OTHER_HOOKS):
                return f"{full} has hooks, which a fused layer would lose"
            if id(module) in seen:
                return f"{full} stands in two places"
            seen.add(id(module))
        parts = known.names(layer, index)
        fused = (known.attention, "self_attn."), (known.mlps[index], "mlp.")
        for name, _ in layer.named_parameters():
            owner = name.rpartition(".")[0]
            inside = next((is_fused for is_fused, part in fused if name.startswith(part)), known.stream)
            if inside and owner not in parts:
                return f"model.layers.{index}.{name} is a parameter that a fused layer does not have"
        for name in parts:
            module = layer.get_submodule(name)
            if looks_like_norm(module):
                reason = norms.odd(module)
            elif isinstance(module, nn.Linear):
                reason = odd_linear(module)
            else:
                reason = f"{type(module).__name__} is neither a linear nor a norm"
            if reason is not None:
                return f"model.layers.{index}.{name}: {reason}"
    if is_watched(model.model.rotary_emb):
        return "model.rotary_emb has hooks, or a forward of its owner's"
    reason = norms.odd(model.model.norm) if looks_like_norm(model.model.norm) else "not a norm"
    return None if reason is None else f"model.norm: {reason}"


def replace_parts(
    model: Any,
    linear: Replace,
    norm: Replace,
    kind: Callable[[str], str],
    norms: Norms,
    plan: FusionPlan,
    prove: bool = True,
    progress: bool | None = False,
) -> Fusion:
    """Replaces all linears and norms but the output layer, one decoder layer at a time where they are fused.

    Args:
        linear: gives what takes the place of a linear: the linear itself where it stays.
        norm: gives what takes the place of a norm.
        kind: tells linears that become different ones apart, by their names.
        norms: of the model.
        plan: which parts of its layers are fused if the proof agrees.
        prove: whether fused layers are compared with Transformers' own first (`qops.models.proof`).

    Returns:
        What became of the layers. What they were fused into and differed is warned about.
    """
    from tqdm import tqdm

    def bar(things: Any) -> Any:
        return tqdm(things, desc="qops: replacing", leave=False, disable=None if progress is None else not progress)

    # What the proof has made is taken over: nothing is read, or quantised, twice.
    made: dict[str, nn.Module] = {}

    def new(name: str, module: Any) -> nn.Module:
        return made.pop(name, None) or (linear if is_linear(module) else norm)(name, module)

    def replace_one_by_one(inside: str, but: Collection[str] = ()) -> None:
        output = model.get_output_embeddings()
        # Names alone: a list of modules would keep every original alive until the end. A module of several names is
        # replaced at all of them.
        places: dict[int, list[str]] = {}
        for name, module in model.get_submodule(inside).named_modules(prefix=inside, remove_duplicate=False):
            is_norm = looks_like_norm(module) and norms.odd(module) is None
            if ((is_linear(module) and module is not output) or is_norm) and name not in but:
                places.setdefault(id(module), []).append(name)
        for names in bar(places.values()) if not inside else places.values():
            module = model.get_submodule(names[0])
            replaced = new(names[0], module)
            if replaced is not module:
                take_hooks(replaced, module)
            for name in names:
                model.set_submodule(name, replaced)

    not_fused, known = plan
    proof = "not made: prove=False" if not_fused is None else "not needed"
    if not_fused is None and prove:
        from qops.models.proof import prove_fusion

        assert known is not None
        proof, not_fused, made = prove_fusion(model, linear, norm, kind, known)
        if not_fused is not None:
            warn_not_fused(model, not_fused)
    if not_fused is not None or known is None:
        replace_one_by_one("")
        merge_experts(model)
        return Fusion(not_fused, proof, {})

    from qops.models.decoder import fuse
    from qops.models.layers import Layers
    from qops.models.rotary_tables import RotaryTables

    decoder = model.model
    tables = RotaryTables(decoder.rotary_emb, model.config) if known.attention else decoder.rotary_emb
    for index in bar(range(len(decoder.layers))):
        prefix = f"model.layers.{index}"
        layer = decoder.layers[index]

        def part(name: str, layer: Any = layer, prefix: str = prefix) -> nn.Module:
            return new(f"{prefix}.{name}", layer.get_submodule(name))

        replace_one_by_one(prefix, [f"{prefix}.{name}" for name in known.names(layer, index)])
        merge_experts(layer)
        decoder.layers[index] = packed(fuse(layer, part, known, index))
    if type(decoder.layers) is nn.ModuleList:
        decoder.layers = take_hooks(Layers(decoder.layers), decoder.layers)
    decoder.norm = take_hooks(new("model.norm", decoder.norm), decoder.norm)
    decoder.rotary_emb = tables
    # Transformers hooks layers when hidden states are first asked for; the new ones have no hooks yet, the others may.
    forget_recording(decoder)
    decoder._output_capturing_hooks_installed = False
    return Fusion(None, proof, known.own)


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Autocast, which reaches torch's products but none of ours, is off: no weight and no proof is in its dtypes."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def warn_not_fused(model: Any, reason: str) -> None:
    """For layers of a kind that is fused elsewhere: the loss of speed has a reason that its user may remove."""
    warnings.warn(
        f"qops: the decoder layers of {type(model).__name__} stay Transformers' own, with qops linears and norms: "
        f"{reason}",
        stacklevel=4,
    )


def tie(model: Any, table: QuantizedWeight, dtype: torch.dtype) -> None:
    """Makes the embedding look up the rows of `table`: in place, or of a dense copy where it does more than that."""
    embedding = model.get_input_embeddings()
    if isinstance(table, Int8Weight) and type(embedding) is nn.Embedding:
        model.set_input_embeddings(Int8Embedding(table, dtype))
    else:
        replace_parameter(model, embedding.weight, table.dequantize(dtype))


def replace_parameter(model: nn.Module, old: nn.Parameter, new: torch.Tensor) -> None:
    """Wherever it is: an encoder and a decoder may look up one table through embeddings of their own."""
    parameter = frozen(new)
    for module in model.modules():
        for key in [key for key, found in module._parameters.items() if found is old]:
            module._parameters[key] = parameter


def freeze(model: Any) -> Any:
    """The last step of every conversion: a model for inference that Transformers' own surgery leaves whole."""
    from qops.models.pretrained import protect

    return protect(model.eval().requires_grad_(False))


def packed(module: Any) -> Any:
    """`module` with its weights packed. Readers hand them over canonical, so that merged ones are packed only once."""
    for part in module.modules():
        if isinstance(part, QuantizedWeight):
            part.pack()
    return module


# Looking -------------------------------------------------------------------------------------------------------------


def input_table(model: Any) -> Any:
    """The module that looks up token embeddings; None where the model takes something else than tokens."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # what Transformers raises for a model that has none
        return None
    return table if isinstance(table, (nn.Embedding, Int8Embedding)) else None


def ties_of(model: Any) -> dict[str, str]:
    """The source of each tied parameter by its name, as it is in Transformers' model."""
    converted = model.__dict__.get("_qops_converted")
    return model.all_tied_weights_keys if converted is None else converted.ties


def is_tied(model: Any) -> bool:
    """Whether the output layer has the weight of the embedding. The config alone does not tell: classes differ."""
    table, output, ties = input_table(model), model.get_output_embeddings(), ties_of(model)
    if table is None or output is None:
        return False
    names = [f"{name_of(model, module)}.weight" for module in (table, output)]
    return ties.get(names[0], names[0]) == ties.get(names[1], names[1])


def parameter_of(model: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter of that name; None where a quantised weight, or nothing, stands there."""
    module_name, _, key = name.rpartition(".")
    module: Any = model
    for part in module_name.split(".") if module_name else ():
        module = module._modules.get(part)
        if module is None:
            return None
    return module._parameters.get(key)


def is_replaced(model: Any) -> bool:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return any(isinstance(module, (QuantizedWeight, RMSNorm)) for module in modules)


def require_replaced(model: Any, caller: str) -> None:
    require_transformers(caller)
    if not is_replaced(model):
        raise ValueError(f"{caller}: model must come from qops.load_model or qops.quantize_model")
    for name, module in model.named_modules():
        if isinstance(module, (QuantizedLinear, nn.Linear)) and "ranks" in vars(module):
            raise ValueError(f"{caller}: model must be whole, {name} has the shard of {vars(module)['ranks']}")
    weights = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    if any(weight.is_offloaded for weight in weights) or any(parameter.is_meta for parameter in model.parameters()):
        raise RuntimeError(
            f"{caller}: model must be in memory, parts of it are offloaded; "
            "accelerate.hooks.remove_hook_from_submodules(model) brings them back"
        )


def changed(model: Any) -> str | None:
    """Why adapters of the model that this one was made from do not fit it: linears read, or give, something else."""
    smoothed = getattr(model.__dict__.get("quantization_report"), "smoothed", None)
    if smoothed:
        return f"smoothing divides what {next(iter(smoothed))} reads or gives"
    return model.__dict__.get("qops_changed")


def is_fused(model: Any) -> bool:
    """Whether a part of its layers is."""
    experts = tuple(f"{name}." for name in names_of_experts(model))
    return any(
        isinstance(module, MergingModule) and not (experts and name.startswith(experts))
        for name, module in model.named_modules()
    )


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def kind_of(linear: Any) -> str:
    """How a folder names what becomes of a quantised weight."""
    return f"{linear.scheme} {linear.weight.kind}"


def entries(model: Any) -> Iterator[tuple[str, Any, Any]]:
    """(parameter name in Transformers' model, weight or tensor, owner of a quantised weight or None), each once.

    Tied tensors stand under the name of their source. A tied table is the embedding's, as Transformers has it; its
    exact values are those of the output layer, because a 4-bit table is looked up densely and the dense one is rounded.
    """
    ties = ties_of(model)
    table, output = input_table(model), model.get_output_embeddings()
    quantised = is_tied(model) and isinstance(output.weight, QuantizedWeight)
    if quantised:
        name = f"{name_of(model, table)}.weight"
        yield ties.get(name, name), output.weight, output
    for name, value, owner in _all_entries(model):
        copied = name in ties and value is parameter_of(model, ties[name])
        if not copied and not (quantised and (value is table.weight or value is output.weight)):
            yield name, value, owner


def _all_entries(model: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    merged: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(merged) and merged:
            continue
        if isinstance(module, MergedLinear):
            merged += (f"{name}.",)
            parent = name.rpartition(".")[0]
            for part, linear in module.split().items():
                yield from _own_entries(f"{parent}.{part}", linear)
        else:
            yield from _own_entries(name, module)


def _own_entries(name: str, module: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(module, QuantizedWeight):
        return  # its linear's
    weight = module._modules.get("weight")
    if isinstance(weight, QuantizedWeight):
        yield f"{name}.weight", weight, module
    # What a linear quantises its input with goes where its weight goes.
    static = module.static_input if isinstance(module, QuantizedLinear) else ()
    not_here = module._non_persistent_buffers_set.union(static)
    persistent = (item for item in module._buffers.items() if item[0] not in not_here)
    for key, tensor in (*module._parameters.items(), *persistent):
        if tensor is not None:
            yield f"{name}.{key}".removeprefix("."), tensor, None
