"""int8_gemm: matrix product of 8-bit activations with 8-bit weights (W8A8)."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qops import _native as _native
from qops._layout import MAX_INT8_K as MAX_K
from qops._layout import MAX_INT8_K_WITH_ZERO_POINT as MAX_K_WITH_ZERO_POINT
from qops._layout import column_step, stored_columns, strips_of
from qops.ops._checks import (
    Checker,
    Result,
    Results,
    check_epilogue,
    derivatives_are_asked,
    fake,
    refuse_grad,
    refuse_mixed,
    require_weight,
)

if TYPE_CHECKING:
    from qops._check_cases import Run
    from qops.weights import Int8Weight

OUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int32)


def int8_gemm(
    q: Tensor,
    scale: Tensor,
    weight: Int8Weight,
    bias: Tensor | None = None,
    *,
    zero_point: Tensor | None = None,
    residual: Tensor | None = None,
    silu_mul: bool = False,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """Multiplies 8-bit activations with an 8-bit weight.

    ``acc[m, n] = sum_k (q[m, k] - zero_point[m]) * w[n, k]`` in integers, then
    ``y[m, n] = R(acc[m, n] * s_w[n] * scale[m] + bias[n])``, with ``w`` the codes and ``s_w`` the scales of ``weight``.

    At most one of ``residual``, ``silu_mul`` and ``out_scale`` asks for more, which is done while y is in registers:

        residual:   R(y + residual)
        silu_mul:   qops.silu_mul(y), for a weight of gate above up
        out_scale:  qops.quantize_int8_static(y, out_scale, out_zero_point)

    Args:
        q: int8 ``[..., K]``; any leading dimensions and strides, last dimension dense. K is at most 131071, with zero
            points 65793.
        scale: float32 ``[...]``, one per token, any strides; or ``[]``, one for all.
        weight: a symmetric :class:`qops.Int8Weight` ``[N, K]``, packed, no ``perm``, one scale per row (one for
            the whole weight is repeated in each row).
        bias: float32, float16 or bfloat16 ``[N]``.
        zero_point: int32 ``[...]`` or ``[]``, the code of zero, for asymmetric activations.
        residual: ``[..., N]`` in ``out_dtype``; any strides, last dimension dense.
        silu_mul: True exactly where ``weight.mixed_gate_up`` is (:meth:`qops.Int8Weight.mix_gate_up`).
        out_scale: float32, one element, positive and finite.
        out_zero_point: int32, one element in -128 ... 127; default 0.
        out_dtype: of y: bfloat16, float16 or float32; or int32 for ``acc`` itself, which takes no bias and uses no
            scale, and of which nothing more can be asked.
        out: the tensor to write to, contiguous, sharing no memory with the inputs, but it may be ``residual`` itself;
            its dtype takes the place of ``out_dtype``, but with ``out_scale``. Default: a new one.

    Returns:
        ``y [..., N]``, contiguous, in ``out_dtype``; with ``silu_mul`` ``[..., N/2]``, with ``out_scale`` int8; ``out``
        where it is given.

    Numerics:
        ``acc`` is exact: within the bounds of K it fits int32, whatever the codes are, as long as zero points lie in
        -128 ... 127; beyond, it wraps around modulo 2^32. Then, each step rounded once to float32,
        ``t = float(acc) * s_w[n]`` and ``y = R(fma(scale[m], t, bias[n]))``, without a bias ``y = R(scale[m] * t)``;
        R() is one rounding to nearest even to ``out_dtype``. The same bits for every M, position, thread count, ISA
        level and GPU. A NaN scale makes its row NaN. Where K = 0, ``t`` is 0. ``residual``, ``silu_mul`` and
        ``out_scale`` give, bit for bit, what the separate operators give: y is rounded to ``out_dtype`` before each of
        them.

    Raises:
        ValueError: shapes or strides do not fit; K above its bound; the weight has groups, offsets or a ``perm``; a
            bias, or more, with int32 output; ``silu_mul`` does not fit the weight; arguments that exclude each other;
            ``out_scale`` is not positive and finite, or ``out_zero_point`` outside -128 ... 127 (on a GPU nobody looks
            at the two); ``out`` overlaps an input.
        RuntimeError: a dtype or device without a kernel; the weight is not packed; an input requires grad while grad
            mode is on.

    Source:
        W8A8 of compressed-tensors and SmoothQuant; the order of the scales is that of vLLM's CUTLASS epilogue.

    Example:
        >>> w = qops.Int8Weight.quantize(torch.eye(16))
        >>> q = torch.full((1, 16), 64, dtype=torch.int8)
        >>> qops.int8_gemm(q, torch.tensor([0.5]), w)[0, :4]
        tensor([32., 32., 32., 32.], dtype=torch.bfloat16)
    """
    if derivatives_are_asked():
        refuse_grad("int8_gemm", scale=scale, bias=bias, residual=residual, out_scale=out_scale, out=out)
    require_weight("int8_gemm", weight, "Int8Weight")
    _check_out_dtype(out_dtype, "out_dtype must be")
    weight._require_packed()
    if weight.kind != "symmetric":
        raise ValueError(f"qops.int8_gemm: weight must be symmetric, got kind {weight.kind!r}")
    if weight.act_order:
        raise ValueError("qops.int8_gemm: weight must have act_order = False, got True")
    if weight.group_size != weight.in_features:
        raise ValueError(
            f"qops.int8_gemm: weight must have one scale per row (group_size = K = {weight.in_features}), "
            f"got group_size = {weight.group_size}"
        )
    if silu_mul != weight.mixed_gate_up:
        refuse_mixed("int8_gemm", silu_mul)
    args = (q, scale, zero_point, weight.packed, weight.scales, bias, weight.out_features)
    op = torch.ops.qops.int8_gemm
    if silu_mul or residual is not None or out_scale is not None or out_zero_point is not None:
        if out is None:
            return op.fused(*args, out_dtype, residual, silu_mul, out_scale, out_zero_point)
        if out_scale is None:
            out_dtype = out.dtype
            _check_out_dtype(out_dtype, "out must have dtype")
        op.fused_out(*args, out_dtype, residual, silu_mul, out_scale, out_zero_point, out=out)
    else:
        if out is None:
            return op.default(*args, out_dtype)
        op.out(*args, out=out)
    return out


def int8_gemm_ref(
    q: Tensor,
    scale: Tensor,
    weight: Int8Weight,
    bias: Tensor | None = None,
    *,
    zero_point: Tensor | None = None,
    residual: Tensor | None = None,
    silu_mul: bool = False,
) -> Tensor:
    """The formula of :func:`int8_gemm` in float64, nothing rounded; float64."""
    x = q.double() if zero_point is None else q.double() - zero_point.double().unsqueeze(-1)
    w = weight.canonical()
    y = x @ w["qweight"].double().T * w["scales"].double().view(-1) * scale.double().unsqueeze(-1)
    y = y if bias is None else y + bias.double()
    if silu_mul:
        gate, up = y.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    return y if residual is None else y + residual.double()


def _check_out_dtype(out_dtype: torch.dtype, subject: str) -> None:
    if out_dtype not in OUT_DTYPES:
        actual = str(out_dtype).removeprefix("torch.")
        raise RuntimeError(f"qops.int8_gemm: {subject} float32, float16, bfloat16 or int32, got {actual}")


def cases_of_int8_gemm(run: Run) -> None:
    from qops._check_cases import ROWS, WEIGHTS, epilogues, moved
    from qops._numerics import FLOAT_DTYPES
    from qops.weights import Int8Weight

    sizes = (*WEIGHTS, (80, 200, 200))  # more than a tile of 64 rows
    cases = itertools.product(sizes, (*FLOAT_DTYPES, torch.int32), (False, True))
    for index, ((n, k, _), dtype, asymmetric) in enumerate(cases):
        run.begin(dtype, f"N = {n}, K = {k}", "zero points" if asymmetric else "")
        codes, w_scale = run.integers(-128, 128, n, k, dtype=torch.int8), run.scales(n, 1)
        w = Int8Weight.from_canonical(codes, w_scale)
        q, scale = run.integers(-128, 128, ROWS[-1], k, dtype=torch.int8), run.scales(ROWS[-1])
        zero_point = (run.integers(-128, 128, ROWS[-1], dtype=torch.int32),) if asymmetric else ()
        has_bias = dtype != torch.int32 and index % 3 > 0
        bias = run.random(n, dtype=FLOAT_DTYPES[index % 3], outliers=False) if has_bias else None
        product = partial(_int8_product, weight=moved(run, w), bias=run.there(bias), out_dtype=dtype)
        (y,) = run.rows(product, q, scale, *zero_point)
        run.same(y, _int8_gemm_exact(q, scale, zero_point, codes, w_scale, bias, dtype), "the contract's operations")
        if dtype != torch.int32:
            mixed = partial(product, weight=moved(run, w, mixed=True)) if n % 16 == 0 else None
            epilogues(run, product, mixed, y, q, scale, *zero_point)


def _int8_product(
    q: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, weight: Int8Weight, **more: Any
) -> Any:
    return int8_gemm(q, scale, weight, zero_point=zero_point, **more)


def _int8_gemm_exact(
    q: Tensor,
    scale: Tensor,
    zero_point: tuple[Tensor, ...],
    codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The contract: integers in int64, float32 steps one by one."""
    from qops.weights.rounding import add_rounding_to_odd

    x = q.long() - sum(z.long()[:, None] for z in zero_point)
    acc = (x @ codes.long().T).int()
    if dtype == torch.int32:
        return acc
    t = acc.float() * w_scale.view(-1)
    s = scale[:, None]
    # One rounding of s * t + bias: float64 holds the product, and a sum that was rounded to odd is rounded once.
    y = s * t if bias is None else add_rounding_to_odd(s.double() * t.double(), bias.double()).float()
    return y.to(dtype)


@fake("int8_gemm")
def _(
    check: Checker,
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    out_dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
    silu_mul: bool = False,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out: Tensor | None = None,
) -> Results:
    if out_dtype is None:  # `.out` has none
        assert out is not None
        out_dtype = out.dtype
        _check_out_dtype(out_dtype, "out must have dtype")
    check.dtype(q, "q", torch.int8)
    check.dtype(scale, "scale", torch.float32)
    if zero_point is not None:
        check.dtype(zero_point, "zero_point", torch.int32)
    check.dtype(packed, "packed", torch.int8)
    check.float_dtype(w_scale, "w_scale")
    _check_out_dtype(out_dtype, "out_dtype must be")
    if bias is not None:
        check.float_dtype(bias, "bias")
    check.at_least_1d(q, "q")
    ok = out_features >= 0 and out_features % 8 == 0
    check.require(ok, "out_features", "be a multiple of 8", lambda: str(out_features))
    check.require(packed.dim() == 2, "packed", "have 2 dimensions", lambda: str(packed.dim()))
    step = column_step(packed.device)
    requirement = f"hold a multiple of {step} columns of 16 elements a strip"
    check.require(packed.shape[1] % (16 * step) == 0, "packed", requirement, lambda: str(packed.shape[1]))
    stored, strips = packed.shape[1] // 16, strips_of(out_features)
    check.shape(packed, "packed", "[S, 16 K]", (strips, 16 * stored))
    k = q.shape[-1]
    ok = k % 8 == 0 and stored_columns(k, packed.device) == stored
    check.require(ok, "q", f"have last dimension K = {stored}", lambda: str(k))
    max_k = MAX_K if zero_point is None else MAX_K_WITH_ZERO_POINT
    requirement = f"have at most {max_k} columns" + ("" if zero_point is None else " with a zero_point")
    check.require(k <= max_k, "q", requirement, lambda: str(k))
    check.shape(w_scale, "w_scale", "[S, 1, 16]", (strips, 1 if k else 0, 16))
    check.contiguous(packed, "packed")
    check.contiguous(w_scale, "w_scale")
    check.dense_last_dim(q, "q")
    check.rows(q, "q")
    check.per_row(scale, "scale", q)
    if zero_point is not None:
        check.per_row(zero_point, "zero_point", q)
    if bias is not None:
        check.require(out_dtype != torch.int32, "bias", "be None where the output is int32", lambda: "a tensor")
        check.shape(bias, "bias", "[N]", (out_features,))
        check.dense_last_dim(bias, "bias")
    if out_dtype == torch.int32:
        check.require(residual is None, "residual", "be None where out_dtype is int32", lambda: "a tensor")
        check.require(not silu_mul, "silu_mul", "be False where out_dtype is int32", lambda: "True")
        check.require(out_scale is None, "out_scale", "be None where out_dtype is int32", lambda: "a tensor")
    y = check_epilogue(check, q, out_features, out_dtype, residual, silu_mul, out_scale, out_zero_point)
    return check.results(q, Result("out", out, *y))
