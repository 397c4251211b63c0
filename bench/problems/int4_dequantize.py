"""int4_dequantize against eager PyTorch on the same codes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import qops
from bench.problems.int4_gemm import Int4Gemm, Int4GemmOperator
from bench.problems.shared.cases import LAYERS, Case, Selection, chosen
from bench.problems.shared.draws import Random
from bench.problems.shared.operator import SAMPLED_ROWS, Traffic, sizes_of, spread
from bench.problems.shared.provider import Axes, Formula, Result


class Int4DequantizeOperator(Int4GemmOperator):
    """The weight of int4_gemm; x says the dtype of the result."""

    axes = "layer N K G kind"
    unit = "f32"
    redrawn = False
    accuracy = "rounded once"

    def cases(self, selection: Selection) -> Iterator[Case]:
        """The weights come from memory, as nobody dequantises one twice."""
        for dtype in selection.dtypes:
            for layer in chosen(LAYERS, selection.layers):
                n, k = LAYERS[layer]
                for weight in self.weights(k, selection):
                    sizes = {"layer": layer, "N": n, "K": k}
                    yield Case(self.name, {**sizes, **weight, "dtype": dtype, "cache": "cold"})

    def make(self, axes: Axes, rng: Random, dtype: torch.dtype) -> Int4Gemm:
        return super().make({**axes, "M": 1}, rng, dtype)

    def places(self, problem: Int4Gemm) -> tuple[Tensor, Tensor | None]:
        return spread(problem.n, SAMPLED_ROWS), None

    def exact(self, problem: Int4Gemm, rows: Tensor, columns: Tensor | None) -> tuple[Tensor, ...]:
        return (problem.dequantize(rows).cpu(),)

    def weight_bytes(self, axes: Axes, bits: int | None = None) -> int:
        """No provider has another form of it."""
        return 0

    def traffic(self, axes: Axes) -> Traffic:
        n, k, size = sizes_of(axes, "N K dtype")
        return Traffic(self.stored_bytes(axes), n * k * size, 2 * n * k)

    def ours(self, problem: Int4Gemm) -> Callable[[], Result]:
        return functools.partial(qops.int4_dequantize, problem.packed(), problem.x.dtype)

    def formulas(self) -> list[Formula]:
        return [Formula("torch eager", "in 16 bits", lambda p: (None, p.x.dtype), lambda p: p.dequantize)]


OPERATORS = (Int4DequantizeOperator("int4_dequantize"),)
