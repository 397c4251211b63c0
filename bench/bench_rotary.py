"""rotary against the formula in Transformers' apply_rotary_pos_emb, in eager PyTorch, on the layout that it expects."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qops
from bench.harness import OURS, Comparison, Provider
from qops.testing import random_activations

DTYPE = torch.bfloat16
TOKENS = (1, 16, 256, 2048)
HEADS = ((9, 3, 64), (32, 8, 128))  # of q, of k, head dimension
COLD_FROM = 256


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def transformers_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k [T, heads, D], as views [heads, T, D]; cos and sin [T, D]."""
    q, k = q.transpose(0, 1), k.transpose(0, 1)
    q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
    return q.transpose(0, 1), k.transpose(0, 1)


def exact_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x, cos, sin = x.double(), cos.double()[:, None], sin.double()[:, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("q_heads", "k_heads", "dim"), HEADS)
def bench_rotary(compare: Comparison, q_heads: int, k_heads: int, dim: int, tokens: int) -> None:
    q = random_activations(tokens, q_heads, dim, dtype=DTYPE, seed=0)
    k = random_activations(tokens, k_heads, dim, dtype=DTYPE, seed=1)
    angles = torch.arange(tokens)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    cos, sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
    doubled = (torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1))
    cold = tokens >= COLD_FROM
    copies = compare.copies(q.nbytes + k.nbytes) if cold else 1
    rotated = [(q.clone(), k.clone()) for _ in range(copies)]
    providers = [
        Provider(OURS, qops.rotary, [(*pair, cos, sin) for pair in rotated]),
        Provider("transformers formula", transformers_rotary, [(*pair, *doubled) for pair in rotated]),
    ]
    axes: dict[str, int | str] = {"T": tokens, "Hq": q_heads, "Hk": k_heads, "D": dim, "dtype": "bfloat16"}
    axes["cache"] = "cold" if cold else "hot"
    elements = q.numel() + k.numel()
    compare(
        "rotary",
        axes,
        providers,
        (exact_rotary(q, cos, sin), exact_rotary(k, cos, sin)),
        bytes_moved=2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes,
        flops=3 * elements,
    )
