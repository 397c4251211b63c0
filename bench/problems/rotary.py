"""rotary against the formula of Transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.problems.shared.cases import Selection, chosen
from bench.problems.shared.draws import Random
from bench.problems.shared.operator import EPS, Operator, Traffic, at, sizes_of
from bench.problems.shared.provider import Axes, Formula, transformers
from qops.ops.rotary import rotary_ref


@dataclass(frozen=True)
class Rotary:
    """q and k [T, heads, D] are slices of one qkv tensor; cos and sin [T, D/2] in their dtype, token t at row t."""

    q: Tensor
    k: Tensor
    cos: Tensor
    sin: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    eps: float

    def arguments(self) -> tuple[Any, ...]:
        weights = () if self.q_weight is None else (self.q_weight, self.k_weight)
        return self.q, self.k, *weights, self.cos, self.sin, *((self.eps,) if weights else ())

    def doubled(self) -> tuple[Tensor, Tensor]:
        """cos and sin as Transformers keeps them, [T, D]."""
        return torch.cat((self.cos, self.cos), dim=-1), torch.cat((self.sin, self.sin), dim=-1)


class RotaryOperator(Operator):
    axes = "T Hq Hk D"
    # Heads of q, of k, head dimension: SmolLM2, Llama 3 8B and 70B.
    heads: Sequence[tuple[int, int, int]] = ((9, 3, 64), (32, 8, 128), (64, 8, 128))
    normed = False
    accuracy = "rounded once"

    def shapes(self, selection: Selection) -> list[dict[str, int | str]]:
        wanted = chosen([hq * d for hq, _, d in self.heads], selection.widths)
        return [{"Hq": hq, "Hk": hk, "D": d} for hq, hk, d in self.heads if hq * d in wanted]

    def make(self, axes: Axes, rng: Random, dtype: torch.dtype) -> Rotary:
        t, q_heads, k_heads, d = sizes_of(axes, "T Hq Hk D")
        q, k, _ = rng.activations(t, q_heads + 2 * k_heads, d).to(dtype).split((q_heads, k_heads, k_heads), dim=1)
        positions = torch.arange(t, device=rng.device)[:, None]
        angles = positions * 10000.0 ** (-torch.arange(0, d, 2, device=rng.device) / d)
        q_weight, k_weight = (rng.normal(d).to(dtype) if self.normed else None for _ in range(2))
        return Rotary(q, k, angles.cos().to(dtype), angles.sin().to(dtype), q_weight, k_weight, EPS)

    def exact(self, problem: Rotary, rows: Tensor, columns: Tensor | None) -> tuple[Tensor, ...]:
        cos, sin = at(problem.cos, rows), at(problem.sin, rows)
        return tuple(rotary_ref(at(x, rows), cos, sin, torch.arange(len(rows))) for x in (problem.q, problem.k))

    def traffic(self, axes: Axes) -> Traffic:
        t, q_heads, k_heads, d, size = sizes_of(axes, "T Hq Hk D dtype")
        elements = t * (q_heads + k_heads) * d
        return Traffic((elements + t * d) * size, elements * size, elements * (7 if self.normed else 3))

    def formulas(self) -> list[Formula]:
        return [transformers(transformers_rotary, lambda p: (p.q, p.k, *p.doubled()))]


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def transformers_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """apply_rotary_pos_emb: q and k [T, heads, D] as views [heads, T, D], the layout it expects; cos, sin [T, D]."""
    q, k = q.transpose(0, 1), k.transpose(0, 1)
    q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
    return q.transpose(0, 1), k.transpose(0, 1)


OPERATORS = (RotaryOperator("rotary"),)
