"""The contract of the weight-only GEMMs, written a second time: integers in int64, float32 steps in numpy."""

from __future__ import annotations

import numpy as np
import torch

MAX_BLOCK = 128
SLICES = 8


def fma(a, b, c):
    """One rounding to float32. float64 holds the product, not every sum: one that is inexact is rounded to odd, so that
    no tie of float32 comes of it that is none."""
    product, c = np.multiply(a, b, dtype=np.float64), np.asarray(c, np.float64)
    total = product + c
    with np.errstate(invalid="ignore"):
        added = total - product
        error = (product - (total - added)) + (c - added)  # exact (two-sum); NaN where the total is not finite
        even = total.view(np.int64) & 1 == 0
        beside = np.nextafter(total, np.copysign(np.inf, error))
        total = np.where(even & (np.abs(error) > 0), beside, total)
    return total.astype(np.float32)


def blocks_of(k: int, group_size: int) -> list[tuple[int, int, int]]:
    """(group, begin, size) of every block."""
    return [
        (group, group * group_size + at, min(MAX_BLOCK, group_size - at))
        for group in range(k // group_size)
        for at in range(0, group_size, MAX_BLOCK)
    ]


def needs_four_digits(x: np.ndarray, dtype: torch.dtype, blocks) -> bool:
    if dtype == torch.float32:
        return True
    magnitude = np.abs(x.astype(np.float64))
    bound = rest = 0.0
    for _, begin, size in blocks:
        block = magnitude[begin : begin + size]
        if 0 < block.max() < 2.0**-100:
            return True
        bound += block.max() * size
        rest += block.sum() - block.max()
    return bound * 2.0**-16 > (2.0**-9 if dtype == torch.bfloat16 else 2.0**-12) * rest


def fixed_point(x: np.ndarray, four: bool) -> tuple[np.ndarray, np.float32]:
    """(v, scale) with x ~ v * scale, for one block of finite values."""
    a = np.abs(x).max()
    if a == 0:
        return np.zeros(len(x), np.int64), np.float32(0)
    if not four:
        inverse = np.float32(32767) / a
        return np.rint(x * inverse).astype(np.int64), a / np.float32(32767)
    exponent = max(int(np.floor(np.log2(a.astype(np.float64)))) - 30, -149)  # no float32 has a bit below 2^-149
    return np.rint(x.astype(np.float64) * 2.0**-exponent).astype(np.int64), np.float32(2.0**exponent)


def split(v: np.ndarray, four: bool) -> list[np.ndarray]:
    return [v >> 24, (v >> 16) & 255, (v >> 8) & 255, v & 255] if four else [v >> 8, v & 255]


def gemm_row(x: torch.Tensor, codes, scales, zeros, kind: str, group_size: int, bias, origin: int) -> torch.Tensor:
    """One row of y before R(): float32 [N].

    Args:
        x: [K], columns in packed order. codes: int64 [N, K], of 4 bits already minus 8 for kinds other than
        zero_point. scales: float32 [N, groups]. zeros: [N, groups] of any dtype, or None. kind: of the weight.
        origin: 8 for codes of 4 bits, else 0.
    """
    values = x.float().numpy()
    blocks = blocks_of(len(values), group_size)
    four = needs_four_digits(values, x.dtype, blocks)
    total = np.zeros(codes.shape[0], np.float32)
    y = np.zeros(codes.shape[0], np.float32)
    ends = {-(-i * len(blocks) // SLICES) for i in range(1, SLICES + 1)}
    for index, (group, begin, size) in enumerate(blocks):
        v, scale = fixed_point(values[begin : begin + size], four)
        w = codes[:, begin : begin + size]
        if kind == "zero_point":
            w = w - zeros[:, group, None].astype(np.int64)
        digits = [w @ d for d in split(v, four)]
        if four:
            high, low = digits[0] * 256 + digits[1], digits[2] * 256 + digits[3]
            value = fma(high.astype(np.float32), 65536, low.astype(np.float32))
        else:
            value = (digits[0] * 256 + digits[1]).astype(np.float32)
        s = scales[:, group]
        total = fma(s, value * scale, total)
        if kind in ("float_zero", "offset"):
            z = zeros[:, group].astype(np.float32)
            offset = s * (np.float32(origin) - z) if kind == "float_zero" else fma(s, origin, z) if origin else z
            total = fma(offset, np.float32(v.sum()) * scale, total)
        if index + 1 in ends:
            y, total = y + total, np.zeros_like(total)
    return torch.from_numpy(y if bias is None else y + bias.float().numpy())
