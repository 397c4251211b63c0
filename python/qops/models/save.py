"""Models to disk, in qops' own format or, for other libraries, as compressed-tensors."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qops.formats.folder import FORMAT_VERSION, QUANT_METHOD, replace_files, tensors_of, write_tensors
from qops.formats.folders.compressed import compressed, settings_of
from qops.formats.folders.config import transformers_class
from qops.models.load import require_restorable, skeleton
from qops.models.replacement import changed, entries, is_fused, kind_of, require_replaced
from qops.nn import MLP, QuantizedLinear
from qops.nn.experts import expand_experts, names_of_experts
from qops.weights.state import QuantizedWeight

__all__ = ["save_model"]

_CALLER = "qops.save_model"


def save_model(
    model: Any, folder: str | os.PathLike[str], *, format: str = QUANT_METHOD, max_shard_size: int | str = "50GB"
) -> None:
    """Writes a model so that :func:`qops.load_model` reads it back.

    The folder gets `config.json`, `generation_config.json` and `model.safetensors`, or shards of it. The tokenizer is
    the caller's: `tokenizer.save_pretrained(folder)` into the same folder.

    Formats:

    * `"qops"` holds every model, bit for bit. `model.save_pretrained(folder)` writes it too, and Transformers'
      `from_pretrained(folder)` reads it once `qops.integrations.transformers` is imported. Without that it stops.
    * `"compressed-tensors"` is read by vLLM and Transformers. It holds 4-bit weights that are symmetric or have integer
      zero points, and 8-bit weights, with their scales as they are. How 8-bit activations are rounded it does not say:
      their scale is max|x| / 127 in vLLM and by :class:`qops.Int8`, max|x| / 127.5 in the format's own package and
      where :func:`qops.load_model` reads the folder. A reader that keeps scales in the dtype of the model rounds those
      of another one: those of 8-bit weights are float32 by :func:`qops.quantize_model`.

    Args:
        model: made by :func:`qops.load_model` or :func:`qops.quantize_model`; it stays as it is.
        folder: created where it is missing; its files of these names are replaced.
        format: `"qops"` or `"compressed-tensors"`.
        max_shard_size: of a file, in bytes or as in "5GB".

    Raises:
        ImportError: Transformers >= 5.17 or safetensors is missing.
        ValueError: the model has no qops parts; its class, or that of a part, is not one of Transformers' or torch's
            own; its parameters are not those that its config describes; the format does not hold a weight exactly.
            Nothing is written then.
    """
    require_replaced(model, _CALLER)
    _require_size(max_shard_size)
    if format not in _FORMATS:
        raise ValueError(f"{_CALLER}: format must be one of {', '.join(_FORMATS)}, got {format!r}")
    if transformers_class(type(model).__name__) is not type(model):
        raise ValueError(f"{_CALLER}: model must be of a class of transformers, got {type(model)}")
    held = list(entries(model))
    twin = skeleton(type(model), model.config, model.dtype)
    expand_experts(twin, prove=False, only=names_of_experts(model).__contains__)
    require_restorable(_CALLER, model, twin, {name for name, _, _ in held})
    tensors = {name: value for name, value, _ in held if isinstance(value, torch.Tensor)}
    weights = {name: (value, owner) for name, value, owner in held if not isinstance(value, torch.Tensor)}
    more, settings = _FORMATS[format](model, twin, weights)
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype
    config.architectures = [type(model).__name__]
    config.quantization_config = settings
    generation_config = getattr(model, "generation_config", None)

    def write(into: Path) -> None:
        config.save_pretrained(into)
        if generation_config is not None:
            generation_config.save_pretrained(into)
        write_tensors(tensors | more, into, max_shard_size)

    replace_files(Path(folder), write)


Weights = Mapping[str, tuple[Any, Any]]
"""Quantised weights and the modules that they are of, by the names of parameters."""


def _qops(model: Any, twin: Any, weights: Weights) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and settings of a folder."""
    tensors: dict[str, torch.Tensor] = {}
    for name, (weight, owner) in weights.items():
        tensors |= tensors_of(name, weight)
        if isinstance(owner, QuantizedLinear):
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{key}": tensor for key, tensor in owner.activations().items()}
    why = changed(model)
    if why is None and any(isinstance(module, MLP) and module.reordered for module in model.modules()):
        why = "gate and up were saved in the act-order of down"
    return tensors, {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "fused": is_fused(model),
        "weights": {name.removesuffix(".weight"): kind_of(owner) for name, (_, owner) in weights.items()},
        "cast": _cast_buffers(model),
        **({} if why is None else {"changed": why}),
    }


def _compressed(model: Any, twin: Any, weights: Weights) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The same of compressed-tensors."""
    tensors: dict[str, torch.Tensor] = {}
    schemes: dict[str, Any] = {}
    if not weights:
        raise ValueError(f"{_CALLER}: model must have quantised linears for compressed-tensors, got none")
    linears = {name for name, part in twin.named_modules() if isinstance(part, nn.Linear)}
    for name, (_, owner) in weights.items():
        module = name.removesuffix(".weight")
        try:
            if module not in linears:
                raise ValueError("compressed-tensors holds no quantised tables of embeddings")
            found, schemes[module] = compressed(owner)
        except ValueError as error:
            raise ValueError(f'{_CALLER}: {module}: {error}; format="qops" holds it') from error
        tensors |= {f"{module}.{key}": tensor for key, tensor in found.items()}
    return tensors, settings_of(schemes, linears - schemes.keys())


_FORMATS = {QUANT_METHOD: _qops, "compressed-tensors": _compressed}


def _require_size(size: Any) -> None:
    in_bytes = isinstance(size, int) and not isinstance(size, bool) and size > 0
    if not in_bytes and not (isinstance(size, str) and re.fullmatch(r"[1-9]\d*[KMGT]B", size)):
        raise ValueError(f'{_CALLER}: max_shard_size must be bytes, or a string such as "5GB", got {size!r}')


def _cast_buffers(model: nn.Module) -> dict[str, str]:
    """The dtype of each buffer that is no part of the state and was cast with the model, as rotary frequencies are."""
    return {
        f"{name}.{key}".lstrip("."): str(buffer.dtype).removeprefix("torch.")
        for name, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if key in module._non_persistent_buffers_set
        and buffer is not None
        and buffer.dtype in (torch.bfloat16, torch.float16)
        and buffer.numel() > 0
        and not isinstance(module, QuantizedWeight)
    }
