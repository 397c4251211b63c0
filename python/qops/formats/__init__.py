"""Readers of quantised checkpoints: one protocol, one door, and a module for each format, imported when asked for."""

import importlib
from typing import Any

from qops.formats.checkpoint import Checkpoint
from qops.formats.open import load_tokenizer, open_checkpoint, read_checkpoint

__all__ = ["Checkpoint", "load_tokenizer", "open_checkpoint", "read_checkpoint"]

_FORMATS = (
    "awq",
    "compressed_tensors",
    "gguf",
    "gptq",
    "hqq",
    "int8_rows",
    "modelopt",
    "pytorch",
    "quanto",
    "torchao",
)


def __getattr__(name: str) -> Any:
    if name in _FORMATS:
        return importlib.import_module(f"qops.formats.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
