"""How a call is timed: verified first, then in samples of many calls, each on the next of several distinct inputs."""

from __future__ import annotations

import copy
import functools
import math
import time
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import problems
from bench.problems import Axes, Result
from bench.problems.shared import devices
from bench.problems.shared.provider import Provider

GIB = 1 << 30


@dataclass(frozen=True)
class Protocol:
    """What makes two runs comparable; it stands in the JSON document.

    Attributes:
        rounds: samples of each provider at most.
        case_seconds: what the rounds of a case may take; slow cases get fewer of them,
        least_rounds: but not fewer than this.
        sample_seconds: what the calls of a sample take together, at least.
        warm_up_seconds: of a provider before its calls are counted out.
        long_call_seconds: a call that takes longer is a sample that nothing is called before: what caches and threads
            need to wake up is less than a hundredth of it.
        rotation_cap_bytes: inputs rotate through three times the last-level cache, but no more than this: servers
            report caches of hundreds of megabytes, of which one process on a shared machine has a small part.
        rotation_cap_copies: nor through more inputs; so many layers are more than a model has of one kind. Where each
            is built on its own, there are as few as leave as many bytes between two reads of one, with what other
            providers read meanwhile.
        slowest_call_seconds: a provider that takes longer is not timed.
        timeout_seconds: a provider that does not answer in this time is given up.
    """

    rounds: int = 30
    case_seconds: float = 2.0
    least_rounds: int = 7
    sample_seconds: float = 2e-3
    warm_up_seconds: float = 20e-3
    long_call_seconds: float = 50e-3
    rotation_cap_bytes: int = GIB // 2
    rotation_cap_copies: int = 128
    slowest_call_seconds: float = 2.0
    timeout_seconds: float = 120.0


QUICK = Protocol(rounds=10, case_seconds=1.0, least_rounds=5, rotation_cap_bytes=GIB // 8, slowest_call_seconds=0.5)
FULL = Protocol(case_seconds=30.0, slowest_call_seconds=30.0, timeout_seconds=600.0)
# Every step of it, once or twice.
EMULATED = Protocol(
    rounds=2,
    case_seconds=1.0,
    least_rounds=2,
    sample_seconds=0.0,
    warm_up_seconds=0.0,
    rotation_cap_copies=2,
    slowest_call_seconds=30.0,
)

MOST_CALLS = 1000
# Some libraries hold a weight five times: with less than this part of the memory free, no copies are added.
LEAST_FREE_MEMORY = 0.15

# On a GPU: three times the L2 cache and no less than this, in no fewer copies, as outputs and whatever else a call
# touches live in the cache, too; no fewer calls than this in a graph, whose launch costs as much as one of them.
CUDA_ROTATION_BYTES = 100_000_000
CUDA_LEAST_COPIES = 8
CUDA_GRAPH_CALLS = 20


def last_level_cache_bytes() -> int:
    """The largest cache that the kernel reports; 32 MiB where it reports none."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 << 20)


def free_memory() -> float:
    """The part of the memory that is free."""
    lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
    sizes = {name: int(size) for name, size, *_ in lines}
    return sizes["MemAvailable:"] / sizes["MemTotal:"]


def rotation(bytes_per_input: int, cache_bytes: int, protocol: Protocol, memory_bytes: int, device: str) -> int:
    """How many inputs of this size pass three times the cache, within the caps and the memory for them."""
    if device != "cpu":
        target, least = max(3 * cache_bytes, CUDA_ROTATION_BYTES), CUDA_LEAST_COPIES
    else:
        target, least = min(3 * cache_bytes, protocol.rotation_cap_bytes), 1
    size = max(1, bytes_per_input)
    wanted = min(max(least, math.ceil(target / size)), protocol.rotation_cap_copies)
    return max(1, min(wanted, memory_bytes // size))


def fewest(copies: int, bytes_per_input: int, calls: int, between_bytes: int) -> int:
    """How many do for so many copies: between two reads of one pass as many bytes as all of these have, with what
    others read between two samples, and none is read twice in a sample of so many calls."""
    rounds = math.ceil(copies * bytes_per_input / (calls * bytes_per_input + between_bytes))
    return min(copies, rounds * calls)


def call_bytes(provider: Provider, axes: Axes) -> int:
    """What a call reads and writes, with the weight in the provider's form."""
    moved, _ = problems.bytes_and_flops(provider.op, axes)
    weight_bytes = problems.OPERATORS[provider.op].weight_bytes
    return moved - weight_bytes(axes) + weight_bytes(axes, provider.weight_bits)


class Unsupported(Exception):
    """A provider does not take a case, and says so. What fails without that is no such case."""


@dataclass(frozen=True)
class Error:
    """The largest one over all results, absolute, and relative to the largest value of its result."""

    absolute: float
    relative: float


def verify(provider: Provider, problem: Any, outputs: Result) -> Error:
    """Raises ValueError where the results are not those of the operator."""
    expected = problems.reference(provider.op, problem)
    got = problems.sample(provider.op, problem, outputs)
    if len(got) != len(expected):
        raise ValueError(f"wrong result: {len(got)} tensors, expected {len(expected)}")
    worst = Error(0.0, 0.0)
    for a, b in zip(got, expected, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"wrong result: shape {tuple(a.shape)}, expected {tuple(b.shape)}")
        error = float((a.double() - b).abs().max())
        largest = float(b.abs().max())
        relative = error / largest if largest else error
        if not relative <= problems.largest_error(provider):
            raise ValueError(
                f"wrong result: error {relative:.2g} of the largest value, at most {problems.largest_error(provider)}"
            )
        worst = Error(max(worst.absolute, error), max(worst.relative, relative))
    return worst


class Sampled(typing.Protocol):
    """What is timed in a round."""

    calls: int

    @property
    def made(self) -> int:
        """The calls of a sample with those that are not timed."""
        ...

    def sample(self) -> dict[str, Any]:
        """``us``, and whatever else was measured."""
        ...


class Sampler:
    """Times batches of calls, in turn; each sample starts with calls that are not timed, unless one takes long."""

    def __init__(self, calls: Sequence[Callable[[], object]], protocol: Protocol, most_calls: int = MOST_CALLS) -> None:
        self._functions = calls
        self._next = 0
        self._least_warm_up = 1
        self.calls = 1
        best, end = math.inf, time.perf_counter() + protocol.warm_up_seconds
        while best == math.inf or time.perf_counter() < end:
            best = min(best, self.seconds())
        self.calls = max(1, min(most_calls, round(protocol.sample_seconds / best)))
        if best > protocol.long_call_seconds:
            self._least_warm_up = 0

    @property
    def made(self) -> int:
        return self.calls + max(self._least_warm_up, self.calls // 4)

    def batch(self, size: int) -> list[Callable[[], object]]:
        """The next calls."""
        batch = [self._functions[(self._next + i) % len(self._functions)] for i in range(size)]
        self._next = (self._next + size) % len(self._functions)
        return batch

    def sample(self) -> dict[str, Any]:
        return {"us": 1e6 * self.seconds()}

    @staticmethod
    def run(batch: Sequence[Callable[[], object]]) -> None:
        for call in batch:
            call()

    def seconds(self) -> float:
        """Per call, of one sample."""
        # After other processes have run here, the first calls find cold caches and sleeping threads.
        self.run(self.batch(self.made - self.calls))
        batch = self.batch(self.calls)
        start = time.perf_counter_ns()
        self.run(batch)
        return (time.perf_counter_ns() - start) * 1e-9 / self.calls


class CudaSampler:
    """Times replays of a CUDA graph that calls every function in turn; a loop where the calls cannot be captured."""

    def __init__(
        self,
        calls: Sequence[Callable[[], object]],
        protocol: Protocol,
        *,
        graph: bool = True,
        least_calls: int = CUDA_GRAPH_CALLS,
    ) -> None:
        repeats = math.ceil(least_calls / len(calls))
        self._functions = [*calls] * repeats
        self._graph: torch.cuda.CUDAGraph | None = None
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what libraries allocate and choose at their first calls cannot be captured
            for call in [*calls, *calls[:3]]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        if graph:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                for call in self._functions:
                    call()
        self._replays, self.calls = 1, len(self._functions)
        best, end = math.inf, time.perf_counter() + protocol.warm_up_seconds
        while best == math.inf or time.perf_counter() < end:
            best = min(best, self.seconds())
        self._replays = max(1, min(1000, round(protocol.sample_seconds / (best * len(self._functions)))))
        self.calls = self._replays * len(self._functions)

    @property
    def made(self) -> int:
        return self.calls + len(self._functions)

    def _run(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        for call in self._functions:
            call()

    def sample(self) -> dict[str, Any]:
        return {"us": 1e6 * self.seconds()}

    def seconds(self) -> float:
        """Per call, of one sample."""
        self._run()  # after other processes have used the GPU
        self._start.record()
        for _ in range(self._replays):
            self._run()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e-3 / self.calls


def another(
    provider: Provider, axes: Axes, device: str, problem: Any, call: Callable[[], Result], seed: int
) -> Callable[[], Result]:
    """The same call in other memory; of other numbers where libraries may merge equal weights."""
    if not problems.OPERATORS[provider.op].redrawn:
        return provider.build(copy.deepcopy(problem))
    if device == "cpu" and not provider.rebuilt and isinstance(call, functools.partial):
        return copy.deepcopy(call)  # all that it reads are its arguments
    return provider.build(problems.make(provider.op, axes, devices.of_tensors(device), seed))


def cache_bytes(device: str) -> int:
    """Of the cache that inputs rotate past."""
    return torch.cuda.get_device_properties(0).L2_cache_size if device != "cpu" else last_level_cache_bytes()


def prepare(
    provider: Provider, axes: Axes, device: str, protocol: Protocol, memory_bytes: int, between_bytes: int = 0
) -> tuple[Sampled, dict[str, Any]]:
    """Builds, verifies and calibrates a provider, whose inputs may take so much memory; with what its row says.

    ``between_bytes`` is what others read between two samples of it, at least.
    """
    if reason := provider.unsupported(devices.of_providers(device), axes):
        raise Unsupported(reason)
    problem = problems.make(provider.op, axes, devices.of_tensors(device), seed=0)
    call = provider.build(problem)
    error = verify(provider, problem, call())
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    if (seconds := time.perf_counter() - start) > protocol.slowest_call_seconds:
        raise TimeoutError(f"a call takes {seconds:.1f} s, longer than is timed")
    copies, most_calls = 1, MOST_CALLS
    if axes["cache"] == "cold":
        moved = call_bytes(provider, axes)
        copies = rotation(moved, cache_bytes(device), protocol, memory_bytes, device)
        if device == "cpu" and provider.rebuilt:
            hot = Sampler([call], protocol)  # cold calls are no faster: no sample has more
            most_calls, copies = hot.calls, fewest(copies, moved, hot.made, between_bytes)
    calls = [call]
    while len(calls) < copies and (device != "cpu" or free_memory() > LEAST_FREE_MEMORY):
        calls.append(another(provider, axes, device, problem, call, len(calls)))
    found = {"max_err": error.absolute, "rel_err": error.relative, "rotated_inputs": len(calls)}
    if device == "cpu":
        return Sampler(calls, protocol, most_calls), found
    graph = {} if provider.graph else {"graph": False}
    return CudaSampler(calls, protocol, graph=provider.graph), {**found, **graph}
