"""int8_weight_only_gemm: matrix product with group-quantised 8-bit weights and floating-point activations (W8A16)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qops import _native as _native
from qops.ops._checks import INT4_KINDS as KINDS
from qops.ops._checks import (
    Checker,
    Result,
    Results,
    check_weight_only,
    derivatives_are_asked,
    fake,
    refuse_grad,
    require_weight,
)

if TYPE_CHECKING:
    from qops._check_cases import Run
    from qops.weights import Int8Weight


def int8_weight_only_gemm(
    x: Tensor, weight: Int8Weight, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Multiplies activations with an 8-bit weight: ``y[m, n] = R(sum_k x[m, k] * w[n, k] + bias[n])``.

    The exact weight is, by ``weight.kind``, ``w = s * q`` or ``s * q + o``, with one scale ``s`` and offset ``o`` for
    each row and group of ``weight.group_size`` columns (32 for GGUF's Q8_0 and Q5_1).

    Args:
        x: float32, float16 or bfloat16 ``[..., K]``; any leading dimensions and strides, last dimension dense.
        weight: an :class:`qops.Int8Weight` ``[N, K]``, packed.
        bias: float32, float16 or bfloat16 ``[N]``, added in float32.
        out: the tensor to write to, contiguous, sharing no memory with the inputs; default: a new one.

    Returns:
        ``y [..., N]``, contiguous, in the dtype of ``x``; ``out`` where it is given.

    Numerics:
        As :func:`qops.int4_gemm`. On a CPU exact integer products of fixed-point activations with the codes, float32
        over blocks in a fixed order, one rounding; the same error bounds, the same bits for every M, thread count and
        ISA level. An offset adds ``o`` times the sum of a block's activations after that block's products.
        On a GPU exact codes q multiply x on the tensor cores, in the order of :func:`qops.int4_gemm` but for the 16
        columns of a step, which are added as one instruction adds them; ``total = fma(s, part, total)`` and with
        offsets ``total = fma(o, sum of x in the group, total)``. No route rounds a weight, so on one type of GPU a row
        has the same bits for every M. An index of ``perm`` that is out of range gives NaN.

    Raises:
        ValueError: shapes or strides do not fit; the weight mixes gate and up; a ``perm`` index is out of range (on a
            GPU nobody looks at it); ``out`` overlaps an input.
        RuntimeError: a dtype or device without a kernel; the weight is not packed; an input requires grad while grad
            mode is on.

    Source:
        The Q8_0 and Q5_1 formats of GGUF; 8-bit GPTQ; per-channel int8 weights of compressed-tensors.

    Example:
        >>> w = qops.Int8Weight.quantize(torch.eye(16))
        >>> qops.int8_weight_only_gemm(torch.ones(1, 16), w)[0, :4]
        tensor([1., 1., 1., 1.])
    """
    if derivatives_are_asked():
        refuse_grad("int8_weight_only_gemm", x=x, bias=bias, out=out)
    require_weight("int8_weight_only_gemm", weight, "Int8Weight")
    weight._require_packed()
    if weight.mixed_gate_up:
        raise ValueError("qops.int8_weight_only_gemm: weight must have mixed_gate_up = False, got True")
    # Module.__getattr__ would take 0.6 us for each of them.
    buffers = weight._buffers
    args = (
        x,
        buffers["packed"],
        buffers["scales"],
        buffers["zeros"],
        buffers["perm"],
        bias,
        weight.out_features,
        weight.group_size,
    )
    if out is None:
        return torch.ops.qops.int8_weight_only_gemm.default(*args)
    torch.ops.qops.int8_weight_only_gemm.out(*args, out=out)
    return out


def int8_weight_only_gemm_ref(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """The formula of :func:`int8_weight_only_gemm` in float64, not rounded; float64 ``[..., N]``."""
    y = x.double() @ weight.dequantize(torch.float64).T
    return y if bias is None else y + bias.double()


def cases_of_int8_weight_only_gemm(run: Run) -> None:
    from qops._check_cases import ROWS, int8_cases, moved
    from qops._numerics import FLOAT_DTYPES, weight_only_bound

    for w, dtype, index in int8_cases(run):
        bias = run.random(w.out_features, dtype=FLOAT_DTYPES[index % 3], outliers=False) if index % 2 else None
        x = run.random(ROWS[-1], w.in_features, dtype=dtype)
        (y,) = run.rows(partial(int8_weight_only_gemm, weight=moved(run, w), bias=run.there(bias)), x)
        run.within(y, int8_weight_only_gemm_ref(x, w, bias), weight_only_bound(x, w, bias, gpu=run.gpu))


@fake("int8_weight_only_gemm")
def _(
    check: Checker,
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    out: Tensor | None = None,
) -> Results:
    kind = KINDS.index("symmetric" if zeros is None else "offset")
    check_weight_only(check, x, packed, scales, zeros, perm, bias, out_features, group_size, kind, bits=8)
    return check.results(x, Result("out", out, "[..., N]", (*x.shape[:-1], out_features), x.dtype))
