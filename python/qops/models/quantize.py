"""quantize_model: a dense Transformers model becomes a quantised one, in place, and a report says how."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import logging
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qops.formats._transformers import require_transformers
from qops.models.replacement import (
    FusionPlan,
    Norms,
    freeze,
    is_replaced,
    is_tied,
    looks_like_norm,
    name_of,
    odd_linear,
    plan_fusion,
    replace_parts,
    require_kernels,
    take_hooks,
    tie,
)
from qops.models.schemes import Asked, Choice, Scheme, choose, matches
from qops.models.smoothing import Scales, Smoothing, plan_smoothing
from qops.nn import Int8Embedding, Int8Linear, MergedLinear, QuantizedLinear, RMSNorm
from qops.nn.experts import expand_experts
from qops.weights.requirements import resolve_group_size

__all__ = ["QuantizationReport", "quantize_model"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PARTS = (QuantizedLinear, Int8Embedding, RMSNorm)
# Operators that neither read nor write elements.
_NO_PASS = ("aten::empty", "aten::new_empty", "aten::_unsafe_view")

_LOGGER = logging.getLogger("qops.models.quantize")


def quantize_model(
    model: Any,
    scheme: Asked = "int4",
    skip: tuple[str, ...] = (),
    *,
    skip_default: bool = True,
    fuse: bool = True,
    prove: bool = True,
    smoothing: Scales | None = None,
    count_passes: bool = False,
    progress: bool | None = None,
) -> Any:
    """Quantises a dense Transformers model by round-to-nearest and puts it on qops operators, in place.

    Schemes, each with a name for its default settings:

    * :class:`qops.Int4`, `"int4"` (W4A16): 4-bit weights in groups, :func:`qops.int4_gemm`.
    * :class:`qops.W4A8`, `"w4a8"`: the same weights, activations quantised per token, :func:`qops.int4_int8_gemm`.
    * :class:`qops.Int8`, `"int8"` (W8A8): 8-bit weights with one scale per output channel, activations quantised per
      token, :func:`qops.int8_gemm`.
    * :class:`qops.Int8WeightOnly`, `"int8_weight_only"` (W8A16): 8-bit weights, dense activations,
      :func:`qops.int8_weight_only_gemm`.

    A mapping mixes them: `{"*.down_proj": qops.Int8(), "lm_head": None, "*": qops.Int4(group_size=64)}` gives each
    linear the scheme of the first pattern that fits it; None leaves it dense, as does no pattern at all.

    Llama (SmolLM, SmolLM2), Mistral, Phi-3, Qwen 2, 2.5 and 3, SmolLM3, Gemma 1, 2 and 3 get fused decoder layers: q, k
    and v as one GEMM, gate and up with SiLU-mul as another, the residual addition inside a GEMM (of Gemma 2 and 3
    inside a norm), norms of q and k and rotary in place and, with "int8" and "w4a8", norms that emit 8-bit activations.
    Attention, MLP and residual additions are fused each where it is known: Mixtral and Qwen3-MoE keep their own MLP,
    Granite its own additions, OLMo 2 all but its MLP. Experts of mixtures are linears of their own here, three for
    each, with names such as `model.layers.0.mlp.experts.7.down_proj` (:class:`qops.nn.Experts`); router and block stay
    Transformers' own, and experts whose module is not known, or computes something else in a comparison, stay dense,
    with a warning. In other models, and in parts that are not fused, the linears and
    RMSNorms are replaced one by one. What became of every part stands in `model.quantization_report`,
    a :class:`qops.models.QuantizationReport`.

    Transformers calls its layers in other ways from release to release, so before anything is replaced fused layers are
    run against those of the installed release: one of each kind, on the same quantised linears, with and without
    padding, a prompt and two steps with a cache. Where they differ (in float32 they agree to about 1e-6), the model
    keeps Transformers' layers with qops linears and norms; the report and one warning say what differed. So do layers
    that have hooks already. Hooks on other modules go over to what replaces them, and hooks that are registered later
    see what they would see in Transformers' layers, where these have a module of that name. Hooks for all modules of
    the process see the layers of the comparison too.

    Layers are converted one at a time and their dense weights freed: at its peak the memory is that of the dense model
    and one quantised layer.

    Args:
        model: a Transformers model with floating-point weights; it is frozen and put into eval mode.
        scheme: a scheme, its name, or a mapping of patterns to schemes, their names or None. Patterns are names of
            linears, their last parts, or shell patterns ("o_proj", "*.mlp.down_proj"); one that names none, or none but
            what those before it take, is an error.
        skip: patterns of linears to leave dense; one that names none is an error.
        skip_default: leave dense also the output layer and all other linears outside the base model (classification
            heads), and in multimodal models everything outside the language model. With False `skip` alone decides; a
            tied output layer that is quantised takes the embedding with it, so that they stay tied. So does the scheme
            of a mapping whose pattern is the name of such a linear.
        fuse: False replaces linears and norms alone in every model.
        prove: False fuses without running fused layers first; the report says so.
        smoothing: of the architectures whose layers are fused as a whole, and where a scheme quantises activations:
            SmoothQuant's scales s, positive, `[K]` by the name of the linear; a mapping, or the path of a
            `.safetensors` or `.pt` file (of scales, not of activation maxima: those go through
            :func:`qops.models.smoothing_scales`). The columns of the linear are multiplied by s before they are
            quantised, and what makes its input is divided by it: for q, k and v the norm before attention, for gate and
            up the norm before the MLP (one vector for all that read it), for down the rows of up, for o the rows of v
            (equal over the query heads that share a key/value head).
        count_passes: count the passes over memory in a decoder layer for the report, which takes two forwards of the
            whole model, its hooks included.
        progress: show a progress bar on stderr; by default only on a terminal.

    Returns:
        The same model.

    Numerics:
        Weights as in :meth:`qops.Int4Weight.quantize` and :meth:`qops.Int8Weight.quantize`; activations by
        :func:`qops.quantize_int8`, rule "127". With `smoothing` weights are quantised from float32 products; a norm's
        weight is rounded to its dtype once, and the columns that read it are multiplied by what it was divided by in
        truth, so that this rounding changes no result. A fused layer has the bits of the operators one by one; unlike
        Transformers it computes rotary from float32 tables in every dtype.

    Raises:
        ImportError: Transformers >= 5.17 is missing.
        ValueError: an unknown scheme or pattern; a group size that does not fit; weights that are not finite; nothing
            to quantise; smoothing that cannot be folded. The model is then unchanged.
        RuntimeError: the model is on a device without kernels; it is then unchanged.
    """
    require_transformers("qops.quantize_model")
    caller = "qops.quantize_model"
    _modules(caller, model)
    stacks = expand_experts(model, prove)
    try:
        plan = _plan(model, scheme, skip, skip_default, fuse, smoothing)
    except BaseException:
        for name, module in stacks.items():
            model.set_submodule(name, module)
        raise
    stacks.clear()
    bytes_before, passes_before = weight_bytes(model), passes_per_layer(model) if count_passes else None

    def linear(name: str, module: nn.Linear, logits: bool = False) -> nn.Module:
        folded, chosen = plan.smoothing.linear(name, module), plan.linears.get(name)
        if chosen is None:
            return module if folded is module else folded.to(module.weight.dtype)
        return chosen._quantize(folded, float32_output=logits)

    def norm(name: str, module: nn.Module) -> nn.Module:
        return plan.norms.like(module, plan.smoothing.norm(name, module))

    def kind(name: str) -> str:
        return str(plan.linears.get(name))

    fusion = replace_parts(model, linear, norm, kind, plan.norms, plan.fusion, prove, progress)
    output = model.get_output_embeddings()
    if output is not None and (name := name_of(model, output)) in plan.linears:
        quantised: Any = take_hooks(linear(name, output, logits=True), output)
        if is_tied(model):
            tie(model, quantised.weight, model.get_input_embeddings().weight.dtype)
        model.set_output_embeddings(quantised)
    freeze(model)
    replaced = replaced_parts(model)
    kept = {name: reason for name, reason in plan.kept.items() if name.removesuffix(".weight") not in replaced}
    model.qops_fusion = fusion
    model.quantization_report = QuantizationReport(
        scheme=str(plan.choice),
        architecture=type(model).__name__,
        not_fused=fusion.not_fused,
        own=fusion.own,
        proof=fusion.proof,
        replaced=replaced,
        smoothed=plan.smoothing.into,
        kept=kept,
        kept_bytes={name: plan.kept_bytes[name] for name in kept},
        bytes_before=bytes_before,
        bytes_after=weight_bytes(model),
        passes_before=passes_before,
        passes_after=passes_per_layer(model) if count_passes else None,
    )
    _LOGGER.info("%s", model.quantization_report)
    return model


@dataclass(frozen=True)
class QuantizationReport:
    """What :func:`qops.quantize_model` did; `str()` is a summary.

    Attributes:
        scheme: as asked for.
        architecture: class of the model.
        not_fused: why the decoder layers were not fused; None if they were.
        own: why a part of fused layers stayed Transformers' own, by "attention", "mlp" and "stream" (the additions).
        proof: which fused layers were run against Transformers' own before that was decided, and with which result.
        replaced: what each linear, norm and embedding became, by its name in the original model.
        smoothed: for each linear with smoothing scales the norm or linear that was divided by them.
        kept: why everything else stayed as it was: linears and norms by their names, the parameters of all other
            modules by theirs. Each parameter of the model, or its module, stands here or in `replaced`.
        kept_bytes: of each, under the same names.
        bytes_before, bytes_after: of all weights and buffers, shared ones once.
        passes_before, passes_after: operator calls in a decoder layer that read and write memory (views and
            allocations do not count), averaged over the layers of a forward over two tokens; None where they were not
            asked for, the model has no such layers or its forward needs more than token ids.
    """

    scheme: str
    architecture: str
    not_fused: str | None
    own: dict[str, str]
    proof: str
    replaced: dict[str, str]
    smoothed: dict[str, str]
    kept: dict[str, str]
    kept_bytes: dict[str, int]
    bytes_before: int
    bytes_after: int
    passes_before: float | None
    passes_after: float | None

    def __str__(self) -> str:
        kinds = Counter(self.replaced.values())
        reasons: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            reasons.setdefault(reason, []).append(name)
        fused = "fused" + "".join(f", but not their {part}: {reason}" for part, reason in self.own.items())
        lines = [
            f"{self.architecture}, {self.scheme}: " + ", ".join(f"{count} x {kind}" for kind, count in kinds.items()),
            "decoder layers: " + (f"not fused: {self.not_fused}" if self.not_fused is not None else fused),
            f"proof: {self.proof}",
        ]
        for reason, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            size = sum(self.kept_bytes[name] for name in names) / 1e6
            lines.append(f"left dense: {', '.join(names[:3])}{more}: {reason} ({size:.1f} MB)")
        if self.smoothed:
            folded = Counter(name.rpartition(".")[2] for name in self.smoothed.values())
            into = ", ".join(f"{count} into {name}" for name, count in folded.items())
            lines.append(f"smoothing of {len(self.smoothed)} linears folded: {into}")
        before, after = self.bytes_before / 1e6, self.bytes_after / 1e6
        lines.append(f"weights: {before:.1f} MB -> {after:.1f} MB ({before / after:.2f}x)")
        if self.passes_before is not None and self.passes_after is not None:
            lines.append(f"passes over memory per layer: {self.passes_before:.0f} -> {self.passes_after:.0f}")
        return "\n".join(lines)


# Planning ------------------------------------------------------------------------------------------------------------


@dataclass
class _Plan:
    """What `quantize_model` will do, decided and checked before it does anything.

    Attributes:
        choice: which linear gets which scheme.
        norms: what the model's norms compute.
        fusion: what is to become of its layers.
        linears: scheme of each linear to quantise, by name.
        kept: why everything else stays, by the name of a linear, a norm or a parameter.
        kept_bytes: the bytes of each.
        smoothing: scales that are folded on the way.
    """

    choice: Choice
    norms: Norms
    fusion: FusionPlan
    linears: dict[str, Scheme] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    kept_bytes: dict[str, int] = field(default_factory=dict)
    smoothing: Smoothing = field(default_factory=Smoothing)

    def keep(self, name: str, reason: str, size: int) -> None:
        self.kept[name], self.kept_bytes[name] = reason, size


def _plan(
    model: Any, scheme: Asked, skip: tuple[str, ...], skip_default: bool, fuse: bool, smoothing: Scales | None
) -> _Plan:
    caller = "qops.quantize_model"
    modules = _modules(caller, model)
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    check_skip(caller, skip, linears)
    choice, norms = choose(caller, scheme, tuple(linears)), Norms()
    if smoothing is not None and not any(one.linear.quantizes_input for one in choice.schemes):
        raise ValueError(f"{caller}: smoothing must be None with {str(choice)!r}, which leaves activations as they are")
    plan = _Plan(choice, norms, plan_fusion(model, norms) if fuse else FusionPlan("fuse=False", None))
    if smoothing is not None:
        plan.smoothing = plan_smoothing(caller, model, smoothing, norms)
    heads = _heads(model, modules) if skip_default else {}
    asked = {name for name in heads if choice.names(name)}
    elsewhere = {name: heads[name] for name in heads if name not in asked}
    elsewhere |= _adapters(modules) | read_by_owner(modules)
    seen = {name for name, module in modules.items() if name in linears or looks_like_norm(module)}
    for name, module in modules.items():
        if name not in seen:
            continue
        if name not in linears:
            reason = norms.odd(module)
        elif (reason := elsewhere.get(name) or _unquantizable(name, linears[name], skip)) is None:
            chosen = choice.scheme_of(name)
            reason = "its scheme is None, or there is none for it" if chosen is None else None
            if chosen is not None:
                check_quantizable(f"{caller}: {name}", linears[name], chosen)
                plan.linears[name] = chosen
        if reason is not None:
            plan.keep(name, reason, sum(parameter.nbytes for parameter in module.parameters()))
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if owner not in seen:
            kind = type(modules[owner]).__name__
            plan.keep(name, f"a parameter of {kind}, which is neither a linear nor an RMSNorm", parameter.nbytes)
    output = model.get_output_embeddings()
    head = None if output is None else name_of(model, output)
    for device in dict.fromkeys(linears[name].weight.device for name in plan.linears):
        there = {name: chosen.linear for name, chosen in plan.linears.items() if linears[name].weight.device == device}
        require_kernels(caller, there, device, model.dtype, head)
    if not plan.linears:
        reasons = Counter(plan.kept.values()).most_common(5)
        why = "; ".join(f"{count} x {reason}" for reason, count in reasons)
        raise ValueError(f"{caller}: model must have linears to quantise, {type(model).__name__} has none: {why}")
    return plan


def _modules(caller: str, model: Any) -> dict[str, nn.Module]:
    """The modules of a model by name, or what it is instead of one that can be quantised."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{caller}: model must be a transformers PreTrainedModel, got {type(model).__name__}")
    if is_replaced(model):
        raise ValueError(f"{caller}: model has qops parts already")
    if model.dtype not in DTYPES:
        raise ValueError(f"{caller}: model must be in float32, bfloat16 or float16, got {model.dtype}")
    output: Any = model.get_output_embeddings()
    if is_tied(model) and output.weight is not model.get_input_embeddings().weight:
        raise ValueError(
            f"{caller}: the config ties the output layer to the embedding, so both must have one weight, got two; "
            "set config.tie_word_embeddings to False before the model is made, or call tie_weights()"
        )
    return dict(model.named_modules())


def _heads(model: Any, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Linears that stay dense unless they are asked for: heads, and what feeds a language model from other senses."""
    kept: dict[str, str] = {}
    text, output = _language_models(model, modules), model.get_output_embeddings()
    inside = {id(module) for module in model.base_model.modules()}
    for name, module in modules.items():
        if not isinstance(module, nn.Linear):
            continue
        if module is output or id(module) not in inside:
            kept[name] = "a head; skip_default=False quantises it"
        elif text and not any(name.startswith(prefix) for prefix in text):
            kept[name] = "outside the language model; skip_default=False quantises it"
    return kept


def _language_models(model: Any, modules: Mapping[str, nn.Module]) -> list[str]:
    """The prefixes of the parts of a multimodal model that are language models; none where the whole model is one."""
    from transformers import PreTrainedModel

    config = getattr(model.config, "text_config", None)
    if config is None:
        return []
    return [
        f"{name}."
        for name, part in modules.items()
        if isinstance(part, PreTrainedModel) and type(part.config) is type(config)
    ]


def _adapters(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Linears that PEFT has put beside a layer: they are trained, and small."""
    kept: dict[str, str] = {}
    for name, module in modules.items():
        if any(base.__name__ == "BaseTunerLayer" for base in type(module).__mro__):
            for inner, part in module.named_modules():
                if isinstance(part, nn.Linear) and not f"{inner}.".startswith("base_layer."):
                    kept[f"{name}.{inner}"] = f"part of an adapter, {type(module).__name__}"
    return kept


def read_by_owner(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Linears whose weight another module reads as a tensor, by its source, instead of calling them."""
    kept: dict[str, str] = {}
    # RWKV rescales the weights of its blocks.
    from_afar = set().union(*(_weights_read(kind) for kind in {type(module) for module in modules.values()}))
    for name, module in modules.items():
        for part, linear in module._modules.items():
            if isinstance(linear, nn.Linear):
                source, parent = _source(type(module)), name.rpartition(".")[2]
                # T5 asks first whether the weight is a tensor.
                guarded = f"isinstance(self.{part}.weight, torch.Tensor)" in source
                by_itself = re.search(rf"\bself\.{part}\.weight\b", source) and not guarded
                if by_itself or (parent, part) in from_afar:
                    who = (
                        f"{type(module).__name__} reads its weight itself"
                        if by_itself
                        else "its model reads its weight"
                    )
                    kept[f"{name}.{part}".removeprefix(".")] = who
    return kept


@functools.cache
def _weights_read(kind: type) -> set[tuple[str, str]]:
    """(parent, part) of each `x.parent.part.weight` in its source. Names in strings are those of ties."""
    chains = (chain.split(".") for chain in re.findall(r"(?<![\w.'\"])\w+(?:\.\w+)+", _source(kind)))
    return {(c[i - 2], c[i - 1]) for c in chains for i in range(3, len(c)) if c[i] == "weight"}


@functools.cache
def _source(kind: type) -> str:
    """Of a class and its bases, as far as there is one."""
    found = ""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        with contextlib.suppress(OSError, TypeError):  # of classes made at run time
            found += _classes(base.__module__).get(base.__qualname__) or inspect.getsource(base)
    return found


@functools.cache
def _classes(module: str) -> dict[str, str]:
    """Sources of its classes, as far as it has one: inspect.getsource parses the whole file for each of them."""
    try:
        text = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return {}
    lines = text.split("\n")
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    return {node.name: "\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in classes}


def check_skip(caller: str, skip: Any, linears: Mapping[str, nn.Linear]) -> None:
    """Raises where `skip` is no tuple of patterns of linears."""
    if isinstance(skip, str) or not isinstance(skip, Sequence) or not all(isinstance(name, str) for name in skip):
        got = f"the string {skip!r}" if isinstance(skip, str) else repr(skip)
        raise ValueError(f"{caller}: skip must be a tuple of names, got {got}")
    for pattern in skip:
        if not any(matches(pattern, name) for name in linears):
            raise ValueError(f"{caller}: skip must name linears of the model, {pattern!r} names none")


def _unquantizable(name: str, linear: nn.Linear, skip: tuple[str, ...]) -> str | None:
    if any(matches(pattern, name) for pattern in skip):
        return "skipped"
    return unquantizable(linear)


def unquantizable(linear: nn.Linear) -> str | None:
    """Why a linear cannot be quantised, by whatever scheme; None if it can."""
    if (reason := odd_linear(linear)) is not None:
        return reason
    if linear.weight.dtype not in DTYPES:
        return f"its weight is {linear.weight.dtype}"
    n, k = linear.weight.shape
    if n % 8 or k % 8:
        sizes = " and ".join(f"{name} = {size}" for name, size in (("N", n), ("K", k)) if size % 8)
        return f"{sizes} must be {'multiples' if n % 8 and k % 8 else 'a multiple'} of 8"
    return None


def check_quantizable(where: str, linear: nn.Linear, scheme: Scheme) -> None:
    """Raises what quantising would raise, before any layer is replaced."""
    if linear.weight.is_meta:
        raise ValueError(f"{where}: weight must have data, got a tensor on the meta device")
    resolve_group_size(where, linear.in_features, scheme._group_size(linear.in_features))
    if not linear.weight.isfinite().all():
        raise ValueError(f"{where}: weight must be finite, got NaN or infinity")


# Counting ------------------------------------------------------------------------------------------------------------


def replaced_parts(model: nn.Module) -> dict[str, str]:
    """What linears, norms and embeddings became, by their names in the original model."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, MergedLinear):
            parent = name.rpartition(".")[0]
            linears = module.separate if module.merged is None else [module.merged] * len(module.names)
            for part, linear in zip(module.names, linears, strict=True):
                if not isinstance(linear, nn.Linear):
                    how = "" if module.merged is None else "merged "
                    found[f"{parent}.{part}"] = how + _described(linear)
        elif isinstance(module, _PARTS) and not re.search(r"\.(merged|separate)\b", name):
            found[name] = _described(module)
    return found


def _described(module: Any) -> str:
    if isinstance(module, QuantizedLinear) and not isinstance(module, Int8Linear):
        return f"{type(module).__name__} (group size {module.weight.group_size})"
    if isinstance(module, RMSNorm) and module.int8 is not None:
        return "RMSNorm that emits int8"
    return "RMSNorm" if isinstance(module, RMSNorm) else type(module).__name__


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        # The storage itself: on the meta device none has an address.
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


class _CountPasses(TorchDispatchMode):
    """Counts operator calls that read or write memory while `active`."""

    def __init__(self) -> None:
        super().__init__()
        self.active = False
        self.passes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.active and not func.is_view and not func.name().startswith(_NO_PASS):
            self.passes += 1
        return func(*args, **(kwargs or {}))


def passes_per_layer(model: Any) -> float | None:
    """See `QuantizationReport.passes_before`."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = max(lists, key=len, default=())
    if len(layers) == 0:
        return None
    count = _CountPasses()
    hooks = [layer.register_forward_pre_hook(lambda *_: setattr(count, "active", True)) for layer in layers]
    hooks += [layer.register_forward_hook(lambda *_: setattr(count, "active", False)) for layer in layers]
    try:
        with torch.no_grad(), count:
            model(torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    except Exception:  # a model of another kind may raise anything
        _LOGGER.debug("passes are not counted", exc_info=True)
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return count.passes / len(layers)
