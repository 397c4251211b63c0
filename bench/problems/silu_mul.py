"""silu_mul against the formula of Transformers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.problems.shared.draws import Random
from bench.problems.shared.operator import Operator, Traffic, at, sizes_of
from bench.problems.shared.provider import Axes, Formula, transformers
from qops.ops.silu_mul import silu_mul_ref


@dataclass(frozen=True)
class SiluMul:
    """gate_up [T, 2 I], gate first; with int8 results, quantised per token by rule 127."""

    gate_up: Tensor

    def arguments(self) -> tuple[Tensor]:
        return (self.gate_up,)


class SiluMulOperator(Operator):
    axes = "T I"

    def make(self, axes: Axes, rng: Random, dtype: torch.dtype) -> SiluMul:
        t, columns = sizes_of(axes, "T I")
        return SiluMul(rng.activations(t, 2 * columns).to(dtype))

    def exact(self, problem: SiluMul, rows: Tensor, columns: Tensor | None) -> tuple[Tensor, ...]:
        gate, up = at(problem.gate_up, rows).chunk(2, dim=-1)
        return (silu_mul_ref(gate, up, rounding="fp32"),)

    def traffic(self, axes: Axes) -> Traffic:
        t, columns, size = sizes_of(axes, "T I dtype")
        return Traffic(2 * t * columns * size, t * columns * size, 5 * t * columns)

    def formulas(self) -> list[Formula]:
        return [transformers(silu_then_mul, SiluMul.arguments)]


def silu_then_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


OPERATORS = (SiluMulOperator("silu_mul"),)
