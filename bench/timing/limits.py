"""What the machine can do at most, measured in the rounds of a case like a provider.

On a CPU the stream reads and writes as much as a call of the operator, over as many copies: large blocks would be
disturbed more by whatever else runs. On a GPU, one large copy and product show what no call passes.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench import problems
from bench.problems import Axes
from bench.problems.shared import devices
from bench.timing.samplers import CudaSampler, Protocol, Sampler, last_level_cache_bytes, rotation

LINE_BYTES = 64
KINDS = ("f32", "bf16", "int8")


def lower_bound_us(op: str, axes: Axes, bandwidth_gbs: float, peak_gflops: float) -> float:
    """No call can take less: its memory traffic, or its arithmetic."""
    moved, flops = problems.bytes_and_flops(op, axes)
    return max(moved / bandwidth_gbs, flops / peak_gflops) * 1e-3


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """limits.cpp, compiled for this CPU."""
    with tempfile.TemporaryDirectory(prefix="qops-limits-") as folder:
        path = Path(folder, "limits.so")
        source = Path(__file__).with_suffix(".cpp")
        command = ["g++", "-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", source, "-o", path]
        subprocess.run(command, check=True, capture_output=True)
        loaded = ctypes.CDLL(str(path))
    loaded.qops_peak.restype = ctypes.c_double
    loaded.qops_peak.argtypes = [ctypes.c_int, ctypes.c_int64]
    loaded.qops_stream.restype = ctypes.c_int64
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    loaded.qops_stream.argtypes = [pointer, size, pointer, size, ctypes.c_int, ctypes.c_int]
    return loaded


def _round_up(size: int) -> int:
    return -(-size // LINE_BYTES) * LINE_BYTES


class CpuLimit:
    """Bandwidth of the call's own traffic, and the peak of the unit that it could use."""

    def __init__(self, op: str, axes: Axes, protocol: Protocol, memory_bytes: int) -> None:
        moved, _ = problems.bytes_and_flops(op, axes)
        self.kind, self._op, self._axes = problems.OPERATORS[op].unit, op, axes
        cold = axes["cache"] == "cold"
        self.copies = rotation(moved, last_level_cache_bytes(), protocol, memory_bytes, "cpu") if cold else 1
        written = _round_up(problems.OPERATORS[op].traffic(axes).written)
        read = max(_round_up(moved) - written, written)
        self._moved = read + written
        # Random, as equal pages might be shared.
        source = torch.empty(self.copies * read // 8, dtype=torch.int64).random_()
        target = torch.zeros(self.copies * written // 8, dtype=torch.int64)
        self._keep = source, target
        stream, start, end = library().qops_stream, source.data_ptr(), target.data_ptr()

        def calls(streams: int, past_cache: int) -> list[functools.partial[int]]:
            return [
                functools.partial(stream, start + i * read, read, end + i * written, written, streams, past_cache)
                for i in range(self.copies)
            ]

        ways = [(streams, past_cache) for streams in (1, 4) for past_cache in (0, 1)]
        samplers = [Sampler(calls(*way), protocol) for way in ways]
        self._sampler = min(samplers, key=lambda sampler: min(sampler.seconds() for _ in range(3)))
        self.calls, self.made = self._sampler.calls, self._sampler.made
        if library().qops_peak(KINDS.index(self.kind), 1) == 0:
            self.kind = "f32"
        self._rounds = 1000
        self._rounds = max(1, round(self._rounds * protocol.sample_seconds / 2 / self._peak()[0]))

    def _peak(self) -> tuple[float, float]:
        """Seconds and operations."""
        peak, kind = library().qops_peak, KINDS.index(self.kind)
        peak(kind, max(1, self._rounds // 4))  # clocks and units wake up
        start = time.perf_counter()
        operations = peak(kind, self._rounds)
        return time.perf_counter() - start, operations

    def sample(self) -> dict[str, Any]:
        seconds, operations = self._peak()
        bandwidth, peak = self._moved / self._sampler.seconds() * 1e-9, operations / seconds * 1e-9
        us = lower_bound_us(self._op, self._axes, bandwidth, peak)
        return {"us": us, "bandwidth_gbs": bandwidth, "peak_gflops": peak}


# Bytes of the copy, and sizes of the products.
CUDA_COPY_BYTES = {"cuda": 256 << 20, "emulated": 1 << 20}
CUDA_SIZES = {
    "cuda": {"f32": 4096, "bf16": 8192, "int8": 8192},
    "emulated": {"f32": 64, "bf16": 64, "int8": 64},
}


class CudaLimit:
    """torch's copy and cuBLAS. Hot, the copy is of the operator's own size."""

    def __init__(self, op: str, axes: Axes, protocol: Protocol, device: str) -> None:
        moved, _ = problems.bytes_and_flops(op, axes)
        self.kind, self._op, self._axes, self.copies = problems.OPERATORS[op].unit, op, axes, 1
        place = devices.of_tensors(device)
        self._copied = CUDA_COPY_BYTES[device] if axes["cache"] == "cold" else max(1, moved // 2)
        source, target = (torch.zeros(self._copied, dtype=torch.uint8, device=place) for _ in range(2))
        self._copy = CudaSampler([functools.partial(target.copy_, source)], protocol)
        self.calls, self.made = self._copy.calls, self._copy.made
        n = CUDA_SIZES[device][self.kind]
        self._operations = 2 * n**3
        if self.kind == "int8":
            a, b = (torch.randint(-127, 128, (n, n), dtype=torch.int8, device=place) for _ in range(2))
            product = functools.partial(torch._int_mm, a, b.T)
        else:
            dtype = torch.float32 if self.kind == "f32" else problems.dtype_of(axes)
            a, b = (torch.randn(n, n, dtype=dtype, device=place) for _ in range(2))
            product = functools.partial(torch.matmul, a, b)
        self._product = CudaSampler([product], protocol, least_calls=2)

    def sample(self) -> dict[str, Any]:
        bandwidth = 2 * self._copied / self._copy.seconds() * 1e-9
        peak = self._operations / self._product.seconds() * 1e-9
        us = lower_bound_us(self._op, self._axes, bandwidth, peak)
        return {"us": us, "bandwidth_gbs": bandwidth, "peak_gflops": peak}
