"""Documents of the schema qops-bench-2 for tests of what reads them: invented numbers, drawn from a seed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bench.reporting.records import LIMIT, SCHEMA

Axes = dict[str, "int | str"]
ROUNDS = 30
LAYERS = {"qkv": (6144, 4096), "down": (4096, 14336)}
ROWS = (1, 16, 64, 256)
EXACT, COARSE = "exact weights, fp32 sums", "int8 activations"


def samples(rng: random.Random, us: float, noise: float = 0.01, drift: Iterable[float] = ()) -> list[float]:
    """Normal around ``us``, each times the machine's drift in that round."""
    drifts = list(drift) or [1.0] * ROUNDS
    return [us * d * (1 + rng.gauss(0, noise)) for d in drifts]


def row(op: str, provider: str, axes: Axes, times: list[float], **extra: Any) -> dict[str, Any]:
    entry = {"op": op, "provider": provider, "axes": axes, "samples_us": times, "bytes": 8 << 20, "flops": 1 << 25}
    entry |= {"max_err": 0.5, "accuracy": EXACT, "rotated_inputs": 2, "calls_per_sample": 1, "error": None}
    return entry | extra


def case(
    op: str, axes: Axes, us: Mapping[str, float | str], rng: random.Random, accuracy: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Rows of all providers; text instead of a time is an error."""
    drift = [1 + 0.3 * rng.random() for _ in range(ROUNDS)]
    rows = []
    for provider, time in us.items():
        extra: dict[str, Any] = {"accuracy": (accuracy or {}).get(provider, EXACT)}
        if isinstance(time, str):
            rows.append(row(op, provider, axes, [], error=time, **extra))
            continue
        times = samples(rng, time, drift=drift)
        if provider == LIMIT:
            bandwidth = [(8 << 20) / (1e3 * us) for us in times]
            extra |= {"bandwidth_gbs": bandwidth, "peak_gflops": [900.0 / d for d in drift], "peak_kind": "bf16"}
        rows.append(row(op, provider, axes, times, **extra))
    return rows


def int4_times(rows: int) -> dict[str, float | str]:
    """Ours loses to the coarse peer at M = 16, to the dense GEMM from M = 256 on."""
    return {
        "qops": 100.0 + rows,
        "onednn F.linear": 340.0 + rows / 16,
        "onnxruntime acc4": 90.0 + 2 * rows if rows < 64 else 400.0 + 3 * rows,
        "torch int4pack": 180.0 + 3 * rows,
        "openvino u4": "M > 16 only" if rows <= 16 else 500.0 + 2 * rows,
        LIMIT: 80.0 + rows / 2,
    }


def document(rows: list[dict[str, Any]], **device: Any) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "meta": {
            "git_sha": "0123456789abcdef",
            "dirty": False,
            "argv": ["run"],
            "utc": "2001-02-03T04:05:06+00:00",
            "versions": {"qops": "0", "torch": "0"},
        },
        "device": {"name": "Invented CPU", "kind": "cpu", "threads": 2, "isa": "avx2", **device},
        "protocol": {"rounds": ROUNDS},
        "results": rows,
    }


def full(seed: int = 0, times: Callable[[int], dict[str, float | str]] = int4_times, **device: Any) -> dict[str, Any]:
    """A GEMM, cold and hot; a norm at several widths; rotary at one shape."""
    rng, rows = random.Random(seed), []
    for cache in ("cold", "hot"):
        for layer, (n, k) in LAYERS.items():
            for m in ROWS:
                axes: Axes = {"M": m, "N": n, "K": k, "G": 128, "dtype": "bfloat16", "kind": "symmetric"}
                axes |= {"layer": layer, "cache": cache, "threads": 2}
                rows += case("int4_gemm", axes, times(m), rng, {"onnxruntime acc4": COARSE})
    for t in (1, 1024):
        for h in (1024, 2048, 4096):
            axes = {"T": t, "H": h, "dtype": "bfloat16", "cache": "cold", "threads": 2}
            us = {"qops": h * t / 100, "torch.compile": h * t / 90, "qops, two operators": h * t / 300}
            rows += case("rms_norm", axes, {**us, LIMIT: h * t / 120}, rng)
        axes = {"T": t, "Hq": 32, "Hk": 8, "D": 128, "dtype": "bfloat16", "cache": "cold", "threads": 2}
        rows += case("rotary", axes, {"qops": 10.0 * t, "torch eager": 40.0 * t, LIMIT: 9.0 * t}, rng)
    return copy.deepcopy(document(rows, **device))
