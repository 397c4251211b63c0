"""qk_norm_rotary against the formulas of Transformers, and against rms_norm (twice) and rotary."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import qops
from bench.problems.rms_norm import transformers_norm
from bench.problems.rotary import Rotary, RotaryOperator, transformers_rotary
from bench.problems.shared.operator import at
from bench.problems.shared.provider import TRANSFORMERS, Formula, Result, transformers
from qops.ops.qk_norm_rotary import qk_norm_rotary_ref


class QkNormRotaryOperator(RotaryOperator):
    # Qwen3 0.6B and 8B, Gemma 3 1B.
    heads = ((16, 8, 128), (32, 8, 128), (4, 1, 256))
    normed = True
    accuracy = TRANSFORMERS
    fused = True

    def exact(self, problem: Rotary, rows: Tensor, columns: Tensor | None) -> tuple[Tensor, ...]:
        assert problem.q_weight is not None and problem.k_weight is not None
        cos, sin, positions = at(problem.cos, rows), at(problem.sin, rows), torch.arange(len(rows))
        heads = ((problem.q, problem.q_weight), (problem.k, problem.k_weight))
        return tuple(qk_norm_rotary_ref(at(x, rows), w.cpu(), cos, sin, problem.eps, positions) for x, w in heads)

    def unfused(self, problem: Rotary) -> Callable[[], Result]:
        q, k, q_weight, k_weight, cos, sin, eps = problem.arguments()

        def call() -> tuple[Tensor, Tensor]:
            return qops.rotary(qops.rms_norm(q, q_weight, eps), qops.rms_norm(k, k_weight, eps), cos, sin)

        return call

    def formulas(self) -> list[Formula]:
        return [transformers(transformers_qk, lambda p: (*p.arguments()[:4], *p.doubled(), p.eps))]


def transformers_qk(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Qwen3Attention."""
    return transformers_rotary(transformers_norm(q, q_weight, eps), transformers_norm(k, k_weight, eps), cos, sin)


OPERATORS = (QkNormRotaryOperator("qk_norm_rotary"),)
