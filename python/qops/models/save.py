"""Models to disk: whole, in qops' own format, or as compressed-tensors for other libraries."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qops.formats.folder import FORMAT_VERSION, QUANT_METHOD, replace_files, tensors_of, write_tensors
from qops.formats.folders.config import transformers_class
from qops.models.load import require_restorable, skeleton
from qops.models.replacement import entries, is_fused, kind_of, require_replaced
from qops.nn import QuantizedLinear
from qops.weights.state import QuantizedWeight

__all__ = ["save_model"]

_CALLER = "qops.save_model"


def save_model(model: Any, folder: str | os.PathLike[str], *, max_shard_size: int | str = "50GB") -> None:
    """Writes a model so that :func:`qops.load_model` reads it back bit for bit.

    So does `model.save_pretrained(folder)`; and Transformers' `from_pretrained(folder)` reads it back once
    `qops.integrations.transformers` is imported. Without that it stops. The folder gets `config.json`,
    `generation_config.json` and `model.safetensors`, or shards of it. The tokenizer is the caller's:
    `tokenizer.save_pretrained(folder)` into the same folder.

    Args:
        model: made by :func:`qops.load_model` or :func:`qops.quantize_model`; it stays as it is.
        folder: created where it is missing; its files of these names are replaced.
        max_shard_size: of a file, in bytes or as in "5GB".

    Raises:
        ImportError: Transformers >= 5.17 or safetensors is missing.
        ValueError: the model has no qops parts; its class, or that of a part, is not one of Transformers' or torch's
            own; its parameters are not those that its config describes.
    """
    require_replaced(model, _CALLER)
    _require_size(max_shard_size)
    if transformers_class(type(model).__name__) is not type(model):
        raise ValueError(f"{_CALLER}: model must be of a class of transformers, got {type(model)}")
    held = list(entries(model))
    twin = skeleton(type(model), model.config, model.dtype)
    require_restorable(_CALLER, model, twin, {name for name, _, _ in held})
    tensors: dict[str, torch.Tensor] = {}
    kinds: dict[str, str] = {}
    for name, value, owner in held:
        if isinstance(value, torch.Tensor):
            tensors[name] = value
            continue
        module = name.removesuffix(".weight")
        kinds[module] = kind_of(owner)
        tensors |= tensors_of(name, value)
        if isinstance(owner, QuantizedLinear):
            tensors |= {f"{module}.{key}": tensor for key, tensor in owner.activations().items()}
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype
    config.architectures = [type(model).__name__]
    config.quantization_config = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "fused": is_fused(model),
        "weights": kinds,
        "cast": _cast_buffers(model),
    }
    generation_config = getattr(model, "generation_config", None)

    def write(into: Path) -> None:
        config.save_pretrained(into)
        if generation_config is not None:
            generation_config.save_pretrained(into)
        write_tensors(tensors, into, max_shard_size)

    replace_files(Path(folder), write)


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
