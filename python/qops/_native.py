"""Loads the native module and tells what it is."""

from __future__ import annotations

import importlib
from typing import Any

import torch

try:
    _C: Any = importlib.import_module("qops._C")
except ImportError as error:
    raise ImportError(
        f"qops: the native module qops._C does not load with torch {torch.__version__} ({error}). "
        "Reinstall qops from source in this environment: `pip install --force-reinstall --no-deps .`"
    ) from error

if _C.build_info()["isa_error"]:
    raise ImportError(f"qops: {_C.build_info()['isa_error']}")


def build_info() -> dict[str, Any]:
    """What this installation is: versions, compiler, ISA levels, devices.

    Returns:
        A flat dictionary of strings and booleans: ``version``, ``torch`` (running) and ``built_with_torch``,
        ``compiler``, ``isa`` (level in use), ``isa_available`` (levels this build holds and this CPU runs),
        ``cuda`` (whether CUDA kernels are part of this build), ``threads``.
    """
    native = _C.build_info()
    return {
        "version": native["version"],
        "torch": torch.__version__,
        "built_with_torch": native["built_with_torch"],
        "compiler": native["compiler"],
        "isa": native["isa"],
        "isa_available": native["isa_available"],
        "cuda": False,
        "threads": torch.get_num_threads(),
    }
