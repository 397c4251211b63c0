"""Whole models from a GGUF file on a CPU: an adapter for each library. ``bench/whole_model.py`` times them.

A module has a list ``RUNNERS`` and imports what it wraps when a runner is opened.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# In the order of tables, ours first.
MODULES = ("bench.peers.models.ours", "bench.peers.models.llama_cpp", "bench.peers.models.ik_llama_cpp")
# Of the keys and values that a peer keeps room for.
CAPACITY = 512


class Model(Protocol):
    """One sequence of tokens, on as many threads as ``torch.get_num_threads()``."""

    def restart(self) -> None:
        """Forgets all tokens."""
        ...

    def feed(self, tokens: Sequence[int]) -> None:
        """The next ones, in one call of the library."""
        ...

    def logits(self) -> np.ndarray:
        """float32 [V], of the token after the last one."""
        ...


def one_by_one(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """Seconds of the tokens, each fed behind the one before."""
    model.restart()
    model.feed(prompt)
    start = time.perf_counter()
    for token in tokens:
        model.feed([token])
    return time.perf_counter() - start


@dataclass(frozen=True)
class Runner:
    """Attributes:
    name: what tables show.
    open: takes the file and the number of threads.
    accuracy: what is rounded.
    requires: distributions that must be installed.
    decode_seconds: what the tokens behind a prompt take.
    """

    name: str
    open: Callable[[Path, int], Model]
    accuracy: str
    requires: tuple[str, ...]
    decode_seconds: Callable[[Any, Sequence[int], Sequence[int]], float] = one_by_one
