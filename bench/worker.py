"""The process of a provider: prepares its calls, and takes a sample when it is asked.

``python -m bench.worker OPTIONS``, where OPTIONS are those of ``Options`` as JSON, answers requests that come through a
pipe. What libraries print goes to stderr; a crash ends this process alone.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from bench import limits, problems, providers, timing
from bench.problems import Axes
from bench.providers import LIMIT
from bench.timing import CudaSampler, Sampler


@dataclass(frozen=True)
class Options:
    """What a worker is told when it starts.

    Attributes:
        file: descriptor of the pipe.
        device: "cpu" or "cuda".
        threads: of torch, and of whatever a provider runs.
        modules: where providers are looked for.
        protocol: fields of ``timing.Protocol``.
    """

    file: int
    device: str
    threads: int
    modules: list[str]
    protocol: dict[str, Any]


class Sampled(Protocol):
    """What is timed in a round."""

    calls: int

    def sample(self) -> dict[str, Any]: ...


class Worker:
    """The methods are the requests; what they return is sent back, and what they raise, as text."""

    def __init__(self, options: Options) -> None:
        self._device, self._modules = options.device, options.modules
        self._protocol = timing.Protocol(**options.protocol)
        self._sampled: dict[str, Sampled] = {}

    def machine(self) -> dict[str, Any]:
        """The GPU, on which the parent has no context."""
        properties = torch.cuda.get_device_properties(0)
        return {
            "name": properties.name,
            "sm": f"{properties.major}{properties.minor}",
            "sms": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
        }

    def prepare(self, name: str, op: str, axes: Axes, memory_bytes: int) -> dict[str, Any]:
        """Builds, verifies and calibrates; copies of the inputs may take so much memory."""
        if name == LIMIT:
            limit = (
                limits.CudaLimit(op, axes, self._protocol)
                if self._device == "cuda"
                else limits.CpuLimit(op, axes, self._protocol, memory_bytes)
            )
            return self._ready(name, limit, {"rotated_inputs": limit.copies, "peak_kind": limit.kind})
        provider = next(p for p in providers.all(op, self._device, self._modules) if p.name == name)
        if reason := provider.unsupported(self._device, axes):
            raise NotImplementedError(reason)
        problem = problems.make(op, axes, self._device, seed=0)
        call = provider.build(problem)
        error = timing.verify(provider, problem, call())
        if (seconds := self._seconds(call)) > self._protocol.slowest_call_seconds:
            raise TimeoutError(f"a call takes {seconds:.1f} s, longer than is timed")
        copies = 1
        if axes["cache"] == "cold":
            size = timing.call_bytes(provider, axes)
            cache_bytes = (
                torch.cuda.get_device_properties(0).L2_cache_size
                if self._device == "cuda"
                else timing.last_level_cache_bytes()
            )
            copies = timing.rotation(size, cache_bytes, self._protocol, memory_bytes, self._device)
        rest = (problems.make(op, axes, self._device, seed=seed) for seed in range(1, copies))
        calls = [call, *(provider.build(problem) for problem in rest)]
        sampler: Sampled = (
            CudaSampler(calls, self._protocol, graph=provider.graph)
            if self._device == "cuda"
            else Sampler(calls, self._protocol)
        )
        found = {"max_err": error.absolute, "rel_err": error.relative, "rotated_inputs": copies}
        if not provider.graph and self._device == "cuda":
            found["graph"] = False
        return self._ready(name, sampler, found)

    def _ready(self, name: str, sampled: Sampled, found: dict[str, Any]) -> dict[str, Any]:
        self._sampled[name] = sampled
        gc.collect()
        start = time.perf_counter()
        self.sample(name)
        return {**found, "calls_per_sample": sampled.calls, "seconds": time.perf_counter() - start}

    def _seconds(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def sample(self, name: str) -> dict[str, Any]:
        """One sample: ``us``, and what else a limit has measured."""
        return self._sampled[name].sample()

    def release(self) -> None:
        """Frees what ``prepare`` has made."""
        self._sampled.clear()
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)


def serve(connection: Connection, worker: Worker) -> None:
    """Answers requests (method, arguments) with (True, result) or (False, reason), until the pipe closes."""
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = True, getattr(worker, method)(**arguments)
        except Exception as error:
            text = str(error).strip() or "no message"
            answer = False, f"{type(error).__name__}: {text.splitlines()[0][:300]}"
            del error
        connection.send(answer)


def main() -> None:
    options = Options(**json.loads(sys.argv[1]))
    if sys.platform == "linux":  # so that it never outlives the parent, not even when it is stopped
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    os.dup2(2, 1)
    torch.set_num_threads(options.threads)
    gc.disable()
    with torch.inference_mode():
        serve(Connection(options.file), Worker(options))


if __name__ == "__main__":
    main()
