"""torch.compile of the eager formulas."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from bench.problems import OPERATORS
from bench.problems.shared.provider import Formula, Result


@functools.lru_cache(maxsize=1)
def _compiled(function: Callable[..., Result], shapes: tuple[Any, ...]) -> Callable[..., Result]:
    """For these shapes alone. One at a time: past eight shapes dynamo would give up on a function, silently."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def _build(formula: Formula, problem: Any) -> Callable[[], Result]:
    arguments = formula.arguments(problem)
    leaves, _ = torch.utils._pytree.tree_flatten(arguments)
    key = tuple((t.shape, t.stride(), t.dtype) if isinstance(t, torch.Tensor) else t for t in leaves)
    return functools.partial(_compiled(formula.function(problem), key), *arguments)


PROVIDERS = [
    formula.provider(operator.name, functools.partial(_build, formula))
    for operator in OPERATORS.values()
    for formula in operator.compiled()
]
