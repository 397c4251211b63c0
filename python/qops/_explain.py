"""Which kernel, tile, split and route a call takes: asked by shapes, without a call."""

from __future__ import annotations

import torch

from qops import _native


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
            ``m, n, k, group_size, dtype``; ``int8_gemm``: ``m, n, k, out_dtype``; ``int4_dequantize``:
            ``n, k, group_size, dtype``; the quantisers: ``rows, k, dtype``; the norms: ``rows, h, dtype``;
            ``silu_mul`` and ``silu_mul_int8``: ``rows, columns, dtype``; ``rotary`` and ``qk_norm_rotary``:
            ``tokens, q_heads, k_heads, d, pairs, dtype``.
            Besides, where there is one: ``kind=`` of the weight ("symmetric", "zero_point", "float_zero", "offset"),
            ``epilogue=`` ("none", "silu_mul", "int8"), and whether there are ``perm``, ``zero_point``,
            ``batch_invariant``, ``interleaved``.

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
        return _native._C.explain(op, lines)
    if _native._C_cuda is None:
        raise RuntimeError(f"qops.explain: device must be cpu, as {_native._cuda_missing}, got {place}")
    with torch.cuda.device(place):
        return _native._C_cuda.explain(op, lines)
