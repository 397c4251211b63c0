"""silu_mul_int8 against the formula of Transformers, and against silu_mul and quantize_int8."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import qops
from bench.problems.quantize_int8 import int8_rows, per_token_127
from bench.problems.shared.operator import Traffic, sizes_of
from bench.problems.shared.provider import Axes, Formula, Result, transformers
from bench.problems.silu_mul import SiluMul, SiluMulOperator, silu_then_mul


class Int8SiluMulOperator(SiluMulOperator):
    fused = True

    def exact(self, problem: SiluMul, rows: Tensor, columns: Tensor | None) -> tuple[Tensor, ...]:
        return int8_rows(*super().exact(problem, rows, columns))

    def traffic(self, axes: Axes) -> Traffic:
        t, columns = sizes_of(axes, "T I")
        return super().traffic(axes)._replace(written=t * (columns + 4), flops=8 * t * columns)

    def unfused(self, problem: SiluMul) -> Callable[[], Result]:
        return lambda: qops.quantize_int8(qops.silu_mul(problem.gate_up))

    def formulas(self) -> list[Formula]:
        return [transformers(silu_mul_then_quantize, SiluMul.arguments)]


def silu_mul_then_quantize(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return per_token_127(silu_then_mul(gate_up))


OPERATORS = (Int8SiluMulOperator("silu_mul_int8"),)
