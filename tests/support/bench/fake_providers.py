"""Providers of silu_mul for the tests of the benchmarks' workers: one that works, and every way to fail."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from bench.problems.shared.provider import Provider
from bench.problems.silu_mul import SiluMul


def silu(p: SiluMul) -> Tensor:
    gate, up = p.gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def good(p: SiluMul) -> Callable[[], Tensor]:
    return functools.partial(silu, p)


def wrong(p: SiluMul) -> Callable[[], Tensor]:
    return lambda: -silu(p)


def raising(p: SiluMul) -> Callable[[], Tensor]:
    raise RuntimeError("no such shape\nand a second line")


def crashing(p: SiluMul) -> Callable[[], Tensor]:
    print("last words")
    os.kill(os.getpid(), signal.SIGSEGV)
    return good(p)


def crashing_later(p: SiluMul) -> Callable[[], Tensor]:
    """Not while it is prepared."""
    end = time.monotonic() + 0.5

    def call() -> Tensor:
        if time.monotonic() > end:
            os._exit(7)
        return silu(p)

    return call


def hanging(p: SiluMul) -> Callable[[], Tensor]:
    time.sleep(600)
    return good(p)


def importing(p: SiluMul) -> Callable[[], Tensor]:
    import a_package_that_nobody_has  # noqa: F401

    return good(p)


def never(device: str, axes: object) -> str:
    return "wider than it can"


def _provider(name: str, build: Callable[[SiluMul], Callable[[], Tensor]]) -> Provider:
    return Provider(name, "silu_mul", ("cpu",), build, "rounded")


PROVIDERS = [
    _provider("qops", good),
    _provider("good", good),
    _provider("wrong", wrong),
    _provider("raising", raising),
    _provider("crashing", crashing),
    _provider("crashing later", crashing_later),
    _provider("hanging", hanging),
    Provider("missing", "silu_mul", ("cpu",), importing, "rounded", requires=("a-package-that-nobody-has",)),
    Provider("unsupported", "silu_mul", ("cpu",), good, "rounded", unsupported=never),
]
