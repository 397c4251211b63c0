"""Kinds of device: "cpu", "cuda", and "emulated", which takes the way of a GPU through everything here without one.

On an emulated GPU tensors lie on the CPU, our operators are the CUDA kernels in ``tests/emulator``, and ``torch.cuda``
is what ``bench.timing.emulated`` puts in its place. Its times say nothing.
"""

from __future__ import annotations

import os

import torch

KINDS = ("cpu", "cuda", "emulated")


def of_providers(kind: str) -> str:
    """What providers call it."""
    return "cpu" if kind == "cpu" else "cuda"


def of_tensors(kind: str) -> str:
    """What torch calls it."""
    return "cuda" if kind == "cuda" else "cpu"


def chosen() -> str:
    """By the variable QOPS_BENCH_DEVICE, else a GPU where torch sees one."""
    kind = os.environ.get("QOPS_BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in KINDS:
        raise ValueError(f"QOPS_BENCH_DEVICE must be one of {', '.join(KINDS)}, got {kind!r}")
    return kind
