"""What to reach on a GPU: from measured limits and peers, for each operator and range of rows.

The factor to reach over a peer is the smaller of a stated one and 0.88 of what a call at the machine's limit has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.reporting.records import LIMIT, Axes, Case, Machine, Row, dense, vendor
from bench.reporting.stats import median
from bench.reporting.tables import coarser, factor, percent, pooled, rows_axis, table

ROOFLINE_SHARE = 0.88
# Elements of a weight that has 30 MB with 4 bits and a scale for every 128.
LARGE_LAYER = 58_000_000
ANY = 1 << 30


def _any(axes: Axes) -> bool:
    return True


def _large(axes: Axes) -> bool:
    return int(axes["N"]) * int(axes["K"]) >= LARGE_LAYER


def _not_dense(row: Row) -> bool:
    return not dense(row.provider)


def _not_vendor(row: Row) -> bool:
    return not vendor(row.provider)


@dataclass(frozen=True)
class Goal:
    """``factor`` over the fastest of ``against`` in the cases of ``op`` with ``rows`` rows."""

    op: str
    rows: tuple[int, int]
    against: Callable[[Row], bool]
    factor: float
    cases: Callable[[Axes], bool] = _any


def _dense(row: Row) -> bool:
    return dense(row.provider)


def _named(*names: str) -> Callable[[Row], bool]:
    return lambda row: any(name in row.provider for name in names)


_INT4 = {(1, 8): 3.2, (16, 16): 3.0, (32, 32): 2.7, (64, 64): 2.3, (128, 128): 1.7, (256, 256): 1.08, (512, 512): 1.0}
_ROWS = ("rms_norm", "add_rms_norm", "silu_mul", "qk_norm_rotary")
GOALS = (
    *(Goal("int4_gemm", rows, _dense, stated, _large) for rows, stated in {**_INT4, (1024, ANY): 1.03}.items()),
    Goal("int4_gemm", (1, 64), _not_dense, 1.25),
    Goal("int4_gemm", (65, ANY), _not_dense, 1.0),
    Goal("int8_gemm", (1, 64), _not_vendor, 1.4),
    Goal("int8_gemm", (1024, ANY), _not_vendor, 1.0),
    Goal("int8_gemm", (1, 16), _dense, 1.7),
    Goal("int8_gemm", (1024, ANY), _dense, 1.6),
    Goal("add_rms_norm_int8", (1024, ANY), _named("vllm"), 1.3),
    *(Goal(op, (1024, ANY), _not_vendor, 0.97) for op in _ROWS),
    Goal("rotary", (1024, ANY), _named("vllm"), 1.8),
)


def fastest(goal: Goal, case: Case) -> Row | None:
    """Of those that the goal is about and that round no more than an exact operator does."""
    if goal.op != case.op or not goal.cases(case.axes) or not case.timed(LIMIT):
        return None
    if not goal.rows[0] <= rows_axis(case.axes)[1] <= goal.rows[1] or case.axes.get("cache") == "hot":
        return None
    return next((row for row in case.peers() if goal.against(row) and not coarser(case, row)), None)


def _line(goal: Goal, cases: Sequence[Case]) -> tuple[str, ...] | None:
    found = [(case, row) for case in cases if (row := fastest(goal, case))]
    if not found:
        return None
    # How many times the limit the peer takes; every case counts the same.
    above_limit = median(pooled(case.ratios(row.provider, LIMIT) for case, row in found))
    roofline = ROOFLINE_SHARE * above_limit
    axis, present = rows_axis(found[0][0].axes)[0], sorted({rows_axis(case.axes)[1] for case, _ in found})
    names = sorted({row.provider for _, row in found})
    return (
        f"{goal.op}{', layers of 30 MB and more' * (goal.cases is _large)}",
        f"{axis} {present[0]}" + (f" - {present[-1]}" if len(present) > 1 else ""),
        ", ".join(names),
        str(len(found)),
        percent(1 / above_limit),
        factor(goal.factor),
        factor(roofline),
        f"**{factor(min(goal.factor, roofline))}**",
    )


def section(machines: Sequence[Machine]) -> str:
    """What ``bench/TARGETS.md`` says between its markers; empty where no GPU was measured."""
    lines: list[str] = []
    for machine in machines:
        if machine.device["kind"] == "cuda":
            lines += _machine(machine)
    return "\n".join(lines).rstrip() + "\n" if lines else ""


def _machine(machine: Machine) -> Iterator[str]:
    cases = machine.cases
    rows = [line for goal in GOALS if (line := _line(goal, cases))]
    if not rows:
        return
    yield f"**{machine.title}**"
    yield ""
    yield "The factor to reach over the fastest peer, measured: the smaller of the stated one and 0.88 of the limit's."
    yield ""
    header = ("operator", "rows", "fastest peer", "cases", "its share of the limit", "stated")
    yield from table((*header, "0.88 of the limit", "target"), rows, left=3)
    yield ""
