"""Loads the native module, and tells what it is and how it would compute a call."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NoReturn

import torch

try:
    _C: Any = importlib.import_module("qops._C")
except ImportError as error:
    raise ImportError(
        f"qops: the native module qops._C does not load with torch {torch.__version__} ({error}). "
        "Reinstall qops from source in this environment: `pip install --force-reinstall --no-deps .`"
    ) from error

for _error in ("isa_error", "log_error"):
    if _C.build_info()[_error]:
        raise ImportError(f"qops: {_C.build_info()[_error]}")

_C_cuda: Any = None
# Why it is not there; half a sentence.
_cuda_missing = ""
# A torch without CUDA can neither load the module nor hold a tensor for it.
if torch.version.cuda is None:
    _cuda_missing = f"torch {torch.__version__} is one without CUDA"
elif importlib.util.find_spec("qops._C_cuda") is None:
    _cuda_missing = _C.build_info()["cuda_missing"] or "its file is missing beside qops._C"
else:
    try:
        _C_cuda = importlib.import_module("qops._C_cuda")
    except ImportError as error:
        raise ImportError(
            f"qops: the CUDA kernels qops._C_cuda do not load with torch {torch.__version__} ({error}). Reinstall qops "
            "from source in this environment: `pip install --force-reinstall --no-deps .`, or so with QOPS_CUDA=OFF"
        ) from error


WITHOUT_CUDA_KERNEL = (
    *("attention_block", "decode_attention", "decoder_layers", "decoder_plan", "int8_embedding"),
    "mlp_block",
)
"""The operators that qops has no CUDA kernel of, in any build."""


def _refuse_cuda(overload: str) -> Callable[..., NoReturn]:
    """The kernel on a GPU of an operator that has none here."""
    why = "has no CUDA kernel of this operator"
    if _C_cuda is None:
        why = (
            f"has no CUDA kernels here ({_cuda_missing}; from its source, "
            "`QOPS_CUDA=ON pip install --force-reinstall --no-deps .` builds them or says what is missing)"
        )

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        name, _, variant = overload.removeprefix("qops::").partition(".")
        schema = getattr(getattr(torch.ops.qops, name), variant or "default")._schema
        given = {**dict(zip((argument.name for argument in schema.arguments), args, strict=False)), **kwargs}
        items = ((arg, t) for arg, value in given.items() for t in (value if isinstance(value, list) else [value]))
        # torch calls a GPU of a ROCm torch cuda too.
        arg, device = next((arg, t.device) for arg, t in items if isinstance(t, torch.Tensor) and t.is_cuda)
        raise RuntimeError(f"qops.{name}: {arg} must be on a CPU, as qops {why}, got {device}")

    return refuse


# torch would say "Could not run" and list its backends. The library lives as long as its kernels are to.
_refusals = torch.library.Library("qops", "IMPL")
without_cuda = frozenset(
    name
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("qops::") and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
)
for _overload in without_cuda:
    _refusals.impl(_overload, _refuse_cuda(_overload), "CUDA")


def build_info() -> dict[str, Any]:
    """What this installation is: versions, compiler, ISA levels, devices.

    Returns:
        A flat dictionary of strings, booleans and integers: ``version``, ``torch`` (running) and ``built_with_torch``,
        ``compiler``, ``isa`` (level in use), ``isa_available`` (levels this build holds and this CPU runs),
        ``cuda`` (whether CUDA kernels are loaded: this build has them, and torch is one with CUDA), ``cuda_reason``
        (why they are not, or which of the architectures that were asked for they were not built for and why, or
        empty), ``cuda_archs`` (GPU architectures they are built for, as CMake spells them: ``80-real`` is machine code
        for sm_80, ``100-virtual`` PTX) and ``nvcc`` (its version), both empty without; ``threads``.
    """
    native = _C.build_info()
    cuda = _C_cuda.build_info() if _C_cuda else {"archs": "", "nvcc": "", "left_out": _cuda_missing}
    return {
        "version": native["version"],
        "torch": torch.__version__,
        "built_with_torch": native["built_with_torch"],
        "compiler": native["compiler"],
        "isa": native["isa"],
        "isa_available": native["isa_available"],
        "cuda": _C_cuda is not None,
        "cuda_reason": cuda["left_out"],
        "cuda_archs": cuda["archs"],
        "nvcc": cuda["nvcc"],
        "threads": torch.get_num_threads(),
    }


def explain(op: str, *, device: torch.device | str, **problem: int | str | bool | torch.dtype) -> str:
    """Says in one line how a call of an operator would be computed. No kernel runs, and no tensor is made.

    The line comes from the function by which the kernel chooses. What the choice depends on stands left of the arrow,
    as it does with ``QOPS_LOG=plan``, which writes the line of every call to stderr, each once. On a CPU follow the
    kernel, the rows and strips (16 rows of the weight) of its tile, tasks, the least tasks that a thread takes
    (``grain``) and the most threads; on a GPU the route, the tile, blocks of threads and bytes of scratch.

    Tensors are taken as contiguous and aligned to 16 bytes. Names and values are for reading: they change with the
    kernels.

    Args:
        op: name of the operator, such as ``"int4_gemm"``.
        device: where it would run: ``"cpu"``, or a GPU of this machine.
        **problem: what the plan depends on. ``int4_gemm`` and ``int8_weight_only_gemm``:
            ``m, n, k, group_size, dtype``; ``int4_int8_gemm``: ``m, n, k, group_size, out_dtype``; ``int8_gemm``:
            ``m, n, k, out_dtype``; ``int4_dequantize``: ``n, k, group_size, dtype``; the quantisers:
            ``rows, k, dtype``; the norms: ``rows, h, dtype``; ``silu_mul`` and ``silu_mul_int8``:
            ``rows, columns, dtype``; ``rotary`` and ``qk_norm_rotary``:
            ``tokens, q_heads, k_heads, d, pairs, dtype``; ``decode_attention``:
            ``batch, t, q_heads, kv_heads, s, d, dtype``; ``attention_block``:
            ``rows, h, q_heads, kv_heads, d, dtype``; ``mlp_block``: ``rows, h, columns, dtype``;
            ``decoder_layers``, which fused models call: ``layers``, and those of both.
            Besides, where there is one: ``kind=`` of the weight ("symmetric", "zero_point", "float_zero", "offset"),
            ``epilogue=`` ("none", "silu_mul", "int8"), and whether there are ``perm``, ``zeros``,
            ``zero_point``, ``batch_invariant``, ``interleaved``, weights ``*_has_8_bits`` and their ``*_input`` ("127",
            "255", ...).

    Returns:
        The line.

    Raises:
        ValueError: there is no such operator, or an argument is missing, unknown, or has no such value.
        RuntimeError: the operator has no kernel there.

    Example:
        >>> line = qops.explain("rms_norm", rows=8, h=4096, dtype=torch.bfloat16, device="cpu")
        >>> line[line.index("rows") :]  # doctest: +ELLIPSIS
        'rows=8 h=4096 dtype=bfloat16 -> tasks=8 grain=4 threads=...'
    """
    place = torch.device(device)
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"qops.explain: device must be a CPU or a GPU, got {place}")
    lines = "\n".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in problem.items())
    if place.type == "cpu":
        return _C.explain(op, lines)
    if _C_cuda is None:
        raise RuntimeError(f"qops.explain: device must be cpu, as {_cuda_missing}, got {place}")
    with torch.cuda.device(place):
        return _C_cuda.explain(op, lines)
