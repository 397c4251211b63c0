"""Threads that wait for each other, on every kind of pool."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PROBES = ROOT / "tests/support/ops"


def probe(tmp_path: Path, name: str, *options: str) -> Path:
    binary = tmp_path / name
    command = ["g++", "-std=c++20", "-O1", "-g", "-pthread", "-I", str(ROOT / "csrc"), str(PROBES / f"{name}.cpp")]
    subprocess.run([*command, "-o", str(binary), *options], check=True)
    return binary


@pytest.mark.parametrize("sanitizer", [None, "thread"])
def test_no_pool_lets_a_team_hang(tmp_path: Path, sanitizer: str | None) -> None:
    binary = probe(tmp_path, "team_probe", *([f"-fsanitize={sanitizer}"] if sanitizer else []))
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


def test_when_regions_run_alone(tmp_path: Path) -> None:
    """One loss is nothing, nor is what threads earn again; a neighbour who stays costs little."""
    done = subprocess.run([probe(tmp_path, "back_off_probe")], check=False)
    assert done.returncode == 0, f"line {done.returncode} of back_off_probe.cpp"


# A layer of SmolLM2 at its first tokens, by all who call at once.
LAYER = """
import hashlib, json, os, threading
import torch
from tests.support.ops.blocks import attention_arguments, mlp_arguments

def layer(x):
    a = {**attention, **{name: attention[name].clone() for name in ("keys", "values")}}
    x = torch.ops.qops.attention_block(**{**a, "x": x})
    x = torch.ops.qops.mlp_block(**{**mlp, "x": x})
    return x + a["keys"].float().nan_to_num().sum().to(x.dtype)

def work(index):
    x = attention["x"]
    for _ in range(REPEAT):
        x = layer(x) / 8
    found[index] = hashlib.sha256(x.float().numpy().tobytes()).hexdigest()

with torch.inference_mode():
    mlp = mlp_arguments(torch.bfloat16, (1, 2), 576, 1536, group=32)
    attention = attention_arguments(torch.bfloat16, 1, 2, 140, 576, (9, 3), 64, group=32)
found = {}

def run(callers):
    def enter(index):
        with torch.inference_mode():
            work(index)
    threads = [threading.Thread(target=enter, args=(index,)) for index in range(callers)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    return sorted(set(found.values()))
"""


def in_new_process(code: str, **variables: str) -> Any:
    """What it prints as JSON; a team that hangs is a timeout."""
    path = os.pathsep.join([str(ROOT), *sys.path])
    usual = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run(
        [sys.executable, "-c", LAYER + code],
        env={**usual, "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


MACHINES = {
    "two threads": {"OMP_NUM_THREADS": "2"},
    "fewer threads than torch thinks": {"OMP_NUM_THREADS": "4", "OMP_THREAD_LIMIT": "1"},
    "as many as OpenMP likes": {"OMP_NUM_THREADS": "4", "OMP_DYNAMIC": "true"},
    "threads that sleep": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
    "more threads than cores": {"OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": "passive"},
    "threads bound to one core": {"OMP_NUM_THREADS": "3", "OMP_PROC_BIND": "true", "OMP_PLACES": "{0}"},
}


@pytest.fixture(scope="module")
def alone() -> list[str]:
    return in_new_process("REPEAT = 20\nprint(json.dumps(run(1)))", OMP_NUM_THREADS="1")


@pytest.mark.parametrize("machine", MACHINES)
def test_blocks_give_the_bits_of_one_thread(machine: str, alone: list[str]) -> None:
    """To one caller, to four at once, and to one after them."""
    code = "REPEAT = 20\nprint(json.dumps([run(callers) for callers in (1, 4, 1)]))"
    assert in_new_process(code, **MACHINES[machine]) == [alone] * 3


def test_the_number_of_threads_may_change_between_calls(alone: list[str]) -> None:
    code = """
REPEAT, seen = 20, set()
for threads in (1, 4, 2, 3, 1, 2):
    torch.set_num_threads(threads)
    seen.update(run(1))
print(json.dumps(sorted(seen)))
"""
    assert in_new_process(code, OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive") == alone


def test_a_process_that_forks_computes_in_both(alone: list[str]) -> None:
    """Of one thread before and after: OpenMP's threads do not survive a fork."""
    code = """
REPEAT = 20
torch.set_num_threads(1)
before = run(1)
child = os.fork()
same = run(1) == before
if child == 0:
    os._exit(0 if same else 1)
assert same and os.waitpid(child, 0)[1] == 0
print(json.dumps(before))
"""
    assert in_new_process(code, OMP_NUM_THREADS="1") == alone


# Milliseconds of 300 layers, the median of rounds.
TIMED = """
import statistics, time
def milliseconds():
    begin = time.perf_counter()
    run(1)
    return 1e3 * (time.perf_counter() - begin)
REPEAT = 300
run(1)
print(json.dumps(statistics.median(milliseconds() for _ in range(9))))
"""
SPIN = "while True: pass"


@pytest.mark.slow
def test_a_busy_neighbour_costs_at_most_what_one_thread_would() -> None:
    """All cores but one are taken; who waits for a thread without a core notices, and goes on alone."""
    cores = len(os.sched_getaffinity(0))
    if cores < 2 or os.getloadavg()[0] > 1:
        pytest.skip("needs two cores, and a machine that is not busy")
    neighbours = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(cores - 1)]
    try:
        one, all_of_them = (in_new_process(TIMED, OMP_NUM_THREADS=str(threads)) for threads in (1, cores))
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
    assert all_of_them <= 1.6 * one, f"{all_of_them:.1f} ms by {cores} threads, {one:.1f} by one"
