"""A GPU for benchmarks where there is none: what they do on one, every step but for the speed.

``install`` puts CUDA kernels in the emulator behind our operators, and stand-ins behind what is used of ``torch.cuda``.
A capture refuses what a GPU's would (a value that the host reads), and a replay computes into the memory of the capture
what its calls compute. Everything is synchronous, so nothing about streams is shown.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FOREVER = contextlib.ExitStack()
# In inference mode "item" comes whole.
FOR_THE_HOST = ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "lift_fresh")
# Small, so that nothing made for them is large.
MEMORY_BYTES, L2_BYTES = 1 << 30, 1 << 20


class Event:
    """The time of the host."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        return 1e3 * (end.at - self.at)


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


class Graph(TorchDispatchMode):
    """Keeps the operators that are called while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().removeprefix("aten::").partition(".")[0] in FOR_THE_HOST:
            raise RuntimeError(f"{func.name()}: operation not permitted when stream is capturing")
        results = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, results))
        return results

    def replay(self) -> None:
        for function, args, kwargs, results in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def capture(graph: Graph) -> Iterator[None]:
    with graph:
        yield


STAND_INS: dict[str, Any] = {
    "Event": Event,
    "CUDAGraph": Graph,
    "Stream": Stream,
    "current_stream": Stream,
    "graph": capture,
    "stream": lambda stream: contextlib.nullcontext(),
    "synchronize": lambda: None,
    "empty_cache": lambda: None,
    "get_device_properties": lambda index: SimpleNamespace(
        name="emulator", major=9, minor=0, multi_processor_count=132, total_memory=MEMORY_BYTES, L2_cache_size=L2_BYTES
    ),
}


def build() -> Path:
    """The module that registers the emulated operators, brought up to date; once for all processes that load it."""
    from tests.support.cuda.cuda_tools import build_emulated_operators  # needs pytest

    return build_emulated_operators()


def install(module: Path) -> None:
    """For the rest of this process."""
    spec = importlib.util.spec_from_file_location("qops_emulated", module)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    from tests.support.cuda.cuda_backend import gpu, the_emulator  # likewise

    for name, stand_in in STAND_INS.items():
        setattr(torch.cuda, name, stand_in)
    FOREVER.enter_context(gpu(the_emulator()))
