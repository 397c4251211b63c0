"""What csrc/cuda/weight_only_config.h and csrc/cuda/int4_int8_config.h plan, asked through int4_plans.cpp."""

from __future__ import annotations

import atexit
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.support.cuda.cuda_tools import ROOT, checked

DECODE, TILED, DENSE = range(3)


class Gpu(NamedTuple):
    multiprocessors: int
    shared_bytes: int  # that a block may have
    arch: int


@dataclass(frozen=True)
class Plan:
    """GemmPlan, and the bytes of its scratch."""

    kind: int
    stages: int
    shared_bytes: int
    blocks: int
    time: int
    tokens: int
    k_parts: int
    ranges: int
    strips: int
    x_stages: int
    keeps_x: int
    rows: int
    live: int
    token_tiles: int
    row_tiles: int
    whole: int
    scratch_bytes: int

    @property
    def is_split(self) -> bool:
        """Whether a second kernel adds what blocks have."""
        return self.k_parts > 1 and (self.kind == DECODE or self.whole < self.token_tiles * self.row_tiles)


class Question(NamedTuple):
    m: int
    n: int
    k: int
    group_size: int
    kind: int
    gpu: Gpu
    may_round: bool = False
    bits: int = 4


@functools.cache
def program() -> Path:
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    path = Path(folder) / "int4_plans"
    sources = ["-I", str(ROOT / "csrc"), str(ROOT / "tests/support/cuda/int4_plans.cpp")]
    checked("g++", "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", *sources, "-o", str(path))
    return path


def answers(questions: Iterable[Question], *of: str) -> list[list[int]]:
    text = "".join(
        f"{q.bits} {q.m} {q.n} {q.k} {q.group_size} {q.kind} {q.may_round:d} {' '.join(map(str, q.gpu))}\n"
        for q in questions
    )
    result = subprocess.run([str(program()), *of], input=text, capture_output=True, text=True, check=True)
    return [[*map(int, line.split())] for line in result.stdout.splitlines()]


def plans(questions: Iterable[Question]) -> list[Plan]:
    return [Plan(*values[:-1]) for values in answers(questions)]


def int8_plans(questions: Iterable[Question]) -> list[Plan]:
    """Of int4_int8_gemm."""
    return [Plan(*values[:-1]) for values in answers(questions, "int8")]


def searches(questions: Iterable[Question]) -> list[int]:
    """How many times a cache of plans, new at the first question, has searched for one after each of them."""
    return [values[-1] for values in answers(questions)]
