"""int4_gemm: matrix product with group-quantised 4-bit weights (W4A16)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qops import _native as _native
from qops.ops._checks import Checker, check_weight_only, refuse_grad, require_weight

if TYPE_CHECKING:
    from qops.weights import Int4Weight

KINDS = ("symmetric", "zero_point", "float_zero", "offset")


def int4_gemm(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None = None,
    *,
    batch_invariant: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Multiplies activations with a 4-bit weight: ``y[m, n] = R(sum_k x[m, k] * w[n, k] + bias[n])``.

    The exact weight is, by ``weight.kind``, ``w = s * (q - 8)``, ``s * (q - z)`` with an integer or a float zero, or
    ``s * q + o``, with one scale ``s`` for each row and group of ``weight.group_size`` columns.

    Args:
        x: float32, float16 or bfloat16 ``[..., K]``; any leading dimensions and strides, last dimension dense.
        weight: an :class:`qops.Int4Weight` ``[N, K]``, packed.
        bias: float32, float16 or bfloat16 ``[N]``, added in float32.
        batch_invariant: one canonical order of summation for every M. On the CPU that is always so.
        out: the tensor to write to, contiguous, sharing no memory with the inputs; default: a new one.

    Returns:
        ``y [..., N]``, contiguous, in the dtype of ``x``; ``out`` where it is given.

    Numerics:
        R() is one rounding to nearest even to the dtype of ``x``. On the CPU, activations are held per block of at most
        128 columns of a group as fixed-point integers and multiplied exactly with the integer codes; block sums are
        exact, then scaled and added in float32 in ascending k, in 8 contiguous slices of the blocks that are added left
        to right. A row has the same bits for every M, position, thread count and ISA level.
        With ``a_b = max|x|`` of a block, the fixed-point error of y[m, n] before R() is at most
        ``1.001 * 2^-16 sum_b a_b sum_{k in b} |w[n, k]|`` (two bytes a value), and
        ``2^-31 sum_b a_b sum_{k in b} |w[n, k]|`` for float32 and for rows whose outliers would make the first bound
        reach the rounding of the output (four bytes). NaN or infinity in a row makes all its outputs NaN.

    Raises:
        ValueError: shapes or strides do not fit; a ``perm`` index is out of range; ``out`` overlaps an input.
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
    refuse_grad("int4_gemm", x=x, bias=bias, out=out)
    require_weight("int4_gemm", weight, "Int4Weight")
    weight._require_packed()
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
    if out is None:
        return torch.ops.qops.int4_gemm.default(*args)
    torch.ops.qops.int4_gemm.out(*args, out=out)
    return out


def int4_gemm_ref(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """The formula of :func:`int4_gemm` in float64 over the same quantised weights; float64 ``[..., N]``."""
    y = x.double() @ weight.dequantize(torch.float64).T
    return y if bias is None else y + bias.double()


def _check(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    kind: int,
) -> Checker:
    check = Checker("int4_gemm")
    requirement = "be 0 (symmetric), 1 (zero_point), 2 (float_zero) or 3 (offset)"
    check.require(0 <= kind <= 3, "kind", requirement, lambda: str(kind))
    k = check_weight_only(check, x, packed, torch.uint8, 8, scales, bias, out_features, group_size)
    requirement = "be None for kind 0" if kind == 0 else "be given for this kind"
    actual = "None" if zeros is None else "a tensor"
    check.require((zeros is None) == (kind == 0), "zeros", requirement, lambda: actual)
    check.tensors({"x": x}, {"zeros": zeros, "perm": perm})
    if zeros is not None:
        check.dtype(zeros, "zeros", torch.uint8 if kind == 1 else torch.float32)
        check.same_shape(zeros, "zeros", scales, "scales")
        check.contiguous(zeros, "zeros")
    if perm is not None:
        check.dtype(perm, "perm", torch.int32)
        check.shape(perm, "perm", "[K]", (k,))
        check.contiguous(perm, "perm")
    return check


@torch.library.register_fake("qops::int4_gemm")
def _(
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
) -> Tensor:
    check = _check(x, packed, scales, zeros, perm, bias, out_features, group_size, kind)
    return check.new_empty(x, (*x.shape[:-1], out_features))


# Which memory overlaps, and which indices of perm are out of range, only the kernel can see.
@torch.library.register_fake("qops::int4_gemm.out")
def _(
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
    *,
    out: Tensor,
) -> None:
    check = _check(x, packed, scales, zeros, perm, bias, out_features, group_size, kind)
    check.tensors({"x": x, "out": out})
    check.output(out, "out", x.dtype, "[..., N]", (*x.shape[:-1], out_features))
