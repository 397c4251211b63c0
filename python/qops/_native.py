"""Loads the native module and tells what it is."""

from __future__ import annotations

import importlib
import importlib.util
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

_C_cuda: Any = None
# A torch without CUDA can neither load the module nor hold a tensor for it.
if torch.version.cuda is not None and importlib.util.find_spec("qops._C_cuda") is not None:
    try:
        _C_cuda = importlib.import_module("qops._C_cuda")
    except ImportError as error:
        raise ImportError(
            f"qops: the CUDA kernels qops._C_cuda do not load with torch {torch.__version__} ({error}). Reinstall qops "
            "from source in this environment: `pip install --force-reinstall --no-deps .`, or so with QOPS_CUDA=OFF"
        ) from error


def build_info() -> dict[str, Any]:
    """What this installation is: versions, compiler, ISA levels, devices.

    Returns:
        A flat dictionary of strings, booleans and integers: ``version``, ``torch`` (running) and ``built_with_torch``,
        ``compiler``, ``isa`` (level in use), ``isa_available`` (levels this build holds and this CPU runs),
        ``cuda`` (whether CUDA kernels are loaded: this build has them, and torch is one with CUDA), ``cuda_archs``
        (GPU architectures they are built for, as CMake spells them: ``80-real`` is machine code for sm_80,
        ``90-virtual`` PTX) and ``nvcc`` (its version), both empty without; ``threads``.
    """
    native = _C.build_info()
    cuda = _C_cuda.build_info() if _C_cuda else {"archs": "", "nvcc": ""}
    return {
        "version": native["version"],
        "torch": torch.__version__,
        "built_with_torch": native["built_with_torch"],
        "compiler": native["compiler"],
        "isa": native["isa"],
        "isa_available": native["isa_available"],
        "cuda": _C_cuda is not None,
        "cuda_archs": cuda["archs"],
        "nvcc": cuda["nvcc"],
        "threads": torch.get_num_threads(),
    }
