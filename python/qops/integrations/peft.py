"""PEFT's LoRA adapters on qops linears: for adapters, not fast.

Importing this module tells PEFT of them; :func:`prepare_for_adapters` makes a model ready. Everything after that is
PEFT's own: `get_peft_model`, `PeftModel.from_pretrained`, `set_adapter`, `disable_adapter`, `hotswap_adapter`,
`save_pretrained`. Its files have the names that they have for the dense model, so either reads the other's::

    from peft import PeftModel
    from qops.integrations.peft import prepare_for_adapters

    model = PeftModel.from_pretrained(prepare_for_adapters(qops.load_model(path)), adapter)
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftType
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear as DenseLoraLinear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qops.models.decoder import Attention, DecoderLayer
from qops.models.load import skeleton
from qops.models.replacement import changed, is_fused, packed, require_replaced, take_hooks
from qops.nn import MLP, MergedLinear, QuantizedLinear, RMSNorm
from qops.nn.experts import separate_experts
from qops.nn.hooks import forget_recording
from qops.nn.linears import LINEARS
from qops.weights.state import QuantizedWeight

__all__ = ["prepare_for_adapters"]

_CALLER = "qops.integrations.peft.prepare_for_adapters"


def prepare_for_adapters(model: Any) -> Any:
    """Makes a model ready for LoRA adapters of PEFT, in place.

    Fused decoder layers become Transformers' own again, with qops linears and norms in them, so that each linear stands
    under the name that adapters know it by: `q_proj`, `k_proj`, `v_proj`, `gate_proj` and `up_proj` are products of
    their own, and nothing computes past them. With adapters,

        y = linear(x) + sum over the active adapters of  alpha / r * B(A(dropout(x)))

    as PEFT applies them to nn.Linear: x in the dtype of A, the sum rounded to the dtype of linear(x). A linear that
    quantises its input does so for its own product alone.

    Where grad mode is on and x, or a bias, requires grad, linears and norms have gradients: those of a linear are
    `dx = dy @ w` with the dequantised weight in the dtype of dy, whatever its forward rounds x to. The model stays
    frozen and in eval mode; PEFT makes the adapters that it adds trainable.

    What it costs: the model is the one of `quantize_model(..., fuse=False)`. q, k and v are three products instead of
    one, gate and up two, and SiLU-mul, residual additions, rotary and decoding steps are Transformers'. A merged weight
    is copied into its parts, one layer at a time. In training every backward dequantises every weight that it crosses.

    Args:
        model: a Transformers model made by :func:`qops.load_model` or :func:`qops.quantize_model`.

    Returns:
        The same model. Without adapters, and with all of them disabled, it has the same bits; those of its fused form
        are as near as the proof of :func:`qops.quantize_model` asks for.

    Numerics:
        A linear has the bits of its operator on the part of a merged weight, a norm those of :func:`qops.rms_norm`;
        in training a norm is computed by torch from float32, rounded where the contract of that operator rounds.

    Raises:
        ValueError: the model has no qops parts, is none of Transformers', or is around the one that was fused; a merged
            product has hooks, or a fused part another forward; adapters of the model that it was made from would be
            wrong in silence: :func:`qops.quantize_model` folded smoothing into its weights, or :func:`qops.save_model`
            wrote gate and up in the act-order of down. It is then unchanged.
        RuntimeError: parts of it are offloaded.

    What PEFT then refuses on a quantised linear, by a ValueError before it changes the model: other adapters than LoRA,
    variants and initialisations that read or change its weight (DoRA, PiSSA, OLoRA, LoftQ, ...), `modules_to_save`, and
    targets in a model that was not prepared. Merging (`merge_adapter`, `merge_and_unload`) is a RuntimeError: codes of
    4 or 8 bits have no room for it. `unload` gives the prepared model back.

    Source:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{_CALLER}: model must be a transformers PreTrainedModel, got {type(model).__name__}")
    require_replaced(model, _CALLER)
    if (why := changed(model)) is not None:
        raise ValueError(f"{_CALLER}: model must be one that adapters of the model it was made from fit, but {why}")
    if is_fused(model):
        _unfuse(model)
    separate_experts(model)
    packed(model)
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and not isinstance(module, AdaptableLinear):
            marker = torch.empty(0, dtype=model.dtype, device=module.weight.device)
            module.register_buffer("dtype_marker", marker, persistent=False)
            module.__class__ = adaptable_class(type(module))
        elif type(module) is RMSNorm:
            module.int8 = None
            module.__class__ = AdaptableRMSNorm
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if hasattr(quantizer, "trains_adapters"):  # of `qops.integrations.transformers`
        quantizer.trains_adapters = True
    return model


# Transformers' own layers --------------------------------------------------------------------------------------------


def _unfuse(model: Any) -> None:
    """Makes the layers of a model Transformers' own, around the linears and norms that they have."""
    if "qops_fusion" not in vars(model):
        raise ValueError(f"{_CALLER}: model must be the one that was fused, got a {type(model).__name__} around it")
    for name, module in model.named_modules():
        if isinstance(module, (DecoderLayer, Attention, MLP, MergedLinear)) and "forward" in vars(module):
            raise ValueError(f"{_CALLER}: {name} must have no forward of its owner's, nor hooks of accelerate")
        merged = module.modules() if isinstance(module, MergedLinear) else ()
        if any(part._forward_hooks or part._forward_pre_hooks for part in merged):
            raise ValueError(f"{_CALLER}: {name} must have no hooks, as its parts become linears of their own")
    decoder, twin = model.model, skeleton(type(model), model.config, model.dtype)
    forget_recording(decoder)
    for index, layer in enumerate(decoder.layers):
        theirs = _theirs(layer, twin.model.layers[layer.self_attn.layer_idx])
        for module in theirs.modules():
            module._is_hf_initialized = True  # Transformers is to initialise nothing anew
            if vars(module).get("config") is twin.config:
                module.config = model.config
        decoder.layers[index] = packed(theirs)
    decoder.rotary_emb = getattr(decoder.rotary_emb, "rotary", decoder.rotary_emb)
    decoder._output_capturing_hooks_installed = False
    model.qops_fusion = model.qops_fusion._replace(not_fused="it is prepared for adapters", own={})


def _theirs(ours: Any, shell: Any) -> Any:
    """A module without fused parts that computes what `ours` does.

    Args:
        ours: a module of a fused layer, or the layer.
        shell: Transformers' own in its place, without storage.
    """
    if isinstance(ours, QuantizedLinear):
        return ours
    parts: dict[str, Any] = dict(ours.named_children())
    if isinstance(ours, MLP):
        for name, linear in ours.split().items():
            parts[name] = take_hooks(linear, parts[name]) if name in parts else linear
        setattr(shell, "act_fn" if hasattr(shell, "act_fn") else "activation_fn", ours.act or nn.SiLU())
    elif isinstance(ours, Attention) and isinstance(ours.qkv_proj, MergedLinear):
        parts |= ours.qkv_proj.split()
    theirs = ours
    if isinstance(ours, (DecoderLayer, Attention, MLP)):
        theirs = take_hooks(shell, ours)
        # What its owner has set on the module, which the fused one has taken over.
        shared = {key: value for key, value in vars(ours).items() if key in vars(shell) and not key.startswith("_")}
        vars(shell).update(shared)
    for name, inner in shell.named_children():
        if name in parts:
            setattr(theirs, name, _theirs(parts[name], inner))
    return theirs


# Gradients -----------------------------------------------------------------------------------------------------------


class _Product(torch.autograd.Function):
    """The product of a linear, whose operator refuses gradients, with those of the dense linear it stands for."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, linear: Any) -> torch.Tensor:
        ctx.linear, ctx.dtypes = linear, (x.dtype, None if bias is None else bias.dtype)
        return linear.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        of_x, of_bias, _ = ctx.needs_input_grad
        dx = (grad @ ctx.linear.dense_weight(grad.dtype)).to(ctx.dtypes[0]) if of_x else None
        dbias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.dtypes[1]) if of_bias else None
        return dx, dbias, None


class AdaptableLinear(QuantizedLinear):
    """What linears of each kind are in a prepared model: with gradients, and the dtype that adapters start in.

    For what holds it, it is a linear like nn.Linear.
    """

    adds_residual = applies_silu_mul = False
    rows_rule = None
    dtype_marker: torch.Tensor
    """Empty, in the dtype of the model, which weights do not follow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return _Product.apply(x, bias, self)
        return super().forward(x)


@functools.cache
def adaptable_class(kind: type[QuantizedLinear]) -> Any:
    """A class of linears as an :class:`AdaptableLinear`."""
    return type(f"Adaptable{kind.__name__}", (AdaptableLinear, kind), {"__doc__": kind.__doc__})


def __getattr__(name: str) -> Any:
    """The classes that `adaptable_class` makes, which pickle looks up by name."""
    for kind in LINEARS.values():
        if name == f"Adaptable{kind.__name__}":
            return adaptable_class(kind)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class AdaptableRMSNorm(RMSNorm):
    """RMSNorm with gradients, of dense rows."""

    def forward(self, x: torch.Tensor) -> Any:
        weight = self.weight
        if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
            return super().forward(x)
        z = x.float()
        z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + self.eps)
        if self.rounding == "hf":
            return (z.to(x.dtype) * weight).to(x.dtype)
        return (z * (weight.float() + self.weight_offset)).to(x.dtype)


# PEFT ----------------------------------------------------------------------------------------------------------------


class LoraLinear(DenseLoraLinear):
    """PEFT's LoRA around an :class:`AdaptableLinear`."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base: Any = self.get_base_layer()
        raise RuntimeError(
            f"qops.integrations.peft: adapters cannot be merged into {base.scheme} codes, which have no room for them; "
            "leave them beside the linear, or merge them into qops.models.dense_model(model)"
        )

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        return base_layer.weight.device, base_layer.dtype_marker.dtype


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linears that qops computes by the names that adapters know them by, and what they are, or are parts of."""
    for name, module in model.named_modules():
        if isinstance(module, MergedLinear):
            parent = name.rpartition(".")[0]
            for part in module.names:
                yield f"{parent}.{part}".removeprefix("."), module
        elif isinstance(module, QuantizedLinear):
            yield name.removesuffix(".base_layer"), module


def _all_linears(model: Any) -> set[str]:
    """What PEFT means by "all-linear": all but the output layer, and but the adapters' own."""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    found: set[str] = set()
    adapted: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if adapted and name.startswith(adapted):
            continue
        base = module
        if isinstance(module, BaseTunerLayer):
            adapted += (f"{name}.",)
            base = module.get_base_layer()
        if isinstance(base, (nn.Linear, Conv1D, QuantizedLinear)) and module is not output:
            found.add(name)
    return found


def _not_plain(config: Any) -> list[str]:
    """The settings by which adapters are something else than two products beside a linear."""
    if config.peft_type != PeftType.LORA:
        return [f"peft_type={config.peft_type.value}"]
    variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    found = [name for name in variants if getattr(config, name)]
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights != "gaussian":
        found.append(f"init_lora_weights={config.init_lora_weights!r}")
    return found


def _require_adaptable(tuner: Any, model: Any, config: Any) -> None:
    """Raises where adapters would be missing, or wrong, on linears that qops computes."""
    places = dict(_places(model))
    if not places or not hasattr(config, "target_modules"):
        return
    caller = "qops.integrations.peft"
    for name, module in model.named_modules():
        saved = any(name.endswith(key) for key in getattr(config, "modules_to_save", None) or ())
        if saved and any(isinstance(part, QuantizedWeight) for part in module.modules()):
            raise ValueError(f"{caller}: modules_to_save must name dense modules, {name} has quantised weights")
    targets: Any = config.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = _all_linears(model)
        wanted = places.keys() & targets if not is_fused(model) else places.keys()
    else:
        complete = tuner._prepare_adapter_config(copy.copy(config), tuner.get_model_config(model))
        wanted = {name for name in places if tuner._check_target_module_exists(complete, name)}
    for name in sorted(wanted):
        if not isinstance(places[name], AdaptableLinear):
            raise ValueError(
                f"{caller}: {name} must be prepared for adapters, got a part of {type(places[name]).__name__}; "
                f"{_CALLER}(model) does it"
            )
        if settings := _not_plain(config):
            raise ValueError(
                f"{caller}: adapters on {name}, which is quantised, must be plain LoRA, got {', '.join(settings)}"
            )
    config.target_modules = targets


_create_new_module = LoraModel._create_new_module
_inject_adapter = BaseTuner.inject_adapter


@functools.wraps(_create_new_module)
def _create(lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, AdaptableLinear):
        return LoraLinear(target, adapter_name, config=lora_config, **kwargs)
    return _create_new_module(lora_config, adapter_name, target, **kwargs)


@functools.wraps(_inject_adapter)
def _inject(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    _require_adaptable(self, model, self.peft_config[adapter_name])
    _inject_adapter(self, model, adapter_name, *args, **kwargs)


# PEFT asks the settings of an adapter for other classes of linears, which a file cannot hold; so it is told here.
LoraModel._create_new_module = staticmethod(_create)  # pyright: ignore[reportAttributeAccessIssue]
BaseTuner.inject_adapter = _inject
