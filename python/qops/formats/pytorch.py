"""PyTorch's own quantised tensors, from live ones: `quantize_per_tensor`, `quantize_per_channel`, `quantize_dynamic`.

    per_tensor_affine                  w = (q - zero_point) * scale, the scale as float32
    per_channel_affine (axis 0)        the same, scales float64; here they have to be numbers that float32 holds
    per_channel_affine_float_qparams   the same, scales and zero points float32; PyTorch rounds the difference first

with qint8, quint8 or quint4x2 codes. The files that hold such tensors are pickles, which are not read here.

`torch.ao.nn.quantized.dynamic.Linear` holds `weight()`, a qint8 tensor, and `bias()`. Its activations are quantised per
call with one scale for the whole input, to 0 ... 127 (engines x86, fbgemm, onednn) or 0 ... 255 (qnnpack). No linear of
`qops.nn` does that: with its weight they compute the product with exact activations (`Int8WeightOnlyLinear`), or with
activations quantised per token (`Int8Linear`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qops.weights import Int4Weight, Int8Weight
from qops.weights.requirements import dtype_name, require_matrix, require_shape
from qops.weights.rounding import move_zeros_to_offsets, store_nibbles

__all__ = ["int4_weight", "int8_weight"]


def int8_weight(tensor: Tensor, *, pack: bool = True) -> Int8Weight:
    """A weight from a quantised tensor of 8-bit codes.

    Args:
        tensor: qint8 or quint8 `[N, K]`, quantised as a whole or by rows.
        pack: as in :meth:`qops.Int8Weight.from_canonical`.

    Returns:
        A weight with one float32 scale per row, of kind `"symmetric"` where zero points are integers and each
        `q - zero_point` fits in a byte, else `"offset"`.

    Numerics:
        Nothing is rounded; integer zero points give the bits of `tensor.dequantize()`. With float zero points PyTorch
        rounds `q - zero_point` to float32 first: its bits are the same where that difference is exact.

    Raises:
        ValueError: channels along axis 1; a scale or an offset that no float32 holds; what
            :meth:`qops.Int8Weight.from_canonical` refuses.
        RuntimeError: a tensor that is not quantised, or to other codes.

    Example:
        >>> model = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(torch.nn.Linear(64, 32)))
        >>> weight = qops.formats.pytorch.int8_weight(model[0].weight())
        >>> linear = qops.nn.Int8WeightOnlyLinear(weight, model[0].bias())
    """
    name = "qops.formats.pytorch.int8_weight"
    scales, zeros = _qparams(name, tensor, (torch.qint8, torch.quint8))
    codes = tensor.int_repr()
    if not zeros.is_floating_point():
        shifted = codes.int() - zeros.int()
        if bool(((shifted >= -128) & (shifted <= 127)).all()):
            return Int8Weight.from_canonical(shifted.to(torch.int8), scales, pack=pack)
    qweight, offsets = move_zeros_to_offsets(name, codes, scales, zeros)
    return Int8Weight.from_canonical(qweight, scales, kind="offset", zeros=offsets, pack=pack)


def int4_weight(tensor: Tensor, *, pack: bool = True) -> Int4Weight:
    """A weight from a quantised tensor of 4-bit codes.

    Args:
        tensor: quint4x2 `[N, K]`, or quint8 of codes 0 ... 15.
        pack: as in :meth:`qops.Int4Weight.from_canonical`.

    Returns:
        A weight with one float32 scale per row, of kind `"zero_point"`, or `"float_zero"` of float qparams.

    Numerics:
        As in :func:`int8_weight`.

    Raises:
        ValueError: codes above 15; a zero point outside 0 ... 16; and as in :func:`int8_weight`.
        RuntimeError: a tensor that is not quantised, or to other codes.
    """
    name = "qops.formats.pytorch.int4_weight"
    scales, zeros = _qparams(name, tensor, (torch.quint4x2, torch.quint8))
    n, k = tensor.shape
    codes = tensor.int_repr()
    if tensor.dtype == torch.quint4x2:
        if k % 2:
            raise ValueError(f"{name}: tensor must have an even number of columns, got {list(tensor.shape)}")
        qweight = codes.view(n, k // 2)  # even k in the low nibble, as ours
    else:
        if int(codes.max()) > 15:
            raise ValueError(f"{name}: tensor must have codes 0 ... 15, got {int(codes.max())}")
        qweight = store_nibbles(codes)
    kind = "float_zero" if zeros.is_floating_point() else "zero_point"
    if kind == "zero_point":
        if not ((zeros >= 0) & (zeros <= 16)).all():
            raise ValueError(f"{name}: zero points must be 0 ... 16, got {int(zeros.min())} ... {int(zeros.max())}")
        zeros = zeros.to(torch.uint8)
    return Int4Weight.from_canonical(qweight, scales, kind=kind, zeros=zeros, in_features=k, pack=pack)


def _qparams(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> tuple[Tensor, Tensor]:
    """Scales, float32, and zero points, int64 or float32, both [N, 1]."""
    require_matrix(name, "tensor", tensor)
    require_shape(name, tensor.shape)
    if not tensor.is_quantized or tensor.dtype not in dtypes:
        wanted = " or ".join(map(dtype_name, dtypes))
        raise RuntimeError(f"{name}: tensor must be quantised to {wanted}, got dtype {dtype_name(tensor.dtype)}")
    n = tensor.shape[0]
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        # Not in torch's default dtype, which is the caller's.
        scale = torch.tensor(tensor.q_scale(), dtype=torch.float32)
        return scale.expand(n, 1), torch.tensor(tensor.q_zero_point()).expand(n, 1)
    if tensor.q_per_channel_axis() != 0:
        raise ValueError(f"{name}: tensor must be quantised by rows, axis 0, got axis {tensor.q_per_channel_axis()}")
    given = tensor.q_per_channel_scales().view(n, 1)
    scales = given.float()
    if not torch.equal(scales.to(given.dtype), given):
        row = int((scales.to(given.dtype) != given).flatten().nonzero()[0])
        raise ValueError(
            f"{name}: scales must fit in float32, for the weight to be exact, got {float(given[row])!r} in row {row}"
        )
    return scales, tensor.q_per_channel_zero_points().view(n, 1)
