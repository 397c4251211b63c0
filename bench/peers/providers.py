"""Who computes it: the adapters of ``bench/peers``, found by operator and device."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.peers import MODULES
from bench.problems import Axes, Result, models

OURS = "qops"
LIMIT = "limit"
DEFAULT_MODULES = MODULES
# What torch alone has, and nothing that compiles.
EAGER_MODULES = ("bench.peers.ours", *(f"bench.peers.pytorch.{name}" for name in ("vendor", "eager", "decode")))
# Largest error of a result, relative to its largest value. These tell a rounding from another operation, not good
# roundings from bad ones: the error itself stands in every row, beside the class.
LARGEST_ERROR = 0.02
LARGEST_ERROR_OF_INT8_ACTIVATIONS = 0.1
LARGEST_ERROR_OF_MODELS = 0.1  # many roundings one after the other, and 8-bit activations


def _always(device: str, axes: Axes) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """One way to compute an operator.

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

    def missing(self) -> list[str]:
        """The distributions that are not installed."""
        return [name for name in self.requires if version(name) is None]

    @property
    def largest_error(self) -> float:
        """A result further off, relative to its largest value, is another operation."""
        if self.op in models.OPS:
            return LARGEST_ERROR_OF_MODELS
        return LARGEST_ERROR_OF_INT8_ACTIVATIONS if "int8 activations" in self.accuracy else LARGEST_ERROR


def version(distribution: str) -> str | None:
    """Of an installed distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def all(op: str, device: str, modules: Sequence[str] = DEFAULT_MODULES) -> list[Provider]:
    """Every provider of an operator on a kind of device, ours first, installed or not."""
    lists = [importlib.import_module(name).PROVIDERS for name in modules]
    found = [p for providers in lists for p in providers if p.op == op and device in p.devices]
    names = [provider.name for provider in found]
    assert len(set(names)) == len(names), f"{op}: providers of one name: {names}"
    return found
