"""What a layer and a whole model have in common: sizes of linears, and cases by the names of models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from bench.problems.shared.cases import MODELS, Case, Selection, chosen
from bench.problems.shared.operator import SAMPLED_ROWS, Operator, sizes_of, spread
from bench.problems.shared.provider import Axes

ROPE_THETA = 500000.0


def linears(axes: Axes) -> dict[str, tuple[int, int]]:
    """(N, K) of each linear of a layer, by Transformers' names."""
    h, i, q_heads, k_heads, d = sizes_of(axes, "H I Hq Hk D")
    attention = {"q": (q_heads * d, h), "k": (k_heads * d, h), "v": (k_heads * d, h), "o": (h, q_heads * d)}
    mlp = {"gate": (i, h), "up": (i, h), "down": (h, i)}
    found = {f"self_attn.{name}_proj": size for name, size in attention.items()}
    return found | {f"mlp.{name}_proj": size for name, size in mlp.items()}


class ModelOperator(Operator):
    """A problem has its ``rows``, a ``device``, and a ``reference(rows)`` in float64 there.

    Many roundings follow one another, some to 8 bits. Activations have no outliers, as those of a smoothed model.
    """

    largest_error = 0.1

    def cases_of(self, name: str, sizes: dict[str, int | str], selection: Selection) -> Iterator[dict[str, int | str]]:
        """The axes before dtype and cache of a model."""
        raise NotImplementedError

    def cases(self, selection: Selection) -> Iterator[Case]:
        for dtype in selection.dtypes:
            for name in chosen(MODELS, selection.layers):
                for axes in self.cases_of(name, dict(MODELS[name]), selection):
                    yield Case(self.name, {**axes, "dtype": dtype, "cache": str(self.tiny.get("cache", "cold"))})

    def places(self, problem: Any) -> tuple[Tensor, Tensor | None]:
        return spread(problem.rows, SAMPLED_ROWS), None

    def exact(self, problem: Any, rows: Tensor, columns: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(tensor.cpu() for tensor in problem.reference(rows.to(problem.device)))

    def products(self, axes: Axes) -> int:
        """Multiplications of a row and a layer."""
        return sum(n * k for n, k in linears(axes).values())
