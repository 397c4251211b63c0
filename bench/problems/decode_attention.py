"""decode_attention against torch's SDPA, called as fused decoder layers call it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.problems.shared.cases import Case, Selection, chosen
from bench.problems.shared.draws import Random
from bench.problems.shared.operator import Operator, Traffic, sizes_of
from bench.problems.shared.provider import Axes, Formula, transformers
from qops.ops.decode_attention import decode_attention_ref


@dataclass(frozen=True)
class DecodeAttention:
    """q [1, T, Hq, D] of the newest tokens, k and v [1, Hk, S, D] of all."""

    q: Tensor
    k: Tensor
    v: Tensor

    def arguments(self) -> tuple[Any, ...]:
        return self.q, self.k, self.v


class DecodeAttentionOperator(Operator):
    axes = "T S Hq Hk D"
    tiny = {"T": 1, "S": 40}  # noqa: RUF012 (never written)
    accuracy = "rounded once"
    # Heads of q, of k, head dimension: SmolLM2, Llama 3 8B.
    heads = ((9, 3, 64), (32, 8, 128))
    rows = (64, 512, 2048)

    def cases(self, selection: Selection) -> Iterator[Case]:
        wanted = chosen([q_heads * d for q_heads, _, d in self.heads], selection.widths)
        for dtype in selection.dtypes:
            for q_heads, kv_heads, d in self.heads:
                for s in self.rows if q_heads * d in wanted else ():
                    for cache in selection.caches_of(None):
                        axes = {"T": 1, "S": s, "Hq": q_heads, "Hk": kv_heads, "D": d, "dtype": dtype, "cache": cache}
                        yield Case(self.name, axes)

    def make(self, axes: Axes, rng: Random, dtype: torch.dtype) -> DecodeAttention:
        t, s, q_heads, kv_heads, d = sizes_of(axes, "T S Hq Hk D")
        k, v = (rng.normal(1, kv_heads, s, d).to(dtype) for _ in range(2))
        return DecodeAttention(rng.normal(1, t, q_heads, d).to(dtype), k, v)

    def exact(self, problem: DecodeAttention, rows: Tensor, columns: Tensor | None) -> tuple[Tensor, ...]:
        return (decode_attention_ref(*(x.cpu() for x in problem.arguments())),)

    def traffic(self, axes: Axes) -> Traffic:
        t, s, q_heads, kv_heads, d, size = sizes_of(axes, "T S Hq Hk D dtype")
        rows = t * q_heads * d * size
        return Traffic(rows + 2 * s * kv_heads * d * size, rows, 4 * t * q_heads * s * d)

    def formulas(self) -> list[Formula]:
        return [transformers(packed_sdpa, lambda p: p.arguments())]

    def unsupported(self, device: str, axes: Axes) -> str | None:
        return "it has no CUDA kernel" if device == "cuda" else None


def packed_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of one token: the query heads of a key/value head take the place of tokens, so that k and v are not expanded."""
    batch, _, q_heads, d = q.shape
    packed = q.reshape(batch, k.shape[1], q_heads // k.shape[1], d)
    return F.scaled_dot_product_attention(packed, k, v).reshape(q.shape)


OPERATORS = (DecodeAttentionOperator("decode_attention"),)
