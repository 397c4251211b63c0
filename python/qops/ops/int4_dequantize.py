"""int4_dequantize: the weights of int4_gemm as numbers."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qops import _native as _native
from qops.ops._checks import (
    FLOAT_DTYPES,
    INT4_KINDS,
    Checker,
    Results,
    check_packed_weight,
    check_zeros,
    fake,
    require_weight,
)

if TYPE_CHECKING:
    from qops._check_cases import Run
    from qops.weights import Int4Weight


def int4_dequantize(weight: Int4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights as a dense matrix: what a product so large that it pays uses instead of :func:`int4_gemm`.

    Args:
        weight: an :class:`qops.Int4Weight` ``[N, K]``, packed.
        dtype: float32, float16 or bfloat16.

    Returns:
        ``[N, K]``, contiguous, rows and columns in the order of w.

    Numerics:
        The exact weight (see :func:`int4_gemm`) is rounded once to float32, and once more where another dtype is asked
        for: bit for bit :meth:`qops.Int4Weight.dequantize`. For kind ``"float_zero"`` the difference ``q - z`` is
        rounded to float32 before the product, too. The same bits on every device, for every thread count and ISA level.

    Raises:
        RuntimeError: a dtype or device without a kernel; the weight is not packed.
        TypeError: ``weight`` is no :class:`qops.Int4Weight`.

    Source:
        Weight formats of GPTQ, AWQ, compressed-tensors, HQQ and GGUF.

    Example:
        >>> w = qops.Int4Weight.quantize(torch.eye(16), group_size=16)
        >>> qops.int4_dequantize(w, torch.bfloat16).shape
        torch.Size([16, 16])
    """
    require_weight("int4_dequantize", weight, "Int4Weight")
    weight._require_packed()
    buffers = weight._buffers
    stored = torch.ops.qops.int4_dequantize.default(
        buffers["packed"],
        buffers["scales"],
        buffers["zeros"],
        weight.out_features,
        weight.group_size,
        INT4_KINDS.index(weight.kind),
        dtype,
        weight.mixed_gate_up,
    )
    perm = buffers["perm"]
    # Columns in the order of w cost another pass over them, which a caller who gathers x instead can do without.
    return stored if perm is None else torch.empty_like(stored).index_copy_(1, perm.long(), stored)


def int4_dequantize_ref(weight: Int4Weight) -> Tensor:
    """The exact weights of :func:`int4_dequantize` in float64, rounded to float32; float64 ``[N, K]``."""
    return weight.dequantize(torch.float64)


def cases_of_int4_dequantize(run: Run) -> None:
    from qops._check_cases import WEIGHTS, int4_weight, moved

    for index, ((n, k, g), kind, dtype) in enumerate(itertools.product(WEIGHTS, INT4_KINDS, FLOAT_DTYPES)):
        run.begin(dtype, f"N = {n}, K = {k}, G = {g}", kind)
        w = int4_weight(run, n, k, g, kind, FLOAT_DTYPES[index // 2 % 3], act_order=index % 5 == 0)
        dense = int4_dequantize(moved(run, w), dtype)
        run.keep(dense)
        run.same(dense, w.dequantize(dtype), "Int4Weight.dequantize")
        if n % 16 == 0:
            run.same(int4_dequantize(moved(run, w, mixed=True), dtype), dense, "gate and up mixed")


@fake("int4_dequantize")
def _(
    check: Checker,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    out_features: int,
    group_size: int,
    kind: int,
    dtype: torch.dtype,
    mixed_gate_up: bool = False,
) -> Results:
    check.supported(
        dtype in FLOAT_DTYPES, "dtype", "be float32, float16 or bfloat16", str(dtype).removeprefix("torch.")
    )
    k = check_packed_weight(check, packed, scales, out_features, group_size, bits=4)
    check_zeros(check, kind, zeros, scales)
    requirement = "be a multiple of 16, for gate and up, with mixed_gate_up"
    check.require(not mixed_gate_up or out_features % 16 == 0, "out_features", requirement, lambda: str(out_features))
    return check.new_empty(packed, (out_features, k), dtype)
