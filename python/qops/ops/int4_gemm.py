"""int4_gemm: matrix product with group-quantised 4-bit weights (W4A16)."""

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
    check_epilogue,
    check_weight_only,
    derivatives_are_asked,
    fake,
    refuse_grad,
    refuse_mixed,
    require_weight,
)

if TYPE_CHECKING:
    from qops._check_cases import Run
    from qops.weights import Int4Weight


def int4_gemm(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    silu_mul: bool = False,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Multiplies activations with a 4-bit weight: ``y[m, n] = R(sum_k x[m, k] * w[n, k] + bias[n])``.

    The exact weight is, by ``weight.kind``, ``w = s * (q - 8)``, ``s * (q - z)`` with an integer or a float zero, or
    ``s * q + o``, with one scale ``s`` for each row and group of ``weight.group_size`` columns.

    At most one of ``residual``, ``silu_mul`` and ``out_scale`` asks for more, which is done while y is in registers:

        residual:   R(y + residual)
        silu_mul:   qops.silu_mul(y), for a weight of gate above up
        out_scale:  qops.quantize_int8_static(y, out_scale, out_zero_point)

    Args:
        x: float32, float16 or bfloat16 ``[..., K]``; any leading dimensions and strides, last dimension dense.
        weight: an :class:`qops.Int4Weight` ``[N, K]``, packed.
        bias: float32, float16 or bfloat16 ``[N]``, added in float32.
        residual: ``[..., N]`` in the dtype of ``x``; any strides, last dimension dense.
        silu_mul: True exactly where ``weight.mixed_gate_up`` is (:meth:`qops.Int4Weight.mix_gate_up`).
        out_scale: float32, one element, positive and finite.
        out_zero_point: int32, one element in -128 ... 127; default 0.
        batch_invariant: one canonical order of summation for every M. That is so but for bfloat16 and many rows on some
            GPUs (see below).
        out: the tensor to write to, contiguous, sharing no memory with the inputs, but it may be ``residual`` itself;
            default: a new one.

    Returns:
        ``[..., N]``, contiguous, in the dtype of ``x``; with ``silu_mul`` ``[..., N/2]``, with ``out_scale`` int8;
        ``out`` where it is given.

    Numerics:
        R() is one rounding to nearest even to the dtype of ``x``. On the CPU, activations are held per block of at most
        128 columns of a group as fixed-point integers and multiplied exactly with the integer codes; block sums are
        exact, then scaled and added in float32 in ascending k, in 8 contiguous slices of the blocks that are added left
        to right. A row has the same bits for every M, position, thread count and ISA level.
        With ``a_b = max|x|`` of a block, the fixed-point error of y[m, n] before R() is at most
        ``1.001 * 2^-16 sum_b a_b sum_{k in b} |w[n, k]|`` (two bytes a value), and
        ``2^-31 sum_b a_b sum_{k in b} |w[n, k]|`` for float32 and for rows whose outliers would make the first bound
        reach the rounding of the output (four bytes). NaN or infinity in a row makes all its outputs NaN.
        On a GPU (float16 and bfloat16), exact integers ``q - z`` (``q - 8`` but for integer zeros) multiply x on the
        tensor cores: steps of 16 columns, in ascending k, give a float32 ``part`` of each group. Then
        ``total = fma(s, part, total)``, and with float zeros or offsets
        ``total = fma(o', sum of x in the group, total)`` with ``o' = s * (8 - zf)`` or ``fma(s, 8, o)``. K is cut into
        8 contiguous slices of whole blocks of 64 columns, slice i from block ``blocks * i // 8`` on; a group that a cut
        divides has a part on either side. The totals of the slices are added left to right, then the bias. So on
        one type of GPU a row has the same bits for every M, position, grid and stream. An index of ``perm`` that is out
        of range gives NaN; NaN and infinity in x spread as in a product of matrices.
        One route rounds more, for bfloat16 x of many rows on GPUs of compute capability 9.x and 10.x, unless
        ``batch_invariant``: where ``plan_int4_gemm`` (csrc/cuda/int4_config.h) expects it to be faster, the exact
        weights are rounded to float32 and to bfloat16 (:func:`qops.int4_dequantize`) and cuBLAS multiplies them with x,
        into float32 sums. (float16 cannot hold every weight.)
        ``residual``, ``silu_mul`` and ``out_scale`` give, bit for bit, what the separate operators give: y is rounded
        to the dtype of ``x`` before each of them.

    Raises:
        ValueError: shapes or strides do not fit; ``silu_mul`` does not fit the weight; arguments that exclude each
            other; a ``perm`` index is out of range, ``out_scale`` not positive and finite, or ``out_zero_point``
            outside -128 ... 127 (on a GPU nobody looks at the three); ``out`` overlaps an input.
        RuntimeError: a dtype or device without a kernel; the weight is not packed; an input requires grad while grad
            mode is on.

    Source:
        Weight formats of GPTQ, AWQ, compressed-tensors, HQQ and GGUF; fixed-point activations are this library's own.

    Example:
        >>> w = qops.Int4Weight.quantize(torch.eye(16), group_size=16)
        >>> y = qops.int4_gemm(torch.arange(16.0)[None], w)
        >>> y.shape
        torch.Size([1, 16])
    """
    if derivatives_are_asked():
        refuse_grad("int4_gemm", x=x, bias=bias, residual=residual, out_scale=out_scale, out=out)
    require_weight("int4_gemm", weight, "Int4Weight")
    weight._require_packed()
    if silu_mul != weight.mixed_gate_up:
        refuse_mixed("int4_gemm", silu_mul)
    # Module.__getattr__ would take 0.6 us for each of them, as much as half the operator's own overhead.
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
        KINDS.index(weight.kind),
        batch_invariant,
    )
    op = torch.ops.qops.int4_gemm
    if silu_mul or residual is not None or out_scale is not None or out_zero_point is not None:
        args += (residual, silu_mul, out_scale, out_zero_point)
        if out is None:
            return op.fused(*args)
        op.fused_out(*args, out=out)
    else:
        if out is None:
            return op.default(*args)
        op.out(*args, out=out)
    return out


def int4_gemm_ref(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    silu_mul: bool = False,
) -> Tensor:
    """The formula of :func:`int4_gemm` in float64 over the same quantised weights, nothing rounded; float64."""
    y = x.double() @ weight.dequantize(torch.float64).T
    y = y if bias is None else y + bias.double()
    if silu_mul:
        gate, up = y.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    return y if residual is None else y + residual.double()


def cases_of_int4_gemm(run: Run) -> None:
    from qops._check_cases import ROWS, epilogues, int4_cases, moved
    from qops._numerics import FLOAT_DTYPES, weight_only_bound

    for w, dtype, index in int4_cases(run):
        n, k = w.out_features, w.in_features
        x = run.random(ROWS[-1], k, dtype=dtype)
        bias = run.random(n, dtype=FLOAT_DTYPES[index % 3], outliers=False) if index % 2 else None
        # On a GPU another route may be taken for many rows.
        there, more = moved(run, w), {"bias": run.there(bias), "batch_invariant": run.gpu}
        product = partial(int4_gemm, weight=there, **more)
        (y,) = run.rows(product, x)
        ref = int4_gemm_ref(x, w, bias)
        run.within(y, ref, weight_only_bound(x, w, bias, gpu=run.gpu))
        if run.gpu:
            bound = weight_only_bound(x, w, bias, gpu=True, rounded_to=dtype)
            for m in ROWS:
                run.within(product(run.there(x[:m]), batch_invariant=False), ref[:m], bound[:m])
        mixed = partial(product, weight=moved(run, w, mixed=True)) if n % 16 == 0 else None
        epilogues(run, product, mixed, y, x)


@fake("int4_gemm")
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
    kind: int,
    batch_invariant: bool = False,
    residual: Tensor | None = None,
    silu_mul: bool = False,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out: Tensor | None = None,
) -> Results:
    check_weight_only(check, x, packed, scales, zeros, perm, bias, out_features, group_size, kind, bits=4)
    y = check_epilogue(check, x, out_features, x.dtype, residual, silu_mul, out_scale, out_zero_point)
    return check.results(x, Result("out", out, *y))
