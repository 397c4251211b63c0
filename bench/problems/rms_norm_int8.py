"""rms_norm_int8 and add_rms_norm_int8 against eager PyTorch, and against this library's operators one by one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import qops
from bench.problems.quantize_int8 import int8_rows, per_token_127
from bench.problems.rms_norm import Norm, NormOperator
from bench.problems.shared.operator import Traffic, sizes_of
from bench.problems.shared.provider import Axes, Result


class Int8NormOperator(NormOperator):
    fused = True

    def results(self, y: Tensor) -> tuple[Tensor, ...]:
        return int8_rows(y)

    def traffic(self, axes: Axes) -> Traffic:
        (t, h, size), found = sizes_of(axes, "T H dtype"), super().traffic(axes)
        return found._replace(written=found.written - t * h * size + t * (h + 4), flops=found.flops + 3 * t * h)

    def form(self, norm: Callable[..., Tensor]) -> Callable[..., Result]:
        return with_residual_to_int8(norm) if self.adds else to_int8(norm)

    def unfused(self, problem: Norm) -> Callable[[], Result]:
        given = problem.arguments()
        if not self.adds:
            return lambda: qops.quantize_int8(qops.rms_norm(*given))

        def call() -> tuple[Tensor, ...]:
            y, z = qops.add_rms_norm(*given)
            return *qops.quantize_int8(y), z

        return call


def to_int8(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def norm_int8(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return per_token_127(norm(x, weight, eps))

    return norm_int8


def with_residual_to_int8(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def add_norm_int8(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        z = x + residual
        return *per_token_127(norm(z, weight, eps)), z

    return add_norm_int8


OPERATORS = (Int8NormOperator("rms_norm_int8"), Int8NormOperator("add_rms_norm_int8"))
