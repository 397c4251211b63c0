"""Rounding to codes, and the exact values of codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qops._layout import chunk_rows, group_count
from qops.weights.requirements import (
    SCALE_DTYPES,
    dtype_name,
    require_matrix,
    require_multiples_of_8,
    require_scale_dtype,
    require_tensor,
    resolve_group_size,
)


def round_to_nearest(
    name: str,
    weight: Tensor,
    group_size: int,
    scale_dtype: torch.dtype | None,
    store: Callable[[Tensor], Tensor],
    *,
    steps: int,
    low: int,
    high: int,
    zero: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises in chunks of rows, so that the float64 temporaries stay small.

    Args:
        name: of the caller, for messages.
        weight, group_size, scale_dtype: of the caller.
        store: codes, float64 ``[rows, K]`` -> rows of ``qweight``.
        steps: how many steps of the scale span the range of a group.
        low, high: range of the codes.
        zero: code of zero; None fits one to each group and makes the range as wide as the group's, not symmetric.

    Returns:
        ``qweight``, ``scales`` and uint8 codes of zero.
    """
    require_tensor(name, "weight", weight)
    if weight.is_meta:
        raise ValueError(f"{name}: weight must have data, got a tensor on the meta device")
    if not weight.is_floating_point():
        raise RuntimeError(f"{name}: weight must have a floating-point dtype, got {dtype_name(weight.dtype)}")
    require_matrix(name, "weight", weight)
    n, k = weight.shape
    require_multiples_of_8(name, n, k)
    group_size = resolve_group_size(name, k, group_size)
    if scale_dtype is None:
        scale_dtype = weight.dtype if weight.dtype in SCALE_DTYPES else torch.float32
    require_scale_dtype(name, scale_dtype)
    groups = group_count(k, group_size)
    empty = store(weight.new_empty(0, k))
    qweight = empty.new_empty(n, empty.shape[1])
    scales = weight.new_empty(n, groups, dtype=scale_dtype)
    zeros = weight.new_empty(n, groups, dtype=torch.uint8)
    step = chunk_rows(k)
    for start in range(0, n if k else 0, step):
        rows = slice(start, start + step)
        values = weight[rows].double().view(-1, groups, group_size)
        bottom, top = values.aminmax(dim=-1)
        if not (bottom.isfinite() & top.isfinite()).all():
            raise ValueError(f"{name}: weight must be finite, got NaN or infinity")
        if zero is None:
            bottom, top = bottom.clamp(max=0), top.clamp(min=0)
        else:
            top = torch.maximum(top.abs(), bottom.abs())
            bottom = -top
        scales[rows] = ((top - bottom) / steps).float()
        scale = scales[rows].double()
        if not scale.isfinite().all():
            raise ValueError(f"{name}: a scale does not fit in {dtype_name(scale_dtype)}")
        # Over infinity, every value of a group without a scale gets the code of zero.
        scale.masked_fill_(scale == 0, torch.inf)
        origin = torch.full_like(scale, zero) if zero is not None else (-bottom / scale).round_().clamp_(low, high)
        codes = (values / scale.unsqueeze(-1)).round_().add_(origin.unsqueeze(-1)).clamp_(low, high)
        qweight[rows] = store(codes.flatten(1))
        zeros[rows] = origin.to(torch.uint8)
    return qweight, scales, zeros


def store_nibbles(codes: Tensor) -> Tensor:
    """Two 4-bit codes in a byte, the first in the low half: [N, K] -> uint8 [N, K/2]."""
    if codes.shape[1] % 2:
        raise ValueError(f"codes must have an even number of columns, got {list(codes.shape)}")
    codes = codes.to(torch.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4


def move_zeros_to_offsets(name: str, codes: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """``s * (q - z) = s * q' + o``, exactly: ``q' = q - c`` and ``o = s * (c - z)``, c an integer of each group.

    Args:
        name: of the caller, for messages.
        codes: uint8 or int8 ``[N, K]``, N and K positive.
        scales: ``[N, K/G]``.
        zeros: ``[N, K/G]``, integers or floating point.

    Returns:
        int8 ``q'`` and float32 ``o``.

    Raises:
        ValueError: no float32 holds an offset.
    """
    grouped = codes.to(torch.int16).view(*scales.shape, -1)
    origin, scale = zeros.double(), scales.double()
    low, high = (found.double() for found in grouped.aminmax(dim=-1))
    # The nearest integer leaves a difference of the fewest bits; q - c has to fit in int8 all the same.
    c = origin.round().clamp(high - 127, low + 128)
    rest = c - origin
    offsets = scale * rest
    # A difference that is a float32 has an exact product in float64, so that the second comparison tells.
    inexact = (rest.float() != rest) | (c - rest != origin) | (offsets.float() != offsets)
    if inexact.any():
        row, group = (int(index) for index in inexact.nonzero()[0])
        raise ValueError(
            f"{name}: offsets must fit in float32, for the weight to be exact, but in row {row}, group {group} "
            f"that of scale {float(scale[row, group])!r}, zero {float(origin[row, group])!r} and codes "
            f"{int(low[row, group])} ... {int(high[row, group])} does not"
        )
    return (grouped - c.to(torch.int16).unsqueeze(-1)).to(torch.int8).view(codes.shape), offsets.float()


def add_rounding_to_odd(a: Tensor, b: Tensor, *, may_look: bool = True) -> Tensor:
    """a + b in float64, an inexact sum rounded to its neighbour with an odd last bit.

    Rounded once more to float32 this is a + b rounded once (Boldo and Melquiond, "Emulation of FMA and correctly
    rounded sums", 2008): the odd bit keeps the sum off float32's ties. Knuth's two-sum gives the rounding error.
    may_look: whether a look at the values may save work, which breaks a graph and waits for a GPU.
    """
    total = a + b
    from_b = total - a
    error = (a - (total - from_b)).add_(b - from_b)
    if may_look and (error.is_meta or not error.any()):  # s * q + o of two float16 numbers is always exact: 45 bits
        return total
    bits = total.view(torch.int64)
    outward = (error > 0) == (total > 0)
    odd = torch.where(outward, bits + 1, bits - 1)
    return torch.where((error != 0) & (bits % 2 == 0), odd, bits).view(torch.float64)


def scale_codes(codes: Tensor, scales: Tensor, offsets: Tensor | None = None, *, may_look: bool = True) -> Tensor:
    """int8 codes [..., K] times scales [..., K/G], plus offsets [..., K/G], rounded once to float32.

    Products have 8 + 24 bits; may_look as in `add_rounding_to_odd`.
    """
    grouped = codes.unflatten(-1, (scales.shape[-1], codes.shape[-1] // max(scales.shape[-1], 1)))
    if offsets is None:
        return (grouped.float() * scales.float().unsqueeze(-1)).flatten(-2)
    products = grouped.double() * scales.double().unsqueeze(-1)
    return add_rounding_to_odd(products, offsets.double().unsqueeze(-1), may_look=may_look).float().flatten(-2)
