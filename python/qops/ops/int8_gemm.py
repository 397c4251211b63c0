"""int8_gemm: matrix product of 8-bit activations with 8-bit weights (W8A8)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qops import _native as _native
from qops.ops._checks import Checker, column_step, refuse_grad, require_weight, stored_columns, strips_of

if TYPE_CHECKING:
    from qops.weights import Int8Weight

OUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int32)
# Sums of products stay in int32: 128 * 128 * K, and with zero points in -128 ... 127 255 * 128 * K.
MAX_K = 131071
MAX_K_WITH_ZERO_POINT = 65793


def int8_gemm(
    q: Tensor,
    scale: Tensor,
    weight: Int8Weight,
    bias: Tensor | None = None,
    *,
    zero_point: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """Multiplies 8-bit activations with an 8-bit weight.

    ``acc[m, n] = sum_k (q[m, k] - zero_point[m]) * w[n, k]`` in integers, then
    ``y[m, n] = R(acc[m, n] * s_w[n] * scale[m] + bias[n])``, with ``w`` the codes and ``s_w`` the scales of ``weight``.

    Args:
        q: int8 ``[..., K]``; any leading dimensions and strides, last dimension dense. K is at most 131071, with zero
            points 65793.
        scale: float32 ``[...]``, one per token, any strides; or ``[]``, one for all.
        weight: an :class:`qops.Int8Weight` ``[N, K]``, packed, with one scale per row (one for the whole weight is
            repeated in each row).
        bias: float32, float16 or bfloat16 ``[N]``.
        zero_point: int32 ``[...]`` or ``[]``, the code of zero, for asymmetric activations.
        out_dtype: bfloat16, float16 or float32; or int32 for ``acc`` itself, which takes no bias and uses no scale.
        out: the tensor to write to, contiguous, sharing no memory with the inputs; its dtype takes the place of
            ``out_dtype``. Default: a new one.

    Returns:
        ``y [..., N]``, contiguous, in ``out_dtype``; ``out`` where it is given.

    Numerics:
        ``acc`` is exact: within the bounds of K it fits int32, whatever the codes are, as long as zero points lie in
        -128 ... 127; beyond, it wraps around modulo 2^32. Then, each step rounded once to float32,
        ``t = float(acc) * s_w[n]`` and ``y = R(fma(scale[m], t, bias[n]))``, without a bias ``y = R(scale[m] * t)``;
        R() is one rounding to nearest even to ``out_dtype``. The same bits for every M, position, thread count, ISA
        level and GPU. A NaN scale makes its row NaN. Where K = 0, ``t`` is 0.

    Raises:
        ValueError: shapes or strides do not fit; K above its bound; the weight has groups; a bias with int32 output;
            ``out`` overlaps an input.
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
    refuse_grad("int8_gemm", scale=scale, bias=bias, out=out)
    require_weight("int8_gemm", weight, "Int8Weight")
    _check_out_dtype(out_dtype, "out_dtype must be")
    weight._require_packed()
    if weight.group_size != weight.in_features:
        raise ValueError(
            f"qops.int8_gemm: weight must have one scale per row (group_size = K = {weight.in_features}), "
            f"got group_size = {weight.group_size}"
        )
    args = (q, scale, zero_point, weight.packed, weight.scales, bias, weight.out_features)
    if out is None:
        return torch.ops.qops.int8_gemm.default(*args, out_dtype)
    torch.ops.qops.int8_gemm.out(*args, out=out)
    return out


def int8_gemm_ref(
    q: Tensor, scale: Tensor, weight: Int8Weight, bias: Tensor | None = None, *, zero_point: Tensor | None = None
) -> Tensor:
    """The formula of :func:`int8_gemm` in float64, not rounded; float64 ``[..., N]``."""
    x = q.double() if zero_point is None else q.double() - zero_point.double().unsqueeze(-1)
    y = x @ weight.dequantize(torch.float64).T * scale.double().unsqueeze(-1)
    return y if bias is None else y + bias.double()


def _check_out_dtype(out_dtype: torch.dtype, subject: str) -> None:
    if out_dtype not in OUT_DTYPES:
        actual = str(out_dtype).removeprefix("torch.")
        raise RuntimeError(f"qops.int8_gemm: {subject} float32, float16, bfloat16 or int32, got {actual}")


def _check(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    out_dtype: torch.dtype,
    out_subject: str,
) -> list[int]:
    """Returns the shape of y."""
    check = Checker("int8_gemm")
    optional = {"zero_point": zero_point, "bias": bias}
    check.tensors({"q": q, "scale": scale, "packed": packed, "w_scale": w_scale}, optional)
    check.dtype(q, "q", torch.int8)
    check.dtype(scale, "scale", torch.float32)
    if zero_point is not None:
        check.dtype(zero_point, "zero_point", torch.int32)
    check.dtype(packed, "packed", torch.int8)
    check.float_dtype(w_scale, "w_scale")
    _check_out_dtype(out_dtype, out_subject)
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
    return [*q.shape[:-1], out_features]


@torch.library.register_fake("qops::int8_gemm")
def _(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    out_dtype: torch.dtype,
) -> Tensor:
    shape = _check(q, scale, zero_point, packed, w_scale, bias, out_features, out_dtype, "out_dtype must be")
    return Checker("int8_gemm").new_empty(q, shape, out_dtype)


@torch.library.register_fake("qops::int8_gemm.out")
def _(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    *,
    out: Tensor,
) -> None:
    check = Checker("int8_gemm")
    check.tensors({"q": q, "out": out})
    shape = _check(q, scale, zero_point, packed, w_scale, bias, out_features, out.dtype, "out must have dtype")
    check.shape(out, "out", "[..., N]", shape)
    check.contiguous(out, "out")
