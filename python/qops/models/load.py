"""Whole language models on qops operators: load, and the dense model to compare with."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from qops.formats._transformers import refuse_zero_init, require_transformers
from qops.formats.checkpoint import Checkpoint, Weight
from qops.formats.folders.config import model_without_storage
from qops.formats.open import open_checkpoint
from qops.models.replacement import (
    FusionPlan,
    Norms,
    entries,
    freeze,
    input_table,
    is_fused,
    is_linear,
    is_tied,
    name_of,
    packed,
    parameter_of,
    plan_fusion,
    replace_parameter,
    replace_parts,
    require_kernels,
    require_replaced,
    tie,
    without_autocast,
)
from qops.nn import MergedLinear, QuantizedLinear, dense_linear, frozen
from qops.nn.experts import collapse_experts, expand_experts, names_of_experts
from qops.weights.state import QuantizedWeight

__all__ = ["dense_model", "load_model"]

# Bytes from which on reading takes long enough to be watched.
_LARGE = 10**9


def load_model(
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    prove: bool = True,
    zero_add: str | None = None,
    symmetric: bool | None = None,
    progress: bool | None = None,
) -> Any:
    """Loads a model whose linears, norms, rotary and SiLU-mul run on qops operators.

    Quantised weights keep every stored code and scale. Dense weights, norms and biases are rounded once to `dtype`,
    which is also the dtype of the activations. No dense copy of a quantised weight is ever made, except of a 4-bit
    embedding table, which is looked up densely, and of a weight in a GGUF file whose N is no multiple of 8 (the tables
    of an odd vocabulary), which no kernel takes.

    Args:
        path: a folder with a quantised checkpoint in safetensors files: GPTQ (version 1 and 2, act-order, 4 and 8
            bits), AWQ (gemm, gemv, gemv_fast), compressed-tensors (pack-quantized, int-quantized), HQQ (axis 1),
            optimum-quanto (qint4, qint8), bitsandbytes (8 bits), torchao (Int8Tensor, int4), lmdeploy (smooth_quant),
            ModelOpt (W4A16_AWQ, W8A16, W8A8_SQ_PER_CHANNEL), or what :func:`qops.save_model` wrote; a GGUF file of
            Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, F32, F16 and BF16 tensors, of a llama (Mistral,
            SmolLM2), smollm3, qwen2, qwen3, gemma, gemma2, gemma3 (its text model) or phi3; or the name of a
            repository on the Hugging Face hub that holds such a folder.
        dtype: float32, bfloat16 or float16; by default that of the checkpoint. Of a GGUF file it is that of the dense
            matrices: float16 or bfloat16 where all have this type or that, float32 where one is F32 or where there are
            both, and bfloat16 where there are none. Its vectors are F32 whatever the model was, and say nothing.
        device: where the model goes.
        prove: compare fused decoder layers with those of the installed Transformers first, one of each kind
            (:func:`qops.quantize_model` tells how). Where they differ the model keeps Transformers' layers, with qops
            linears and norms, and a warning says what differed.
        zero_add: of GPTQ alone: what has to be added to stored zero points, "word" or "nibble" for version 1, "none"
            for version 2; by default what the config says. An asymmetric checkpoint whose config names the wrong
            version reads as noise, and nothing in its tensors shows it: try the other one.
            :func:`qops.formats.gptq.int4_weight` tells more.
        symmetric: of AWQ without qzeros alone: True says that all zero points are 8, as lmdeploy means it.
        progress: show a progress bar on stderr; by default only on a terminal, of checkpoints from 1 GB on.

    Returns:
        A Transformers model (`LlamaForCausalLM` or whichever was saved) in eval mode, frozen; `generate` works as
        usual. `model.qops_fusion` tells whether its layers are fused, and what was proven. With a quantised output
        layer its logits are float32: logits near 25 are 0.125 apart in bfloat16, so rounding them makes ties that
        greedy search then decides by their index.

    Raises:
        ImportError: Transformers >= 5.17 (or, for GGUF, the gguf package) is missing.
        FileNotFoundError: nothing is at `path`.
        ValueError: the checkpoint is malformed or of a kind that is not supported.
        RuntimeError: a linear has no kernel on `device`, or the call stands inside `deepspeed.zero.Init`; no weight has
            been read then.
    """
    require_transformers("qops.load_model")
    refuse_zero_init("qops.load_model")
    checkpoint = open_checkpoint(path, zero_add=zero_add, symmetric=symmetric)
    with _counted(checkpoint, progress) as reader:
        return build_model(reader, dtype or checkpoint.dtype, device, prove)


def require_restorable(caller: str, model: Any, twin: Any, held: set[str]) -> None:
    """Raises where a model of this class and config would be another one: it is all that a twin, or a folder, has.

    Args:
        twin: the `skeleton` of that class and config.
        held: names of the tensors that it gets.
    """
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] not in ("qops", "torch", "transformers"):
            raise ValueError(
                f"{caller}: every part of model must be of a class of torch, transformers or qops, "
                f"got {type(module).__module__}.{type(module).__name__} at {name}"
            )
    ties, wanted = twin.all_tied_weights_keys, set(twin.state_dict())
    missing = sorted(name for name in wanted if name not in held and ties.get(name) not in held)
    if missing or held - wanted:
        raise ValueError(
            f"{caller}: model must have the parameters of {type(model).__name__} as its config describes it, got "
            f"{', '.join(sorted(held - wanted)[:3]) or 'none'} more and {', '.join(missing[:3]) or 'none'} fewer"
        )


def dense_model(model: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The plain Transformers model with the same weights, dequantised: what the qops model is compared with.

    Args:
        model: made by :func:`qops.load_model` or :func:`qops.quantize_model`; it stays as it is.
        dtype: float32, bfloat16 or float16, of weights and activations; each exact weight is rounded to float32, then
            to `dtype`.

    Returns:
        A model of the same class, in eval mode, frozen.

    Raises:
        ImportError: Transformers >= 5.17 is missing.
        ValueError: the model has no qops parts, or others than Transformers' class has; another dtype.
    """
    require_replaced(model, "qops.models.dense_model")
    dense = skeleton(type(model), model.config, dtype)
    stacks = expand_experts(dense, prove=False, only=names_of_experts(model).__contains__)
    held = list(entries(model))
    require_restorable("qops.models.dense_model", model, dense, {name for name, _, _ in held})
    state = {name: _dense(value, owner, dtype) for name, value, owner in held}
    _tie_what_is_tied(dense, frozenset(state).__contains__)
    _assign(dense, state.pop)
    collapse_experts(dense, stacks)
    if is_fused(model):
        # The instance in use, not a new one from the config: it may carry its owner's frequencies.
        rotary = model.model.rotary_emb
        dense.model.rotary_emb = copy.deepcopy(getattr(rotary, "rotary", rotary))
    if (generation_config := getattr(model, "generation_config", None)) is not None:
        dense.generation_config = copy.deepcopy(generation_config)
    return freeze(dense)


def _dense(value: Weight, owner: Any, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return _in_dtype(value, dtype)
    return owner.dense_weight(dtype) if isinstance(owner, QuantizedLinear) else value.dequantize(dtype)


# Progress ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _counted(checkpoint: Checkpoint, progress: bool | None) -> Iterator[Any]:
    """The checkpoint itself, or one that moves a bar by the bytes that it is asked for; see `load_model`."""
    if progress is False:
        yield checkpoint
        return
    from tqdm import tqdm

    total = sum(checkpoint.describe(name).size_bytes for name in checkpoint.names)
    off = (None if total >= _LARGE else True) if progress is None else False  # None: off but on a terminal
    with tqdm(desc="qops: reading", total=total, unit="B", unit_scale=True, leave=False, disable=off) as bar:
        yield _Counted(checkpoint, bar)


class _Counted:
    """A :class:`qops.formats.Checkpoint` by another one, which it counts."""

    def __init__(self, checkpoint: Checkpoint, bar: Any):
        self._checkpoint, self._bar = checkpoint, bar

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def weight(self, module: str) -> Weight:
        found = self._checkpoint.weight(module)
        self._bar.update(self._checkpoint.describe(f"{module}.weight").size_bytes)
        return found

    def tensor(self, name: str) -> torch.Tensor:
        found = self._checkpoint.tensor(name)
        self._bar.update(self._checkpoint.describe(name).size_bytes)
        return found


# Building ------------------------------------------------------------------------------------------------------------


def build_model(
    checkpoint: Checkpoint, dtype: torch.dtype, device: str | torch.device, prove: bool = True, model: Any = None
) -> Any:
    """The model of a checkpoint. Weights are packed where the checkpoint has them; then all goes to ``device``.

    Args:
        model: the :func:`skeleton` that is filled; by default one of the class and config that the checkpoint names.

    Raises:
        ValueError: of everything that does not fit, with the path of the checkpoint.
    """
    try:
        # Whatever the caller's contexts say of dtypes and devices.
        with torch.device("cpu"), without_autocast():
            return _build_model(checkpoint, dtype, device, prove, model)
    except ValueError as error:
        if str(checkpoint.path) in str(error):
            raise
        raise ValueError(f"{checkpoint.path}: {error}") from error


# Of producers that do not say which columns of gpt-oss' experts they call gate_proj.
_UNCLEAR = ("gptq", "awq")


def _build_model(
    checkpoint: Checkpoint, dtype: torch.dtype, device: str | torch.device, prove: bool, model: Any
) -> Any:
    method = getattr(checkpoint, "method", "")
    if method in _UNCLEAR and getattr(checkpoint.config, "model_type", "") == "gpt_oss":
        raise ValueError(
            f"{checkpoint.path}: gate_proj and up_proj of gpt-oss' experts mean halves of interleaved columns in "
            f"files of some producers, and gate and up in those of others; of {method} no reader can tell"
        )

    if model is None:
        found = model_without_storage(checkpoint.path, checkpoint.config, len(checkpoint.names))
        expand_for(checkpoint, found, prove)
        require_fit(checkpoint, found)
        model = skeleton(type(found), checkpoint.config, dtype)
        expand_for(checkpoint, model, prove)
    else:
        expand_for(checkpoint, model, prove)
        require_fit(checkpoint, model)

    def fetch(name: str, module: Any) -> Weight:
        weight = checkpoint.weight(name)
        if isinstance(weight, torch.Tensor):
            weight = _rounded(name, weight, dtype)
            found = list(weight.shape)
        else:
            found = [weight.out_features, weight.in_features]
        wanted = list(module.weight.shape)
        if found != wanted:
            raise ValueError(f"{name}.weight must have shape {wanted}, got {found}")
        return weight

    def linear_of(name: str, weight: Weight, bias: torch.Tensor | None, *, logits: bool = False) -> nn.Module:
        bias = None if bias is None else bias.to(dtype)
        kind = checkpoint.linear(name)
        if kind is None and isinstance(weight, torch.Tensor):
            return dense_linear(weight, bias)
        if kind is None or isinstance(weight, torch.Tensor):
            said = "dense" if kind is None else f"that of an {kind.__name__}"
            raise ValueError(f"{name}.weight must be {said}, as the checkpoint says, got {type(weight).__name__}")
        try:
            return kind(weight, bias, float32_output=logits, **checkpoint.activations(name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def norm(name: str, module: nn.Module) -> nn.Module:
        weight = fetch(name, module)
        if not isinstance(weight, torch.Tensor):
            raise ValueError(f"{name}.weight must be dense, got {type(weight).__name__}")
        return norms.like(module, weight)

    def linear(name: str, module: nn.Linear) -> nn.Module:
        return linear_of(name, fetch(name, module), bias_of(module, f"{name}.bias"))

    def bias_of(module: nn.Linear, name: str) -> torch.Tensor | None:
        bias = checkpoint.tensor(name) if checkpoint.holds(name) or module.bias is not None else None
        if module.bias is None:
            # AutoGPTQ has stored zeros for linears that have none.
            if bias is not None and bool(bias.any()):
                raise ValueError(f"{name} has no place in {type(model).__name__} as its config describes it")
            return None
        return bias

    def stored(name: str) -> str:
        """Where the checkpoint has a tensor that may be tied to another one."""
        return name if checkpoint.holds(name) else model.all_tied_weights_keys.get(name, name)

    _tie_what_is_tied(model, checkpoint.holds)
    output, linears = model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        source = stored(f"{name}.weight")
        if is_linear(module) and checkpoint.holds(source):
            linears[name] = checkpoint.linear(source.removesuffix(".weight"))
    quantised = {name: kind for name, kind in linears.items() if kind is not None}
    require_kernels("qops.load_model", quantised, device, dtype, None if output is None else name_of(model, output))
    norms = Norms()
    plan = plan_fusion(model, norms) if checkpoint.fuses else FusionPlan("it was saved so", None)
    model.qops_fusion = replace_parts(model, linear, norm, checkpoint.kind, norms, plan, prove)
    embedding = input_table(model)
    tied, name, table = is_tied(model), "", None

    if embedding is not None:
        name = stored(f"{name_of(model, embedding)}.weight").removesuffix(".weight")
        table = fetch(name, embedding)
        if isinstance(table, torch.Tensor):
            replace_parameter(model, embedding.weight, table)
        else:
            tie(model, table, dtype)
    if output is not None and is_linear(output):
        # A tied table stands under the embedding's name, and with it what becomes of it.
        own_name = name_of(model, output)
        name = name if tied else own_name
        weight = table if tied and table is not None else fetch(name, output)
        bias = bias_of(output, stored(f"{own_name}.bias"))
        if not isinstance(weight, torch.Tensor):
            model.set_output_embeddings(linear_of(name, weight, bias, logits=True))
        else:
            output.weight = embedding.weight if embedding is not None and weight is table else frozen(weight)
            if bias is not None:
                output.bias = frozen(bias.to(dtype))

    routers = {name.rpartition(".")[0] for name in names_of_experts(model)}

    def dense(name: str) -> torch.Tensor:
        module = name.removesuffix(".weight")
        # Some producers quantise routers too, which are no linears in Transformers.
        if module != name and module.rpartition(".")[0] in routers and checkpoint.linear(module) is not None:
            weight: Any = checkpoint.weight(module)
            return weight.dequantize(_dtype_of(model, name, dtype))
        return _rounded(name, checkpoint.tensor(name), _dtype_of(model, name, dtype))

    _assign(model, dense)
    model = freeze(packed(model)).to(device)
    checkpoint.finish(model)
    if checkpoint.generation_config is not None:
        model.generation_config = checkpoint.generation_config
    return model


def expand_for(checkpoint: Checkpoint, model: Any, prove: bool) -> None:
    """Makes linears of a skeleton's experts, where a checkpoint has not the stacks of Transformers' own module."""
    expand_experts(model, prove, lambda experts: not checkpoint.holds(f"{experts}.gate_up_proj"))


def require_fit(checkpoint: Checkpoint, model: Any) -> None:
    """Raises where a parameter or buffer of a model is missing or has another shape, before any is read."""
    ties, wanted = model.all_tied_weights_keys, model.state_dict()
    missing = [name for name in wanted if not checkpoint.holds(name) and not checkpoint.holds(ties.get(name, name))]
    if missing:
        raise ValueError(f"{checkpoint.path}: tensor {missing[0]} is missing")
    for name, tensor in wanted.items():
        if checkpoint.holds(name) and (found := list(checkpoint.describe(name).shape)) != list(tensor.shape):
            raise ValueError(f"{checkpoint.path}: {name} must have shape {list(tensor.shape)}, got {found}")


def skeleton(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    """The model with its parameters on the meta device, to be replaced or assigned, and its buffers real."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype!r}")
    config = copy.deepcopy(config)
    config.dtype = dtype
    _building.skeleton = True
    try:
        return model_class(config)
    finally:
        _building.skeleton = False


_building = threading.local()


def _without_storage(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    if not getattr(_building, "skeleton", False):
        return None
    empty: Any = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    empty._is_hf_initialized = True  # else Transformers draws its numbers: on this device none, but in Python
    return empty


# Once, and for good: torch's hooks are those of the process, and one that comes or goes breaks the loop over them in
# every other thread that is registering a parameter.
_register: Any = nn.modules.module.register_module_parameter_registration_hook
_register(_without_storage)


def _tie_what_is_tied(model: Any, holds: Callable[[str], bool]) -> None:
    """Forgets the ties of which both sides are held, which is Transformers' own rule, and ties the others."""
    ties = model.all_tied_weights_keys
    for target in [target for target, source in ties.items() if holds(target) and holds(source)]:
        del ties[target]
    _share(model)


def _share(model: Any) -> None:
    """Ties parameters to their sources, where both are there."""
    for target, source in model.all_tied_weights_keys.items():
        parameter, (module_name, _, key) = parameter_of(model, source), target.rpartition(".")
        if parameter is not None and parameter_of(model, target) is not None:
            setattr(model.get_submodule(module_name), key, parameter)


def _rounded(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In a dtype; raises where a finite number would become infinite."""
    rounded = tensor.to(dtype if tensor.is_floating_point() else tensor.dtype)
    narrowed = dtype == torch.float16 and tensor.is_floating_point() and tensor.dtype != dtype
    if narrowed and tensor.numel() > 0 and not tensor.is_meta:
        largest = tensor.abs().max()
        if largest.isfinite() and largest > torch.finfo(dtype).max:
            raise ValueError(f"{name} must fit in float16, got {largest.item():g}: dtype=torch.bfloat16 holds it")
    return rounded


def _dtype_of(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """That of a dense tensor in a model of a dtype: some routers stay in float32, as in Transformers."""
    kept = model._keep_in_fp32_modules_strict or ()
    return torch.float32 if any(re.search(rf"(^|\.){part}($|\.)", name) for part in kept) else dtype


def _in_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy; integers keep their dtype."""
    return tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


def _assign(model: Any, tensor: Callable[[str], torch.Tensor]) -> None:
    """Gives every parameter without storage, and every persistent buffer, what ``tensor`` has under its name.

    Those that are tied to another one share its parameter.
    """
    made: tuple[str, ...] = ()
    for module_name, module in model.named_modules():
        if made and module_name.startswith(made):
            continue
        if isinstance(module, (QuantizedWeight, QuantizedLinear, MergedLinear)):
            made += (f"{module_name}.",)  # with all that they have
            continue
        wanted = {key: value for key, value in module._parameters.items() if value is not None and value.is_meta}
        for key, value in module._buffers.items():
            if value is not None and key not in module._non_persistent_buffers_set:
                wanted[key] = value
        for key, value in wanted.items():
            name = f"{module_name}.{key}".removeprefix(".")
            if name in model.all_tied_weights_keys:
                continue
            found = tensor(name)
            if found.shape != value.shape:
                raise ValueError(f"{name} must have shape {list(value.shape)}, got {list(found.shape)}")
            setattr(module, key, frozen(found) if key in module._parameters else found)
    _share(model)
