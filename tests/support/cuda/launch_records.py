"""What the emulator's runtime has recorded: emulated.take_calls()."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

from tests.support.cuda.cuda_tools import checked


@dataclass(frozen=True)
class Launch:
    """A line of the record."""

    kernel: str  # its address
    gpu: int
    stream: int
    grid: int
    threads: int
    shared: int
    is_dependent: bool  # on the launch before
    has_told: bool  # the next one that it may start


def launches(record: list[str]) -> list[Launch]:
    found = []
    for line in record:
        verb, *words = line.split()
        if verb == "launch":
            gpu, stream, is_dependent = int(words[2]), int(words[4], 16), words[11:] == ["dependent"]
            grid, threads, shared = map(int, words[6:11:2])
            found.append(Launch(words[0], gpu, stream, grid, threads, shared, is_dependent, has_told=False))
        elif verb == "told":
            assert found[-1].kernel == words[0]
            found[-1] = dataclasses.replace(found[-1], has_told=True)
    return found


def limits(record: list[str]) -> dict[str, list[int]]:
    """Bytes that kernels have been allowed, by kernel."""
    found: dict[str, list[int]] = {}
    for line in record:
        if line.startswith("limit "):
            found.setdefault(line.split()[1], []).append(int(line.split()[2]))
    return found


@functools.cache
def kernel_names(module: str) -> dict[str, str]:
    """The functions of a module that is loaded, by address; many kernels have no dynamic symbol."""
    mapped = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
    base = min(int(words[0].partition("-")[0], 16) for words in mapped if words[-1] == module)
    symbols = (line.split(maxsplit=2) for line in checked("nm", "-C", "--defined-only", module).splitlines())
    return {hex(base + int(place, 16)): name for place, kind, name in symbols if kind in "tTwW"}
