"""The contract of decode_attention, written a second time in numpy: bit for bit."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from qops.ops.decode_attention import attended
from tests.support.ops.contracts import exp_exact
from tests.support.ops.weight_only_oracle import fma

F32 = np.float32
LEAST, NAN = np.finfo(F32).min, F32(np.nan)


def decode_attention_exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    first_position: int = 0,
) -> Tensor:
    """As the operator of torch.ops."""
    y = torch.zeros(q.shape, dtype=q.dtype)
    batch, tokens, _, d = q.shape
    if y.numel() == 0:
        return y
    kv_heads, s = k.shape[1:3]
    wide_q = q.resolve_neg().float().numpy().reshape(batch, tokens, kv_heads, -1, 1, d)
    wide_k, wide_v = (x.resolve_neg().float().numpy()[:, None, :, None] for x in (k, v))
    allowed = attended(tokens, s, mask, window, batch).numpy()[:, :, None, None]
    with np.errstate(all="ignore"):
        rows = _rows(wide_q, wide_k, wide_v, allowed, first_position, F32(scale), F32(softcap))
    return torch.from_numpy(rows).to(q.dtype).view(q.shape)


def tanh_exact(x: np.ndarray) -> np.ndarray:
    x = np.where(x < -20, F32(-20), np.where(x > 20, F32(20), x))
    e = exp_exact(F32(-2) * x)
    return (F32(1) - e) / (F32(1) + e)


def _rows(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, allowed: np.ndarray, first: int, scale: F32, softcap: F32
) -> np.ndarray:
    """[..., D] of q [..., 1, D], k and v [..., S, D], allowed [..., S]: what is not allowed is in no sum."""
    s = scale * _dot(q, k)
    if softcap > 0:
        s = softcap * tanh_exact(s / softcap)
    allowed = np.broadcast_to(allowed, s.shape)
    chunks = []
    for _, here in itertools.groupby(range(s.shape[-1]), lambda row: (first + row) // 128):
        rows = list(here)
        m = np.fmax(np.fmax.reduce(np.where(allowed, s, NAN)[..., rows], -1), LEAST)
        lanes, o = np.zeros((*m.shape, 16), F32), np.zeros((*m.shape, q.shape[-1]), F32)
        for row in rows:
            lane, one = (first + row) % 16, allowed[..., row]
            weight = _weight(s[..., row] - m)
            lanes[..., lane] = np.where(one, lanes[..., lane] + weight, lanes[..., lane])
            o = np.where(one[..., None], fma(weight[..., None], v[..., row, :], o), o)
        chunks.append((allowed[..., rows].any(-1), m, _halved(lanes, 8), o))
    most = np.fmax.reduce([np.where(some, m, NAN) for some, m, _, _ in chunks])
    total, sums = np.zeros(most.shape, F32), np.zeros((*most.shape, q.shape[-1]), F32)
    for some, m, part, o in chunks:
        weight = _weight(m - most)
        total = np.where(some, fma(weight, part, total), total)
        sums = np.where(some[..., None], fma(weight[..., None], o, sums), sums)
    return np.where(allowed.any(-1)[..., None], sums / total[..., None], F32(0))


def _weight(x: np.ndarray) -> np.ndarray:
    return np.where(x < -87, F32(0), exp_exact(x))


def _dot(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """[..., S]"""
    lanes = np.zeros((*np.broadcast_shapes(q.shape[:-1], k.shape[:-1]), 16), F32)
    for d in range(0, q.shape[-1], 16):
        width = min(16, q.shape[-1] - d)
        lanes[..., :width] = fma(q[..., d : d + width], k[..., d : d + width], lanes[..., :width])
    halves = [_halved(lanes[..., half : half + 8], 4) for half in (0, 8)]
    return halves[0] + halves[1]


def _halved(lanes: np.ndarray, stride: int) -> np.ndarray:
    while stride > 0:
        lanes = lanes[..., :stride] + lanes[..., stride:]
        stride //= 2
    return lanes[..., 0]
