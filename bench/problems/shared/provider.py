"""One way to compute an operator."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

Axes = Mapping[str, int | str]
Result = Tensor | tuple[Tensor, ...]

OURS = "qops"
UNFUSED = "qops unfused"  # what a fused operator replaces: ours, one by one
LIMIT = "limit"
TRANSFORMERS = "rounded as Transformers"
ANYWHERE = ("cpu", "cuda")
# The vendor's library behind torch's dense products.
LIBRARIES = {"cpu": "onednn", "cuda": "cublas"}


def _always(device: str, axes: Axes) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """Who computes an operator, and how.

    Attributes:
        name: what tables show; one name has one provider for an operator.
        op: the operator, of ``problems.OPS``.
        devices: "cpu", "cuda" or both.
        build: takes the problem of the operator, packs what it needs into memory of its own, and returns the call that
            is timed. The number of threads is ``torch.get_num_threads()``. Imports the package that it wraps.
        accuracy: what is rounded, in a few words: "exact weights, fp32 sums". With "int8 activations" in it, a larger
            error is allowed.
        requires: distributions that must be installed.
        graph: whether the call can be captured into a CUDA graph.
        unsupported: takes a device and axes; why that case cannot run, None when it can.
        weight_bits: of a weight as the call reads it, where that is not as the problem stores it: 16 for a dense GEMM.
        rebuilt: whether copies of its call on a CPU have to be built one by one, of other numbers, since its library
            merges equal weights or holds them where they cannot be copied. Other calls are best a ``functools.partial``
            of what they read, which is copied as it is.
    """

    name: str
    op: str
    devices: tuple[str, ...]
    build: Callable[..., Callable[[], Result]]
    accuracy: str
    requires: tuple[str, ...] = ()
    graph: bool = True
    unsupported: Callable[[str, Axes], str | None] = _always
    weight_bits: int | None = None
    rebuilt: bool = False

    def missing(self) -> list[str]:
        """The distributions that are not installed."""
        return [name for name in self.requires if version(name) is None]


def version(distribution: str) -> str | None:
    """Of an installed distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Formula:
    """Eager PyTorch: ``function(problem)`` is a function of tensors, ``arguments(problem)`` are these."""

    name: str
    accuracy: str
    arguments: Callable[[Any], tuple[Any, ...]]
    function: Callable[[Any], Callable[..., Result]]
    devices: tuple[str, ...] = ANYWHERE
    unsupported: Callable[[str, Axes], str | None] = _always
    weight_bits: int | None = None

    def build(self, problem: Any) -> Callable[[], Result]:
        return functools.partial(self.function(problem), *self.arguments(problem))

    def provider(self, op: str, build: Callable[..., Callable[[], Result]]) -> Provider:
        more = {"unsupported": self.unsupported, "weight_bits": self.weight_bits}
        return Provider(self.name, op, self.devices, build, self.accuracy, **more)


def transformers(function: Callable[..., Result], arguments: Callable[[Any], tuple[Any, ...]]) -> Formula:
    """As its models compute it."""
    return Formula("transformers formula", TRANSFORMERS, arguments, lambda problem: function)


def dense(function: Callable[..., Result], arguments: Callable[[Any], tuple[Any, ...]]) -> list[Formula]:
    """With products by the vendor's library, of the weight as the model had it.

    On the CPU, F.linear is oneDNN's best dense product: with the weight transposed it is slower, prepacked it is the
    same (M = 1, 4 and 64 of 4096 x 4096 on a Xeon with AMX).
    """
    accuracy = "weights rounded to 16 bits"
    return [
        Formula(f"{library} F.linear", accuracy, arguments, lambda problem: function, (device,), weight_bits=16)
        for device, library in LIBRARIES.items()
    ]


def less_often(formula: Formula) -> Formula:
    """As torch.compile shows it, which may leave out roundings."""
    return replace(formula, name="torch.compile", accuracy=f"{formula.accuracy}, or less often")
