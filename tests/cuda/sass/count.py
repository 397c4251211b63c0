"""What a unit of a kernel's work costs: instructions by pipe, cycles of a multiprocessor, and what bounds it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from tests.cuda.sass.disassembly import Kernel
from tests.cuda.sass.flow import Flow, Goal, NoPath, Path
from tests.cuda.sass.machine import by_pipe, cycles_of, machine_of


@dataclass(frozen=True)
class Work:
    """What a kernel is asked: the unit that its path does, and which path that is."""

    unit: str
    # Shares of the units and the paths that these take: a group of weights ends with every second block, say.
    ways: tuple[tuple[float, Goal], ...]
    in_loop: bool = True  # the path is one turn of a loop; else all of the kernel
    units: float = 1  # that a path does
    warps: float = 1  # that do a unit together, each on such a path
    dram: float = 0  # bytes of a unit, from memory and to it
    l2: float = 0
    blocks: int | None = None  # the most of a multiprocessor that dynamic shared memory leaves room for
    label: str = ""  # of one of several works of a kernel


@dataclass(frozen=True)
class Count:
    """Of one unit, all warps that do it together."""

    kernel: Kernel
    work: Work
    opcodes: dict[str, float]
    stalls: float  # of one warp, a unit's cycles if nothing ever makes it wait
    prologue: int | None  # instructions up to the first global load or copy
    blocks: int | None
    cycles: dict[str, float] = field(default_factory=dict)

    @property
    def slots(self) -> float:
        return sum(self.opcodes.values())

    @property
    def pipes(self) -> dict[str, float]:
        return by_pipe(self.opcodes)

    @property
    def bound(self) -> str:
        return max(self.cycles, key=lambda name: self.cycles[name])


def steady(flow: Flow, goal: Goal, in_loop: bool) -> Path:
    """The path of a goal, in the loop that does most of it or in all of the kernel.

    Raises:
        NoPath: no path has as much of `goal.least`.
    """
    first = next(([label] for label in goal.most if label in flow.labels_in_loops), [])

    def met(path: Path) -> int:
        return sum(min(path.count(label), n) for label, n in goal.least.items())

    # The innermost loop that does the work: around it there is more of everything else.
    found = flow.steady_loop(goal, lambda path: (*map(path.count, first), met(path))) if in_loop else None
    if in_loop and (found is None or not any(map(found[1].count, [*first, *goal.least]))):
        raise NoPath(f"{flow.kernel.name} (sm_{flow.kernel.arch}): no loop with {[*goal.most, *goal.least]}")
    path = found[1] if found else flow.whole(goal)
    missing = {label: (path.count(label), n) for label, n in goal.least.items() if path.count(label) < n}
    if missing:
        asked = ", ".join(f"{has} of {n} {label}" for label, (has, n) in missing.items())
        raise NoPath(f"{flow.kernel.name} (sm_{flow.kernel.arch}): its best path has {asked}")
    return path


def measure(kernel: Kernel, work: Work, flow: Flow | None = None) -> Count:
    flow = flow or Flow(kernel)
    machine = machine_of(kernel.arch)
    opcodes: defaultdict[str, float] = defaultdict(float)
    stalls = 0.0
    for share, goal in work.ways:
        path = steady(flow, goal, work.in_loop)
        for opcode, n in path.opcodes.items():
            opcodes[opcode] += share * n * work.warps / work.units
        stalls += share * path.stalls / work.units
    cycles = cycles_of(opcodes, machine)
    if work.dram:
        cycles["dram"] = work.dram / machine.dram
    if work.l2 and machine.l2:
        cycles["l2"] = work.l2 / machine.l2
    blocks = None
    if kernel.max_threads:
        blocks = machine.occupancy(kernel.registers, kernel.static_shared, kernel.max_threads, work.blocks)
    return Count(kernel, work, dict(opcodes), stalls, flow.prologue(), blocks, cycles)


def guess(kernel: Kernel, flow: Flow) -> Work:
    """For a kernel that nothing is known of: a turn of the loop with the most tensor instructions, else of the one that
    moves most, else all of the kernel."""
    names = {instruction.name for instruction in kernel.code}
    if {"TENSOR", "COPY"} & flow.labels_in_loops:
        return Work("a turn of the loop", ((1, Goal(most=("TENSOR", "COPY"))),))
    if {"LOAD", "STORE"} & flow.labels_in_loops:
        return Work("a turn of the loop", ((1, Goal(most=("LOAD", "STORE"))),))
    most = ("LOAD", "STORE") if {"LDG", "STG"} & names else ()
    return Work("the kernel", ((1, Goal(most=most)),), in_loop=False)
