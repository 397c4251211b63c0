"""What GEMMs have in common: ``y[M, N] = x[M, K] @ w[N, K].T`` for the layers of models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.problems.shared.cases import LAYERS, ROWS, Case, Selection, chosen
from bench.problems.shared.operator import (
    SAMPLE_FROM,
    SAMPLED_COLUMNS,
    SAMPLED_ROWS,
    Operator,
    Traffic,
    at,
    sizes_of,
    spread,
)
from bench.problems.shared.provider import Axes, Formula, dense


class Gemm(Operator):
    """The first input of a problem is [M, K]; its ``n`` is N, and its ``dense()`` are x and the weight in 16 bits."""

    unit = "bf16"
    redrawn = True

    def weights(self, k: int, selection: Selection) -> list[dict[str, int | str]]:
        """Forms of a weight, by their axes."""
        raise NotImplementedError

    def cases(self, selection: Selection) -> Iterator[Case]:
        for dtype in selection.dtypes:
            for layer in chosen(LAYERS, selection.layers):
                n, k = LAYERS[layer]
                for m in chosen(ROWS, selection.rows):
                    for weight in self.weights(k, selection):
                        for cache in selection.caches_of(None):
                            sizes = {"layer": layer, "M": m, "N": n, "K": k}
                            yield Case(self.name, {**sizes, **weight, "dtype": dtype, "cache": cache})

    def places(self, problem: Any) -> tuple[Tensor, Tensor | None]:
        m, k = next(iter(vars(problem).values())).shape
        if problem.n * k <= SAMPLE_FROM and m * problem.n <= SAMPLE_FROM:
            return torch.arange(m), torch.arange(problem.n)
        return spread(m, SAMPLED_ROWS), spread(problem.n, SAMPLED_COLUMNS)

    def stored_bytes(self, axes: Axes) -> int:
        """Of the quantised weight."""
        raise NotImplementedError

    def weight_bytes(self, axes: Axes, bits: int | None = None) -> int:
        n, k = sizes_of(axes, "N K")
        return self.stored_bytes(axes) if bits is None else n * k * bits // 8

    def traffic(self, axes: Axes) -> Traffic:
        m, n, k, size = sizes_of(axes, "M N K dtype")
        return Traffic(self.weight_bytes(axes) + m * k * size, m * n * size, 2 * m * n * k)

    def formulas(self) -> list[Formula]:
        return dense(F.linear, lambda problem: problem.dense())

    def compiled(self) -> list[Formula]:
        return []


class WeightOnly:
    """A problem with x, scales [N, K / G], and the weight by its ``dequantize``."""

    x: Tensor
    scales: Tensor

    @property
    def n(self) -> int:
        return self.scales.shape[0]

    def dequantize(self, rows: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
        """The weight [N, K], or the named rows of it, computed in ``dtype``: float64 is exact."""
        raise NotImplementedError

    def dense(self) -> tuple[Tensor, Tensor]:
        return self.x, self.dequantize(dtype=torch.float32).to(self.x.dtype)


class WeightOnlyGemm(Gemm):
    accuracy = "exact weights, fp32 sums"

    def exact(self, problem: WeightOnly, rows: Tensor, columns: Tensor | None) -> tuple[Tensor, ...]:
        return (at(problem.x, rows).double() @ problem.dequantize(columns).cpu().T,)
