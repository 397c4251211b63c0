"""The protocol of every benchmark: verify, calibrate, then time all providers interleaved in one process.

A sample is the time of as many calls as fill about two milliseconds, divided by their number. Each round takes one
sample of every provider, so drifts of the machine meet all of them; the ratio of two providers is taken round by round.
Each call gets the next of a set of equal inputs. Where memory is the limit, the set is larger than the last-level
cache.
"""

from __future__ import annotations

import datetime
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qops
from qops.__main__ import cpu_name
from qops.testing import assert_accurate

SCHEMA = "qops-bench-1"
OURS = "qops"
ROUNDS = 30
SAMPLE_SECONDS = 2e-3
WARM_UP_SECONDS = 20e-3
# Inputs rotate through three times the last-level cache, but no more than this: servers report caches of hundreds of
# megabytes, of which one process on a shared machine has a small part.
ROTATION_CAP_BYTES = 1 << 30
# A provider that is further from the reference than this, relative to the largest value, computes something else.
SAME_OPERATION = 0.05


@dataclass(frozen=True)
class Provider:
    """One way to compute the operator. ``inputs`` hold the same values in different memory."""

    name: str
    call: Callable[..., Any]
    inputs: Sequence[tuple[Any, ...]]


@dataclass
class Result:
    """What one provider did in one case: a row of the JSON file."""

    op: str
    provider: str
    axes: dict[str, int | str]
    bytes: int
    flops: int
    max_err: float
    rotated_inputs: int
    calls_per_sample: int = 1
    samples_us: list[float] = field(default_factory=list)


def last_level_cache_bytes() -> int:
    """The largest cache that the kernel reports; 32 MiB where it reports none."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 << 20)


def rotation(bytes_per_input: int, cache_bytes: int) -> int:
    """How many inputs of this size pass three times the cache, or the cap."""
    return max(1, math.ceil(min(3 * cache_bytes, ROTATION_CAP_BYTES) / max(1, bytes_per_input)))


def quantile(samples: Sequence[float], q: float) -> float:
    """Linear between the order statistics."""
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def _outputs(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def verify(providers: Sequence[Provider], reference: Tensor | tuple[Tensor, ...]) -> list[float]:
    """Largest errors; fails when ours is less accurate than twice the first peer, or anyone computes something else."""
    want = _outputs(reference)
    outputs = [_outputs(provider.call(*provider.inputs[0])) for provider in providers]
    errors = []
    for provider, got in zip(providers, outputs, strict=True):
        errors.append(max(float((a.double() - b).abs().max()) for a, b in zip(got, want, strict=True)))
        limit = SAME_OPERATION * max(float(b.abs().max()) for b in want)
        assert errors[-1] <= limit, f"{provider.name}: error {errors[-1]:.3e} > {limit:.3e}"
    for ours, ref, peer in zip(outputs[0], want, outputs[1], strict=True):
        assert_accurate(ours, ref, peer.to(ours.dtype), providers[0].name)
    return errors


class Sampler:
    """Times batches of calls of one provider."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self.calls = 1
        self._next = 0

    def batch(self) -> list[tuple[Any, ...]]:
        inputs = self.provider.inputs
        batch = [inputs[(self._next + i) % len(inputs)] for i in range(self.calls)]
        self._next = (self._next + self.calls) % len(inputs)
        return batch

    def run(self, batch: list[tuple[Any, ...]]) -> None:
        call = self.provider.call
        for arguments in batch:
            call(*arguments)

    def seconds(self) -> float:
        """Per call, of one sample."""
        batch = self.batch()
        start = time.perf_counter_ns()
        self.run(batch)
        return (time.perf_counter_ns() - start) * 1e-9 / self.calls

    def calibrate(self) -> None:
        """Warms up, then chooses the calls of a sample."""
        best, end = math.inf, time.perf_counter() + WARM_UP_SECONDS
        while time.perf_counter() < end:
            best = min(best, self.seconds())
        self.calls = max(1, min(1000, round(SAMPLE_SECONDS / best)))


class Comparison:
    """What the ``compare`` fixture gives to a benchmark."""

    def __init__(self, benchmark: Any, results: list[Result]) -> None:
        self._benchmark = benchmark
        self._results = results
        self._cache_bytes = last_level_cache_bytes()

    def copies(self, bytes_per_input: int) -> int:
        """Inputs to make for a provider that reads this much; one where nothing is timed."""
        return 1 if self._benchmark.disabled else rotation(bytes_per_input, self._cache_bytes)

    def __call__(
        self,
        op: str,
        axes: dict[str, int | str],
        providers: Sequence[Provider],
        reference: Tensor | tuple[Tensor, ...],
        *,
        bytes_moved: int,
        flops: int,
    ) -> None:
        """Runs one case. The first provider is ours; pytest-benchmark times it, and each round's set-up the others.

        Args:
            op: name of the operator.
            axes: what tells this case from the others.
            providers: ours, then the peers, the baseline first.
            reference: the result in float64.
            bytes_moved: what ours has to read and write at least.
            flops: multiplications and additions.
        """
        assert providers[0].name == OURS and len(providers) > 1
        errors = verify(providers, reference)
        results = [
            Result(op, p.name, axes, bytes_moved, flops, error, len(p.inputs))
            for p, error in zip(providers, errors, strict=True)
        ]
        samplers = [Sampler(provider) for provider in providers]
        self._benchmark.group = op
        if self._benchmark.disabled:
            self._benchmark.pedantic(samplers[0].run, (samplers[0].batch(),))
            return
        for sampler, result in zip(samplers, results, strict=True):
            sampler.calibrate()
            result.calls_per_sample = sampler.calls
        peers = list(zip(samplers, results, strict=True))[1:]

        def set_up() -> tuple[tuple[Any, ...], dict[str, Any]]:
            for sampler, result in peers:
                result.samples_us.append(1e6 * sampler.seconds())
            peers.append(peers.pop(0))  # another one goes first in the next round
            return (samplers[0].batch(),), {}

        self._benchmark.pedantic(samplers[0].run, setup=set_up, rounds=ROUNDS)
        results[0].samples_us = [1e6 * s / samplers[0].calls for s in self._benchmark.stats.stats.data]
        self._results.extend(results)


def table(results: Sequence[Result]) -> str:
    """Text: per case each provider's median time, and how many times longer than ours it takes (median, p20 - p80)."""
    rows = [("operator", "case", "provider", "us", "p20 - p80", "/ qops", "p20 - p80")]
    ours: Result | None = None
    for r in results:
        if r.provider == OURS:
            ours = r
        assert ours is not None and (ours.op, ours.axes) == (r.op, r.axes)
        ratios = [a / b for a, b in zip(r.samples_us, ours.samples_us, strict=True)]
        times = [f"{quantile(r.samples_us, q):.4g}" for q in (0.5, 0.2, 0.8)]
        factors = [f"{quantile(ratios, q):.2f}" for q in (0.5, 0.2, 0.8)]
        case = " ".join(f"{name}={value}" for name, value in r.axes.items())
        first = (r.op, case) if r is ours else ("", "")
        rows.append((*first, r.provider, times[0], " - ".join(times[1:]), factors[0], " - ".join(factors[1:])))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    align = (str.ljust, str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.rjust)
    lines = ["  ".join(f(cell, w) for f, cell, w in zip(align, row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def document(results: Sequence[Result]) -> dict[str, Any]:
    """The JSON document of a run: where, how, and every sample."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        return run.stdout.strip() if run.returncode == 0 else ""

    build = qops.build_info()
    rows = [asdict(result) for result in results]
    for row in rows:
        row["samples_us"] = [float(f"{sample:.5g}") for sample in row["samples_us"]]
        row["max_err"] = float(f"{row['max_err']:.3g}")
    return {
        "schema": SCHEMA,
        "meta": {
            "git_sha": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain")),
            "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "versions": {
                "qops": build["version"],
                "torch": build["torch"],
                "python": platform.python_version(),
                "compiler": build["compiler"],
            },
        },
        "device": {
            "name": cpu_name(),
            "kind": "cpu",
            "threads": torch.get_num_threads(),
            "isa": build["isa"],
            "last_level_cache_bytes": last_level_cache_bytes(),
        },
        "protocol": {
            "timer": "perf_counter_ns",
            "rounds": ROUNDS,
            "sample_seconds": SAMPLE_SECONDS,
            "order": "interleaved: every provider once a round",
            "inputs": "rotated through min(3 x last-level cache, cap) where axes say cold",
            "rotation_cap_bytes": ROTATION_CAP_BYTES,
        },
        "results": rows,
    }


def write(path: Path, results: Sequence[Result]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document(results), indent=1) + "\n")
