"""The emulator's tracer: it names races under the tamest schedule, none in sound kernels, and its costs are exact."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from tests.support.cuda.cuda_tools import EMULATOR, build_emulator, checked

pytestmark = pytest.mark.slow
POLICIES = "fifo,random,prio"
PROBE = (EMULATOR / "cases/tracer_probe.cpp").read_text()


@pytest.fixture(scope="session")
def traced() -> Path:
    return build_emulator("traced") / "emulator_tests"


def cases_of(program: Path, kind: str) -> list[str]:
    return [line.split()[1] for line in checked(str(program), "list").splitlines() if line.startswith(kind)]


def run(program: Path, *arguments: str) -> tuple[list[str], list[list[str]]]:
    """Outcomes of the runs, and the fields of the tracer's lines. A bug may end the process before it says anything."""
    result = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False, errors="replace")
    lines = result.stdout.splitlines()
    return (
        [(line.split(" ")[3:4] or ["ended"])[0] for line in lines if "\t" not in line],
        [line.split("\t")[1:] for line in lines if "\t" in line],
    )


def races(trace: list[list[str]]) -> set[tuple[str, str, str]]:
    """What it is, then the later and the earlier place."""
    return {(what, later, earlier) for kind, _, _, what, later, earlier, *_ in trace if kind == "race"}


def test_sound_kernels_have_no_races(traced):
    cases = cases_of(traced, "sound")
    outcomes, trace = run(traced, "run", "0:10", POLICIES, *cases)
    assert outcomes == ["ok"] * len(cases) * 30
    assert not races(trace)


# Planted bugs under the schedule in which fewest of them change a result: what happens, and the line that races with
# which earlier one, by its text. Some are more than a race, and a fault as well.
RACES = {
    "dependent_no_wait": ("read before griddepcontrol.wait", *["sum += parts["] * 2),
    "dependent_reads_before": ("read before griddepcontrol.wait", *["sum = parts[row]"] * 2),
    "row_sums_missing_barrier": ("read after write", "total += partial[w]", "partial[warp] = sum"),
    "row_sums_missing_reuse_barrier": ("write after read", "partial[warp] = sum", "total += partial[w]"),
    "transpose_missing_barrier": (
        "read after write",
        "= tile[threadIdx.x * kStride + i]",
        "tile[i * kStride + threadIdx.x] =",
    ),
    "scan_missing_barrier": ("read after write", "sum += totals[w]", "totals[warp] = sum"),
    "split_sum_missing_barrier": ("read after write", "total += partial[", "* kThreads + threadIdx.x] = sum"),
    "split_sum_missing_flag_barrier": ("write after read", "last[0] = before", "if (!last[0])"),
    "split_sum_one_early": ("read after write", "total += partial[", "* kThreads + threadIdx.x] = sum"),
    "pipeline_waits_too_little": ("read during asynchronous write", "= 2 * stage[mirrored]", "cp_async_cg_zfill"),
    "pipeline_missing_barrier": ("read after write", "= 2 * stage[mirrored]", "cp_async_cg_zfill"),
    "pipeline_refills_stage_being_read": ("write after read", "cp_async_cg_zfill", "= 2 * stage[mirrored]"),
    "pipeline_missing_commit": ("read during asynchronous write", "= 2 * stage[mirrored]", "cp_async_cg_zfill"),
    "pipeline_writes_destination": ("write during asynchronous write", "slot[0] = 0", "cp_async_cg_zfill"),
    "gemm_missing_barrier": ("write after read", "cp_async_cg_zfill", "ldmatrix_x4(fragment_a"),
    "gemm_matrix_past_end": ("read during asynchronous write", "ldmatrix_x4(fragment_a", "cp_async_cg_zfill"),
    "flip_missing_syncwarp": ("read after write", "ldmatrix_x4_trans", "reinterpret_cast<uint4*>(&tile"),
    "flip_missing_last_syncwarp": ("read during asynchronous write", "<const uint4*>(&flipped", "stmatrix_x4"),
}


def line_of(file: str, text: str) -> str:
    lines = (EMULATOR / "cases/kernels" / file).read_text().splitlines()
    (number,) = [number for number, line in enumerate(lines, start=1) if text in line]
    return f"{file}:{number}"


def test_planted_races_are_named_in_the_tamest_schedule(traced):
    found = {}
    for bug in cases_of(traced, "planted"):
        if seen := races(run(traced, "run", "0:1", "fifo", bug)[1]):
            found[bug] = seen
    assert found.keys() == RACES.keys()
    for bug, (what, later, earlier) in RACES.items():
        file = next(path.name for path in EMULATOR.glob("cases/kernels/*.cuh") if bug.startswith(path.stem + "_"))
        assert (what, line_of(file, later), line_of(file, earlier)) in found[bug], bug


def test_a_race_that_needs_a_schedule(traced):
    """Its barriers pair up in the wrong order, which under fifo is a deadlock and leaves no race."""
    later, earlier = (line_of("handoff.cuh", text) for text in ("= 2 * buffers[", "= x[tile * 32 + lane]"))
    seen = races(run(traced, "run", "0:20", "random,prio", "handoff_no_wait_for_empty")[1])
    assert ("read after write", later, earlier) in seen


def test_each_synchronisation_left_out_is_a_race_or_a_fault(traced):
    missed, count = [], 0
    for case in cases_of(traced, "sound"):
        lines = checked(str(traced), "synchronisations", case).splitlines()
        for place in {line.split()[0] for line in lines if re.match(r"\w+\.cuh:\d+ ", line)}:
            count += 1
            outcomes, trace = run(traced, "without", place, "0:1", "fifo", case)
            if outcomes != ["fault"] and not races(trace):
                missed.append((case, place))
    assert count >= 25 and not missed


# Costs ---------------------------------------------------------------------------------------------------------------


def test_costs_are_those_of_the_source(traced):
    """The probe says of each line what it costs."""
    wanted = {}
    for number, line in enumerate(PROBE.splitlines(), start=1):
        for memory, what, taken, least in re.findall(r"(shared|global) ([\w. ]+): (\d+) / (\d+)", line):
            wanted[memory, what, f"tracer_probe.cpp:{number}"] = (int(taken), int(least))
    lines = [line.split("\t") for line in checked(str(traced.parent / "tracer_probe")).splitlines()]
    assert not [line for line in lines if line[:2] == ["costs", "race"]]
    found = {tuple(line[3:6]): (int(line[-2]), int(line[-1])) for line in lines if line[:2] == ["costs", "requests"]}
    assert found == wanted and len(wanted) >= 25


def test_words_hand_memory_over_by_acquire_and_release_or_by_fences(traced):
    found = defaultdict(list)
    for line in checked(str(traced.parent / "tracer_probe")).splitlines():
        fields = line.split("\t")
        found[fields[0]] += [fields[4:7]] if fields[1] == "race" else []
    lines = PROBE.splitlines()
    written, read = (
        f"tracer_probe.cpp:{n}" for n, line in enumerate(lines, 1) if re.search("// (read|written)$", line)
    )
    race = ["read after write", read, written]
    assert found == {"costs": [], "none": [race], "acquire and release": [], "fences": [], "fence missing": [race]}


def ratios(program: Path, case: str, instruction: str) -> set[float]:
    trace = run(program, "run", "0:1", "fifo", case)[1]
    return {int(line[-2]) / int(line[-1]) for line in trace if line[0] == "requests" and line[3] == instruction}


def test_a_swizzle_left_out_is_bank_conflicts(traced):
    assert ratios(traced, "gemm_bf16", "ldmatrix.x4") == {1.0}
    assert ratios(traced, "gemm_unswizzled_read", "ldmatrix.x4") == {4.0}
