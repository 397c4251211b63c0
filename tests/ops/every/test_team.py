"""Threads that wait for each other, on every kind of pool."""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROBE = ROOT / "tests/support/ops/team_probe.cpp"


@pytest.mark.parametrize("sanitizer", [None, "thread"])
def test_no_pool_lets_a_team_hang(tmp_path: Path, sanitizer: str | None) -> None:
    binary = tmp_path / "team_probe"
    command = ["g++", "-std=c++20", "-O1", "-g", "-pthread", "-I", str(ROOT / "csrc"), str(PROBE), "-o", str(binary)]
    subprocess.run(command + ([f"-fsanitize={sanitizer}"] if sanitizer else []), check=True)
    done = subprocess.run([binary], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    sizes = Counter(tuple(line.rsplit(maxsplit=1)) for line in done.stdout.splitlines())
    # Who waits for long enough sees all threads.
    assert sizes["all", "4"] == sizes["all of two", "2"] == 20
    # What runs its chunks one after the other has teams of one.
    for pool in ("one", "queue", "backwards", "worker", "late"):
        assert {size for name, size in sizes if name == pool} == {"1"}
    assert {name for name, _ in sizes} >= {"threads", "fewer", "callers"}
    assert all(size in ("1", "2") for name, size in sizes if name == "fewer")
