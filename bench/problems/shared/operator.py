"""An operator as benchmarks know it: cases, inputs and exact results, what it moves, and who computes it in torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import qops
from bench.problems.shared.cases import TINY, TOKENS, WIDTHS, Case, Selection, chosen
from bench.problems.shared.draws import Random
from bench.problems.shared.provider import (
    ANYWHERE,
    OURS,
    TRANSFORMERS,
    UNFUSED,
    Axes,
    Formula,
    Provider,
    Result,
    less_often,
)

EPS = 1e-5
# A larger reference is computed at so many rows and columns alone: the first, the last and some between.
SAMPLE_FROM = 1 << 18
SAMPLED_ROWS, SAMPLED_COLUMNS = 48, 256
LARGEST_ERROR_OF_INT8_ACTIVATIONS = 0.1


class Traffic(NamedTuple):
    """What a call must read and write at least, in bytes, and its multiplications and additions."""

    read: int
    written: int
    flops: int


def dtype_of(axes: Axes) -> torch.dtype:
    return getattr(torch, str(axes["dtype"]))


def sizes_of(axes: Axes, names: str) -> list[int]:
    """Of a dtype, that of an element in bytes."""
    return [dtype_of(axes).itemsize if name == "dtype" else int(axes[name]) for name in names.split()]


def at(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows of it, on the CPU."""
    return tensor[index.to(tensor.device)].cpu()


def spread(size: int, limit: int) -> Tensor:
    """All indices, or the first and last quarters of ``limit`` and as many spread over what lies between."""
    if size <= limit:
        return torch.arange(size)
    edge = limit // 4
    middle = torch.linspace(edge, size - edge - 1, limit - 2 * edge).long()
    return torch.cat((torch.arange(edge), middle, torch.arange(size - edge, size)))


class Operator:
    """One of those that a file of ``bench/problems`` has in its ``OPERATORS``; here, one that works on rows.

    A problem is a dataclass of its inputs, the first of which has a row for each token. Its ``arguments()`` are those
    of the operator.

    Attributes:
        axes: of a case, in their order, before dtype and cache.
        tiny: values that a case in an emulator has, where not those of all operators.
        unit: what its products could use, of ``limits.KINDS``. 16-bit floats hold the codes of a weight exactly.
        largest_error: a result further off, relative to its largest value, is another operation. It tells a rounding
            from that, not good roundings from bad ones: the error itself stands in every row, beside the class.
        redrawn: whether copies of its inputs are other numbers, as libraries may merge equal weights.
        accuracy: of ours.
        fused: whether ``unfused`` does the same by our operators, one by one.
        comes_last: whether a process that has run it is another one for those after it: with Transformers and a model
            in it, an int8 layer at M = 1 takes 255 us instead of 242.
    """

    axes: str
    tiny: dict[str, int | str] = {}  # noqa: RUF012 (never written)
    unit = "f32"
    largest_error = 0.02
    redrawn = False
    accuracy = TRANSFORMERS
    fused = False
    comes_last = False

    def __init__(self, name: str) -> None:
        self.name = name

    def shapes(self, selection: Selection) -> list[dict[str, int | str]]:
        """What cases have besides tokens, dtype and cache: widths of a row."""
        width = self.axes.split()[1]
        return [{width: size} for size in chosen(WIDTHS[width], selection.widths)]

    def make(self, axes: Axes, rng: Random, dtype: torch.dtype) -> Any:
        """The problem of a case."""
        raise NotImplementedError

    def exact(self, problem: Any, rows: Tensor, columns: Tensor | None) -> tuple[Tensor, ...]:
        """The results in float64, before any rounding, on the CPU, at these rows and columns; None for all."""
        raise NotImplementedError

    def traffic(self, axes: Axes) -> Traffic:
        raise NotImplementedError

    def weight_bytes(self, axes: Axes, bits: int | None = None) -> int:
        """Of quantised weights as the problem stores them, or dense with so many bits a value."""
        return 0

    def ours(self, problem: Any) -> Callable[[], Result]:
        return functools.partial(getattr(qops, self.name), *problem.arguments())

    def unfused(self, problem: Any) -> Callable[[], Result]:
        raise NotImplementedError

    def unsupported(self, device: str, axes: Axes) -> str | None:
        """Why ours cannot run a case."""
        return None

    def formulas(self) -> list[Formula]:
        """The strongest that torch has."""
        raise NotImplementedError

    def compiled(self) -> list[Formula]:
        """What torch.compile gets, named as tables name that: the first."""
        return [less_often(self.formulas()[0])]

    def providers(self) -> list[Provider]:
        """Without what is compiled."""
        found = [Provider(OURS, self.name, ANYWHERE, self.ours, self.accuracy, unsupported=self.unsupported)]
        found += [Provider(UNFUSED, self.name, ANYWHERE, self.unfused, self.accuracy)] if self.fused else []
        return found + [formula.provider(self.name, formula.build) for formula in self.formulas()]

    def cases(self, selection: Selection) -> Iterator[Case]:
        for dtype in selection.dtypes:
            for shape in self.shapes(selection):
                for tokens in chosen(TOKENS, selection.tokens):
                    for cache in selection.caches_of(tokens):
                        yield Case(self.name, {"T": tokens, **shape, "dtype": dtype, "cache": cache})

    def tiny_case(self) -> Case:
        found = {**TINY, **self.tiny}
        return Case(self.name, {name: found[name] for name in (*self.axes.split(), "dtype", "cache")})

    def places(self, problem: Any) -> tuple[Tensor, Tensor | None]:
        """Rows and columns where the reference is computed; only GEMMs leave out columns, as their outputs stand
        alone."""
        x = next(iter(vars(problem).values()))
        return spread(x.shape[0], SAMPLED_ROWS if x.numel() > SAMPLE_FROM else x.shape[0]), None

    def reference(self, problem: Any) -> tuple[Tensor, ...]:
        return self.exact(problem, *self.places(problem))

    def sample(self, problem: Any, outputs: Result) -> tuple[Tensor, ...]:
        """The part of its results that ``reference`` gives, on the CPU. Other shapes are a ValueError."""
        rows, columns = self.places(problem)
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        sizes = tuple(int(places[-1]) + 1 for places in (rows, columns) if places is not None)
        for tensor in tensors:
            if tensor.shape[: len(sizes)] != sizes:
                raise ValueError(f"wrong result: shape {tuple(tensor.shape)}, expected to start with {sizes}")
        taken = [tensor[rows.to(tensor.device)] for tensor in tensors]
        if columns is not None:
            taken = [tensor[:, columns.to(tensor.device)] for tensor in taken]
        return tuple(tensor.cpu() for tensor in taken)
