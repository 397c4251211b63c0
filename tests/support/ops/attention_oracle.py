"""The contract of decode_attention, written a second time in numpy: bit for bit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qops.ops.decode_attention import attended
from tests.support.ops.contracts import exp_exact
from tests.support.ops.weight_only_oracle import fma

F32 = np.float32
LEAST = np.finfo(F32).min


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
    batch, tokens, q_heads, _ = q.shape
    if y.numel() == 0:
        return y
    group, s = q_heads // k.shape[1], k.shape[2]
    wide_q, wide_k, wide_v = (x.resolve_neg().float().numpy() for x in (q, k, v))
    allowed = attended(tokens, s, mask, window, batch).numpy()
    with np.errstate(all="ignore"):
        for b, t, h in np.ndindex(batch, tokens, q_heads):
            rows = np.flatnonzero(allowed[b, t])
            if len(rows) > 0:
                head = (b, h // group, rows)
                one = _row(wide_q[b, t, h], wide_k[head], wide_v[head], rows + first_position, F32(scale), F32(softcap))
                y[b, t, h] = torch.from_numpy(one).to(q.dtype)
    return y


def tanh_exact(x: np.ndarray) -> np.ndarray:
    x = np.where(x < -20, F32(-20), np.where(x > 20, F32(20), x))
    e = exp_exact(F32(-2) * x)
    return (F32(1) - e) / (F32(1) + e)


def _row(q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray, scale: F32, softcap: F32) -> np.ndarray:
    s = scale * _dot(q, k)
    if softcap > 0:
        s = softcap * tanh_exact(s / softcap)
    chunks = []
    for chunk in np.unique(positions // 128):
        here = positions // 128 == chunk
        m = np.fmax(np.fmax.reduce(s[here]), LEAST)
        p = _weight(s[here] - m)
        lanes, o = np.zeros(16, F32), np.zeros(len(q), F32)
        for position, weight, value in zip(positions[here], p, v[here], strict=True):
            lanes[position % 16] += weight
            o = fma(weight, value, o)
        chunks.append((m, _halved(lanes, 8), o))
    most = np.fmax.reduce([m for m, _, _ in chunks])
    total, sums = F32(0), np.zeros(len(q), F32)
    for m, part, o in chunks:
        weight = _weight(np.asarray(m - most))
        total, sums = fma(weight, part, total), fma(weight, o, sums)
    return sums / total


def _weight(x: np.ndarray) -> np.ndarray:
    return np.where(x < -87, F32(0), exp_exact(x))


def _dot(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """[S]"""
    lanes = np.zeros((len(k), 16), F32)
    for d in range(0, len(q), 16):
        width = min(16, len(q) - d)
        lanes[:, :width] = fma(q[d : d + width], k[:, d : d + width], lanes[:, :width])
    halves = [_halved(lanes[:, half : half + 8], 4) for half in (0, 8)]
    return halves[0] + halves[1]


def _halved(lanes: np.ndarray, stride: int) -> np.ndarray:
    while stride > 0:
        lanes = lanes[..., :stride] + lanes[..., stride:]
        stride //= 2
    return lanes[..., 0]
