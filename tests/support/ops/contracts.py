"""Contracts written a second time, in numpy or torch operations that round where the docstring says: bit for bit."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.ops.weight_only_oracle import fma


def _float32(text: str) -> np.float32:
    return np.float32(float.fromhex(text))


def exp_exact(x: np.ndarray) -> np.ndarray:
    """The polynomial of csrc/exp_poly.h in float32."""
    x = np.where(x > -104, x, np.where(np.isnan(x), x, np.float32(-104)))
    x = np.where(x < 89, x, np.where(np.isnan(x), x, np.float32(89))).astype(np.float32)
    n = np.rint(x * _float32("0x1.715476p+0"))
    r = fma(n, _float32("-0x1.62e430p-1"), x)
    r = fma(n, _float32("0x1.05c610p-29"), r)
    p = _float32("0x1.6a244cp-10")
    for coefficient in ("0x1.1239d4p-7", "0x1.5558f2p-5", "0x1.555492p-3", "0x1.fffffcp-2", "0x1p0", "0x1p0"):
        p = fma(p, r, _float32(coefficient))
    finite = np.where(np.isnan(n), 0, n).astype(np.int32)
    return np.ldexp(p.astype(np.float64), finite).astype(np.float32)


def silu_mul_exact(gate: Tensor, up: Tensor, rounding: str = "hf") -> Tensor:
    """The contract of silu_mul."""
    g = gate.float().resolve_neg().numpy()
    with np.errstate(all="ignore"):
        silu = torch.from_numpy(g / (np.float32(1) + exp_exact(np.float32(0) - g)))
    if rounding == "hf":
        silu = silu.to(gate.dtype).float()
    return (silu * up.float()).to(gate.dtype)


def int8_gemm_exact(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The contract of int8_gemm. codes: int8 [N, K]; w_scale: [N]."""
    a = q.long() if zero_point is None else q.long() - zero_point.long()[..., None]
    acc = (a @ codes.long().T).to(torch.int32)
    if out_dtype == torch.int32:
        return acc
    with np.errstate(all="ignore"):
        t = acc.float().numpy() * w_scale.float().numpy() if codes.shape[1] > 0 else acc.float().numpy()
        s = scale.float()[..., None].numpy()
        y = s * t if bias is None else fma(s, t, bias.float().numpy())
    return torch.from_numpy(np.ascontiguousarray(y)).to(out_dtype)


def int4_int8_gemm_exact(
    q: Tensor,
    scale: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    perm: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The contract of int4_int8_gemm. codes: 0 .. 15 [N, K]; scales, zeros: [N, groups]."""
    n, k = codes.shape
    m = math.prod(q.shape[:-1])
    x = q.resolve_neg().reshape(m, k).numpy().astype(np.int64)
    x = x if perm is None else x[:, perm.numpy()]
    s = scales.float().numpy()
    groups = scales.shape[1]
    g = k // groups if groups else 1
    columns = math.lcm(64, g)  # of a unit: the groups of slice i end where a unit does
    units = -(-k // columns)
    ends = [min(k, units * (i + 1) // 8 * columns) for i in range(8)]
    y = np.zeros((m, n), np.float32)
    with np.errstate(all="ignore"):
        for begin, end in itertools.pairwise((0, *ends)):
            total = np.zeros_like(y)
            for at in range(begin, end, g):
                group = at // g
                w = codes[:, at : at + g].numpy().astype(np.int64)
                z = None if zeros is None else zeros[:, group].float().numpy()
                w = w - (z.astype(np.int64)[:, None] if z is not None and kind == "zero_point" else 8)
                sums = x[:, at : at + g] @ w.T
                assert np.abs(sums).max(initial=0) < 2**31
                total = fma(s[:, group], sums.astype(np.float32), total)
                if z is not None and kind != "zero_point":
                    offset = fma(s[:, group], 8, z) if kind == "offset" else s[:, group] * (np.float32(8) - z)
                    total = fma(offset, x[:, at : at + g].sum(1, keepdims=True).astype(np.float32), total)
            y = y + total
        rows = scale.expand(q.shape[:-1]).resolve_neg().reshape(m, 1).numpy()
        y = rows * y if bias is None else fma(rows, y, bias.float().numpy())
    return torch.from_numpy(np.ascontiguousarray(y)).to(out_dtype).view(*q.shape[:-1], n)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Strips of 16 rows of codes [N, K] (0 .. 15 for 4 bits), as csrc/cpu/weight_pack.cpp draws them."""
    n, k = codes.shape
    strips = -(-n // 16)
    if bits == 8:
        padded = F.pad(codes, (0, 0, 0, strips * 16 - n))
        return padded.view(strips, 16, k // 4, 4).transpose(1, 2).reshape(strips, 16 * k)
    padded = F.pad(codes, (0, 0, 0, strips * 16 - n), value=8).view(strips, 16, k // 8, 2, 4)
    return (padded[..., 0, :] | padded[..., 1, :] << 4).transpose(1, 2).reshape(strips, 8 * k)


def packed_for_gpu(codes: Tensor) -> Tensor:
    """The same as csrc/int4_layout.h draws it: blocks of 16 rows x 64 columns in the order of mma's A fragments."""
    n, k = codes.shape
    strips, blocks = -(-n // 16), -(-k // 64)
    padded = F.pad(codes, (0, 64 * blocks - k, 0, 16 * strips - n), value=8).view(strips, 16, blocks, 64)
    order = torch.empty(strips, blocks, 32, 4, 8, dtype=torch.uint8)
    for lane, step, register, odd in itertools.product(range(32), range(4), range(4), range(2)):
        row = lane // 4 + 8 * (register % 2)
        column = 16 * step + 2 * (lane % 4) + 8 * (register // 2) + odd
        order[:, :, lane, step, register + 4 * odd] = padded[:, row, :, column]
    return (order[..., 0::2] | order[..., 1::2] << 4).view(strips, 512 * blocks)


def mix_gate_up(rows: Tensor) -> Tensor:
    """Rows of gate above as many of up, as strips take them: 8 of each."""
    half = rows.shape[0] // 2
    return rows[[row // 16 * 8 + row % 8 + (half if row % 16 >= 8 else 0) for row in range(2 * half)]]


def int4_dequantize_exact(codes: Tensor, scales: Tensor, zeros: Tensor | None, kind: str, dtype: torch.dtype) -> Tensor:
    """The contract of int4_dequantize; codes 0 .. 15 [N, K], scales and zeros [N, groups]."""
    n, k = codes.shape
    if n == 0 or k == 0:
        return torch.empty((n, k), dtype=dtype)
    q = codes.float().view(n, scales.shape[1], -1).numpy()
    s = scales.float().unsqueeze(-1).numpy()
    z = np.float32(8) if zeros is None else zeros.float().unsqueeze(-1).numpy()
    with np.errstate(all="ignore"):
        w = fma(s, q, z) if kind == "offset" else s * (q - z)
    return torch.from_numpy(w).view(n, k).to(dtype)


def nibbles(qweight: Tensor) -> Tensor:
    """Canonical bytes [N, K/2] to codes [N, K]; the even one lies low."""
    return torch.stack((qweight & 15, qweight >> 4), dim=-1).flatten(1)


def int8_embedding_exact(codes: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
    """All rows by the contract of int8_embedding; codes int8 [N, K], scales and zeros [N, groups]."""
    n, k = codes.shape
    if n == 0 or k == 0:
        return torch.empty((n, k), dtype=dtype)
    q = codes.float().view(n, scales.shape[1], -1).numpy()
    s = scales.float().unsqueeze(-1).numpy()
    with np.errstate(all="ignore"):
        w = s * q if zeros is None else fma(s, q, zeros.float().unsqueeze(-1).numpy())
    return torch.from_numpy(w).view(n, k).to(dtype)
