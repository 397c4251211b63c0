"""qk_norm_rotary against the formulas of Transformers' Qwen3Attention in eager PyTorch, on the layout that it expects,
and against rms_norm (twice) and rotary one after the other.

q and k are slices of one tensor, as a merged qkv projection leaves them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qops
from bench.eager_norms import EPS, transformers_norm
from bench.harness import OURS, Comparison, Provider
from qops.ops.qk_norm_rotary import qk_norm_rotary_ref
from qops.testing import random_activations

DTYPE = torch.bfloat16
TOKENS = (1, 16, 256, 2048)
HEADS = ((16, 8, 128), (4, 1, 256))  # of q, of k, head dimension: Qwen3 0.6B, Gemma 3 1B
COLD_FROM = 256


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def transformers_qk(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """q and k [T, heads, D], as views [heads, T, D] once they are normalised; cos and sin [T, D]."""
    q, k = transformers_norm(q, q_weight).transpose(0, 1), transformers_norm(k, k_weight).transpose(0, 1)
    q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
    return q.transpose(0, 1), k.transpose(0, 1)


def fused(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return qops.qk_norm_rotary(q, k, q_weight, k_weight, cos, sin, EPS)


def one_by_one(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return qops.rotary(qops.rms_norm(q, q_weight, EPS), qops.rms_norm(k, k_weight, EPS), cos, sin)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("q_heads", "k_heads", "dim"), HEADS)
def bench_qk_norm_rotary(compare: Comparison, q_heads: int, k_heads: int, dim: int, tokens: int) -> None:
    qkv = random_activations(tokens, q_heads + 2 * k_heads, dim, dtype=DTYPE, seed=0)
    weights = tuple(random_activations(dim, dtype=DTYPE, seed=seed, outliers=False) for seed in (1, 2))
    angles = torch.arange(tokens)[:, None] * 1e6 ** (-torch.arange(0, dim, 2) / dim)
    cos, sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
    doubled = (torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1))
    cold = tokens >= COLD_FROM
    copies = compare.copies(qkv.nbytes) if cold else 1
    sizes = (q_heads, k_heads, k_heads)
    split = [qkv.clone().split(sizes, dim=1)[:2] for _ in range(copies)]
    inputs = [(*pair, *weights, cos, sin) for pair in split]
    providers = [
        Provider(OURS, fused, inputs),
        Provider("transformers formula", transformers_qk, [(*pair, *weights, *doubled) for pair in split]),
        Provider("qops rms_norm, rotary", one_by_one, inputs),
    ]
    axes: dict[str, int | str] = {"T": tokens, "Hq": q_heads, "Hk": k_heads, "D": dim, "dtype": "bfloat16"}
    axes["cache"] = "cold" if cold else "hot"
    q, k = split[0]
    elements = q.numel() + k.numel()
    compare(
        "qk_norm_rotary",
        axes,
        providers,
        tuple(qk_norm_rotary_ref(x, weight, cos, sin, EPS) for x, weight in zip((q, k), weights, strict=True)),
        bytes_moved=2 * elements * DTYPE.itemsize + cos.nbytes + sin.nbytes,
        flops=7 * elements,
    )
