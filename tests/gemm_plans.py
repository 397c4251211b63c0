"""What csrc/cuda/gemm_config.h plans, asked through gemm_plans.cpp."""

from __future__ import annotations

import atexit
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cuda_tools import ROOT, checked


@dataclass(frozen=True)
class Plan:
    """Of int4_gemm: GemmPlan, and the bytes of its scratch."""

    decode: int
    tokens: int
    k_parts: int
    ranges: int
    strips: int
    stages: int
    shared_bytes: int
    blocks: int
    time: int
    scratch_bytes: int


@functools.cache
def program() -> Path:
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    path = Path(folder) / "gemm_plans"
    sources = ["-I", str(ROOT / "csrc"), str(ROOT / "tests/gemm_plans.cpp")]
    checked("g++", "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", *sources, "-o", str(path))
    return path


def plans(questions: Iterable[tuple[int, ...]]) -> list[Plan]:
    """For each (M, N, K, group size, kind, multiprocessors, bytes of shared memory)."""
    text = "".join(" ".join(map(str, question)) + "\n" for question in questions)
    result = subprocess.run([str(program())], input=text, capture_output=True, text=True, check=True)
    return [Plan(*map(int, line.split())) for line in result.stdout.splitlines()]
