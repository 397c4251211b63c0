"""What is computed, an operator a file: its inputs, made from a seed, exact results, cases, and what torch has for it.

A file is found by its name, which is that of an operator; ``OPERATORS`` in it are this one and forms that share its
kernel. ``make`` is a pure function of its arguments, so each process makes its own inputs and none are sent around.
Another seed gives other numbers everywhere: copies with equal contents would be merged by libraries that look for them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from bench.problems.shared import devices
from bench.problems.shared.cases import BENCHMARKED, Case, Selection
from bench.problems.shared.draws import Random
from bench.problems.shared.operator import LARGEST_ERROR_OF_INT8_ACTIVATIONS, Operator, dtype_of
from bench.problems.shared.provider import Axes, Provider, Result


def found(package: Any) -> Iterator[Operator]:
    """Those of the files of a package, then of its folders."""
    modules = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    names = [module.name for module in modules if not module.ispkg and ".shared." not in module.name]
    for name in sorted(names, key=lambda name: name.count(".")):
        operators = importlib.import_module(name).OPERATORS
        if name.rpartition(".")[2] not in {operator.name for operator in operators}:
            raise ValueError(f"{name}: OPERATORS must hold the operator of that name")
        yield from operators


OPERATORS = {
    operator.name: operator
    for operator in sorted(found(importlib.import_module(__name__)), key=lambda operator: operator.comes_last)
}
OPS = tuple(OPERATORS)


def cases(op: str, selection: Selection) -> list[Case]:
    """Those of an operator."""
    operator = OPERATORS[op]
    return [operator.tiny_case()] if selection.tiny else list(operator.cases(selection))


def benchmarked(op: str) -> list[Case]:
    """Those of ``pytest bench``, on the device that it takes."""
    return cases(op, BENCHMARKED[devices.chosen()])


def make(op: str, axes: Axes, device: str = "cpu", seed: int = 0) -> Any:
    """The inputs of one case."""
    if op not in OPERATORS:
        raise ValueError(f"no operator {op!r}; there are {', '.join(OPS)}")
    return OPERATORS[op].make(axes, Random(device, seed), dtype_of(axes))


def sample(op: str, problem: Any, outputs: Result) -> tuple[Tensor, ...]:
    """The part of an operator's results that ``reference`` gives, on the CPU. Other shapes are a ValueError."""
    return OPERATORS[op].sample(problem, outputs)


def reference(op: str, problem: Any) -> tuple[Tensor, ...]:
    """The exact results in float64, before any rounding; of a large problem at the rows and columns of ``sample``."""
    return OPERATORS[op].reference(problem)


def largest_error(provider: Provider) -> float:
    """What is further off, relative to the largest value, is another operation."""
    coarse = LARGEST_ERROR_OF_INT8_ACTIVATIONS if "int8 activations" in provider.accuracy else 0.0
    return max(OPERATORS[provider.op].largest_error, coarse)


def bytes_and_flops(op: str, axes: Axes) -> tuple[int, int]:
    """What must be read and written at least, and the multiplications and additions."""
    read, written, flops = OPERATORS[op].traffic(axes)
    return read + written, flops
