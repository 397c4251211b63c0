"""The process of a provider: prepares its calls, and takes a sample when it is asked.

``python -m bench.timing.worker OPTIONS``, where OPTIONS are those of ``Options`` as JSON, answers requests that come
through a pipe. What libraries print goes to stderr; a crash ends this process alone.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.peers import providers
from bench.problems import Axes
from bench.problems.shared import devices
from bench.problems.shared.provider import LIMIT
from bench.timing import emulated, limits, samplers
from bench.timing.samplers import Sampled


@dataclass(frozen=True)
class Options:
    """What a worker is told when it starts.

    Attributes:
        file: descriptor of the pipe.
        device: of ``devices.KINDS``.
        threads: of torch, and of whatever a provider runs.
        modules: where providers are looked for.
        protocol: fields of ``samplers.Protocol``.
        emulator: the module of ``bench.timing.emulated``, where that is the device.
    """

    file: int
    device: str
    threads: int
    modules: list[str]
    protocol: dict[str, Any]
    emulator: str | None = None


class Worker:
    """The methods are the requests; what they return is sent back, and what they raise, as text."""

    def __init__(self, options: Options) -> None:
        self._device, self._modules = options.device, options.modules
        self._protocol = samplers.Protocol(**options.protocol)
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

    def prepare(self, name: str, op: str, axes: Axes, memory_bytes: int, between_bytes: int) -> dict[str, Any]:
        """Builds, verifies and calibrates; copies of the inputs may take so much memory, and others read as much
        between two samples."""
        if name == LIMIT:
            limit = (
                limits.CpuLimit(op, axes, self._protocol, memory_bytes)
                if self._device == "cpu"
                else limits.CudaLimit(op, axes, self._protocol, self._device)
            )
            sampled, found = limit, {"rotated_inputs": limit.copies, "peak_kind": limit.kind}
        else:
            provider = next(
                p for p in providers.all(op, devices.of_providers(self._device), self._modules) if p.name == name
            )
            sampled, found = samplers.prepare(provider, axes, self._device, self._protocol, memory_bytes, between_bytes)
        self._sampled[name] = sampled
        if self._device != "cpu":
            gc.collect()  # its memory is scarcer
        start = time.perf_counter()
        self.sample(name)
        return {
            **found,
            "calls_per_sample": sampled.calls,
            "made": sampled.made,
            "seconds": time.perf_counter() - start,
        }

    def healthy(self) -> bool:
        """Whether CUDA works in this process: after an error in a kernel it never does again."""
        if self._device != "cpu":
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                return False
        return True

    def sample(self, name: str) -> dict[str, Any]:
        """One sample: ``us``, and what else a limit has measured."""
        return self._sampled[name].sample()

    def release(self) -> None:
        """Frees what ``prepare`` has made."""
        self._sampled.clear()
        gc.collect()
        if self._device != "cpu":
            torch.cuda.empty_cache()
            return
        gc.freeze()  # what is left is a compiler's, which takes 0.2 s to look through
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)


def serve(connection: Connection, worker: Worker) -> None:
    """Answers requests (method, arguments) with (True, result) or (False, reason), until the pipe closes.

    The first answer, to nothing, says that it has started.
    """
    connection.send((True, None))
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
        if not worker.healthy():
            return


def main() -> None:
    options = Options(**json.loads(sys.argv[1]))
    if sys.platform == "linux":  # it must not outlive the parent, above all not stopped
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    os.dup2(2, 1)
    torch.set_num_threads(options.threads)
    gc.disable()
    gc.freeze()  # what was imported is not looked through after each case
    if options.emulator is not None:
        emulated.install(Path(options.emulator))
    with torch.inference_mode():
        serve(Connection(options.file), Worker(options))


if __name__ == "__main__":
    main()
