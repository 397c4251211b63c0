"""Control flow of machine code: blocks, loops, and the path that a warp takes through them as a rule.

The steady path of a region (a loop, or a kernel from its entry to its exit) is defined, not measured: of all paths from
the region's first block to its end that take no back edge, the one that a `Goal` names. A loop inside the region is
passed once, its blocks counting as often as the loop turns (`trips`). A predicated instruction takes its slot whether
or not its predicate holds; one that is branched around does not. A call counts with the cheapest path through what it
calls.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from operator import add, lt

from tests.cuda.sass.disassembly import Instruction, Kernel

TENSOR = frozenset({"HMMA", "IMMA", "DMMA", "BMMA", "QMMA", "OMMA", "HGMMA", "IGMMA", "QGMMA", "BGMMA"})
COPY = frozenset({"LDGSTS", "UBLKCP", "UTMALDG", "UBLKPF"})
LOAD = COPY | {"LDG", "LD"}
STORE = frozenset({"STG", "ST", "UTMASTG", "RED", "REDG", "ATOMG"})
CLASSES = {"TENSOR": TENSOR, "COPY": COPY, "LOAD": LOAD, "STORE": STORE}

Key = tuple[int, ...]


class NoPath(ValueError):
    """No path does what is asked."""


@cache
def labels_of(opcode: str) -> tuple[str, ...]:
    """What a goal may call an instruction: its name without modifiers, the classes that have it, and of a load from
    shared memory also its width in bits, "LDS.32"."""
    name, *modifiers = opcode.split(".")
    labels = [name, *(label for label, names in CLASSES.items() if name in names)]
    if name == "LDS":
        widths = [m.lstrip("US") for m in modifiers if m.lstrip("US") in ("8", "16", "64", "128")]
        labels.append(f"LDS.{widths[0] if widths else 32}")
    return tuple(labels)


@dataclass(frozen=True)
class Goal:
    """Which path is steady: of those with the most of `most`, in this order, and then with at least `least` of each of
    these (no more are looked for), the one of the fewest instructions.

    Both are labels: instructions (``"FFMA"``) or CLASSES of them (``"TENSOR"``).
    """

    most: tuple[str, ...] = ("TENSOR", "COPY")
    least: Mapping[str, int] = field(default_factory=dict)
    trips: Mapping[str, int] = field(default_factory=dict)  # of innermost loops with such an instruction; "*": of all


@dataclass
class Block:
    number: int
    code: list[Instruction]
    successors: list[int] = field(default_factory=list)
    is_end: bool = False  # a kernel exits here, or a function returns

    @cached_property
    def counts(self) -> Counter[str]:
        """Of what goals name. Of two neighbours with the same instruction and opposite guards one executes."""
        counts: Counter[str] = Counter()
        before = None
        for instruction in self.code:
            if before is None or not are_opposite(before, instruction):
                counts.update(labels_of(instruction.opcode))
            before = instruction
        return counts


@dataclass(frozen=True)
class Loop:
    header: int
    body: frozenset[int]
    latches: frozenset[int]


@dataclass(frozen=True)
class Path:
    """Blocks in the order in which they are passed, how often each, and the instructions of it all."""

    blocks: tuple[int, ...]
    times: tuple[int, ...]
    opcodes: Counter[str]
    counts: Counter[str]  # of what goals name
    stalls: int  # cycles that the control codes state, of one warp that never waits for memory

    @property
    def slots(self) -> int:
        return sum(self.opcodes.values())

    def count(self, label: str) -> int:
        """Of a goal's label."""
        return self.counts[label]


class Flow:
    """The blocks of a kernel and what lies in them."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        code = kernel.code
        index = {instruction.address: i for i, instruction in enumerate(code)}
        jumps = {i: self._targets(i) for i, instruction in enumerate(code) if ends_block(instruction)}
        calls = {instruction.target for instruction in code if instruction.name == "CALL"}
        leaders = {0, *(i + 1 for i in jumps), *(index[t] for found in jumps.values() for t in found if t in index)}
        leaders |= {index[t] for t in calls if t in index}
        starts = sorted(leader for leader in leaders if leader < len(code))
        self.blocks: list[Block] = []
        self.block_at: dict[int, int] = {}
        for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(code)], strict=True)):
            self.blocks.append(Block(number, code[start:end]))
            self.block_at[code[start].address] = number
        for block, end in zip(self.blocks, [*starts[1:], len(code)], strict=True):
            last = block.code[-1]
            block.successors = [self.block_at[t] for t in jumps.get(end - 1, ()) if t in self.block_at]
            falls = not ends_block(last) or last.is_conditional or last.name == "CALL"
            if falls and block.number + 1 < len(self.blocks):
                block.successors.append(block.number + 1)
            block.is_end = last.name in ("EXIT", "RET", "KILL")
        # ptxas also leaves loops by calls that never return: those are jumps.
        self._functions: set[int] = {t for t in calls if t in self.block_at and self._returns(self.block_at[t])}
        for block in self.blocks:
            last = block.code[-1]
            if last.name == "CALL" and last.target in self.block_at and last.target not in self._functions:
                block.successors = [self.block_at[last.target], *(block.successors if last.guard else [])]

    def _returns(self, entry: int) -> bool:
        return any(self.blocks[number].code[-1].name == "RET" for number in self.order(entry))

    def _function(self, instruction: Instruction) -> int | None:
        """The block of what is called, by a call that returns."""
        is_call = instruction.name == "CALL" and instruction.target in self._functions
        return self.block_at[instruction.target] if is_call and instruction.target is not None else None

    def _targets(self, i: int) -> list[int]:
        instruction = self.kernel.code[i]
        if instruction.name == "BRX":
            return self._table(i)
        if instruction.name in ("BRA", "JMP") and instruction.target is not None:
            return [instruction.target]
        return []

    def _table(self, i: int) -> list[int]:
        """Targets of an indirect branch: offsets in constant bank 2 from where its index is looked up, to the next such
        place."""
        bases = sorted({int(base or "0", 16) for base in self._table_bases(range(len(self.kernel.code)))})
        mine = self._table_bases(range(i - 1, max(i - 16, -1), -1))
        if not mine:
            return []
        begin = int(mine[0] or "0", 16)
        end = next((base for base in bases if base > begin), len(self.kernel.tables))
        return sorted(set(struct.unpack_from(f"<{(end - begin) // 4}I", self.kernel.tables, begin)))

    def _table_bases(self, places: Iterable[int]) -> list[str]:
        pattern = re.compile(r"c\[0x2\]\s*\[U?R\d+(?:\+0x([0-9a-f]+))?\]")
        return [found[1] for i in places if (found := pattern.search(self.kernel.code[i].operands))]

    # --- order, dominators, loops ---

    def order(self, entry: int) -> list[int]:
        """Reverse postorder of what is reached from a block."""
        return self._order(entry, [block.successors for block in self.blocks])

    def _order(self, entry: int, successors_of: Sequence[list[int]]) -> list[int]:
        seen, postorder = {entry}, []
        stack = [(entry, iter(successors_of[entry]))]
        while stack:
            number, successors = stack[-1]
            following = next((s for s in successors if s not in seen), None)
            if following is None:
                postorder.append(number)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(successors_of[following])))
        return postorder[::-1]

    @cached_property
    def loops(self) -> list[Loop]:
        """Natural loops of the kernel, those of one header as one; and of the functions that it calls."""
        found: dict[int, tuple[set[int], set[int]]] = {}
        for entry in [0, *self.callees]:
            order = self.order(entry)
            dominator = self._dominators(order)
            for number in order:
                for successor in self.blocks[number].successors:
                    if dominates(dominator, successor, number):
                        body, latches = found.setdefault(successor, ({successor}, set()))
                        latches.add(number)
                        body |= self._natural(successor, number, set(order))
        return [Loop(h, frozenset(body), frozenset(latches)) for h, (body, latches) in sorted(found.items())]

    @cached_property
    def labels_in_loops(self) -> set[str]:
        return {label for loop in self.loops for number in loop.body for label in self.blocks[number].counts}

    @cached_property
    def callees(self) -> list[int]:
        return sorted(self.block_at[target] for target in self._functions)

    @cached_property
    def _predecessors(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {block.number: [] for block in self.blocks}
        for block in self.blocks:
            for successor in block.successors:
                found[successor].append(block.number)
        return found

    def _natural(self, header: int, latch: int, region: set[int]) -> set[int]:
        body, waiting = {header, latch}, [latch]
        while waiting:
            number = waiting.pop()
            if number == header:
                continue
            new = {p for p in self._predecessors[number] if p in region} - body
            body |= new
            waiting += new
        return body

    def _dominators(self, order: list[int]) -> dict[int, int]:
        """The immediate dominator of each block (Cooper, Harvey and Kennedy, A simple, fast dominance algorithm)."""
        place = {number: i for i, number in enumerate(order)}
        dominator = {order[0]: order[0]}
        changed = True
        while changed:
            changed = False
            for number in order[1:]:
                new = None
                for p in self._predecessors[number]:
                    if p not in dominator or p not in place:
                        continue
                    a, b = p, p if new is None else new
                    while a != b:
                        while place[a] > place[b]:
                            a = dominator[a]
                        while place[b] > place[a]:
                            b = dominator[b]
                    new = a
                if new is not None and dominator.get(number) != new:
                    dominator[number] = new
                    changed = True
        return dominator

    @cached_property
    def _onward(self) -> tuple[list[list[int]], set[int]]:
        """Edges of paths, and the latches behind which a kernel may end: no edge back to the header of a loop, but one
        from its latches to wherever the loop is left. After the last turn that is what follows, and loops that are left
        at their header would else never be entered."""
        edges = [list(block.successors) for block in self.blocks]
        last: set[int] = set()
        for loop in self.loops:
            exits = {s for n in loop.body for s in self.blocks[n].successors if s not in loop.body}
            for latch in loop.latches:
                edges[latch] = [s for s in edges[latch] if s != loop.header]
                edges[latch] += sorted(exits - set(edges[latch]))
            if any(self.blocks[n].is_end for n in loop.body):
                last |= loop.latches
        return edges, last

    # --- paths ---

    def whole(self, goal: Goal) -> Path:
        """From the kernel's entry to an exit.

        Raises:
            NoPath: there is none that has together what `goal.least` names.
        """
        return self._best(0, set(self.order(0)), None, goal)

    def cycle(self, loop: Loop, goal: Goal) -> Path:
        """Once through a loop; likewise."""
        return self._best(loop.header, set(loop.body), loop.latches, goal)

    def called(self, entry: int) -> Path:
        """The cheapest way through a function, which division and the like are."""
        if entry not in self._called:
            self._called[entry] = Path((), (), Counter(), Counter(), 0)  # what calls itself would never end
            self._called[entry] = self._best(entry, set(self.order(entry)), None, Goal(most=()))
        return self._called[entry]

    @cached_property
    def _called(self) -> dict[int, Path]:
        return {}

    def _times(self, region: set[int], header: int | None, goal: Goal) -> dict[int, int]:
        """How often the blocks of inner loops count."""
        times = dict.fromkeys(region, 1)
        if not goal.trips:
            return times
        for loop in self.loops:
            is_innermost = not any(other.body < loop.body for other in self.loops)
            if is_innermost and loop.header != header and loop.body <= region:
                inside = set().union(*(self.blocks[n].counts for n in loop.body))
                trips = max((n for label, n in goal.trips.items() if label in inside or label == "*"), default=1)
                times.update(dict.fromkeys(loop.body, trips))
        return times

    def _cost(self, block: Block) -> int:
        function = self._function(block.code[-1])
        return len(block.code) + (self.called(function).slots if function is not None else 0)

    def _best(self, entry: int, region: set[int], latches: frozenset[int] | None, goal: Goal) -> Path:
        edges, last = self._onward
        within = [[s for s in found if s in region] if n in region else [] for n, found in enumerate(edges)]
        order = self._order(entry, within)
        place = {number: i for i, number in enumerate(order)}
        times = self._times(region, None if latches is None else entry, goal)
        # Where the region is a loop its latches end it, else what leaves the kernel.
        ends = {n for n in order if (self.blocks[n].is_end or n in last if latches is None else n in latches)}
        onward = {n: [s for s in within[n] if place[s] > place[n]] for n in order}
        gains = {n: tuple(times[n] * self.blocks[n].counts[label] for label in goal.least) for n in order}
        # The most of each label that may come from a block on; nothing where no end can be reached.
        rest: dict[int, tuple[int, ...]] = {}
        for number in reversed(order):
            after = [rest[s] for s in onward[number] if s in rest] + [(0,) * len(goal.least)] * (number in ends)
            if after:
                rest[number] = tuple(
                    n + max(each) for n, each in zip(gains[number], zip(*after, strict=True), strict=True)
                )
        if entry not in rest:
            raise NoPath(f"{self.kernel.name or self.kernel.symbol}: block {entry} leads nowhere")
        least = tuple(map(min, goal.least.values(), rest[entry]))

        # For each block and each number of what is wanted at least: the best score before it, and from where.
        states: dict[int, dict[Key, tuple[Key, tuple[int, Key] | None]]] = {
            entry: {(0,) * len(least): ((0,) * (len(goal.most) + 1), None)}
        }
        finished: list[tuple[Key, tuple[int, Key]]] = []
        for number in order:
            block, n = self.blocks[number], times[number]
            gain = (*(n * block.counts[label] for label in goal.most), -n * self._cost(block))
            for key, (score, _) in states.get(number, {}).items():
                passed = tuple(map(min, least, map(add, key, gains[number])))
                now = tuple(map(add, score, gain))
                if number in ends and passed == least:
                    finished.append((now, (number, key)))
                for successor in onward[number]:
                    if successor not in rest or any(map(lt, map(add, passed, rest[successor]), least)):
                        continue  # what is wanted cannot be had any more
                    known = states.setdefault(successor, {})
                    if passed not in known or known[passed][0] < now:
                        known[passed] = (now, (number, key))
        if not finished:
            raise NoPath(f"{self.kernel.name or self.kernel.symbol}: no path has {dict(goal.least)} together")
        at: tuple[int, Key] | None = max(finished)[1]
        path: list[int] = []
        while at is not None:
            path.append(at[0])
            at = states[at[0]][at[1]][1]
        return self._path(path[::-1], times)

    def _path(self, path: list[int], times: dict[int, int]) -> Path:
        opcodes: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        stalls = 0
        for number in path:
            counts.update({label: times[number] * n for label, n in self.blocks[number].counts.items()})
            for instruction in self.blocks[number].code:
                opcodes[instruction.opcode] += times[number]
                stalls += times[number] * max(instruction.control.stall, 1)
                if (function := self._function(instruction)) is not None:
                    called = self.called(function)
                    for opcode, n in called.opcodes.items():
                        opcodes[opcode] += times[number] * n
                    stalls += times[number] * called.stalls
        return Path(tuple(path), tuple(times[number] for number in path), opcodes, counts, stalls)

    def steady_loop(self, goal: Goal, rank: Callable[[Path], tuple[int, ...]]) -> tuple[Loop, Path] | None:
        """The loop whose steady path ranks highest and has, of those, the fewest instructions."""
        candidates: list[tuple[Loop, Path]] = []
        for loop in self.loops:
            with suppress(NoPath):
                candidates.append((loop, self.cycle(loop, goal)))
        return max(candidates, key=lambda pair: (*rank(pair[1]), -pair[1].slots), default=None)

    def prologue(self) -> int | None:
        """The fewest instructions, of any way from the entry, up to and including the first global load or copy."""
        order = self.order(0)
        distance = {0: 0}
        found: list[int] = []
        for number in order:  # each edge forward: a way around a loop is never shorter
            if number not in distance:
                continue
            block, passed = self.blocks[number], distance[number]
            first = next((i for i, instruction in enumerate(block.code) if instruction.name in LOAD), None)
            if first is not None:
                found.append(passed + first + 1)
                continue
            for successor in block.successors:
                distance[successor] = min(distance.get(successor, 1 << 30), passed + self._cost(block))
        return min(found, default=None)


def are_opposite(a: Instruction, b: Instruction) -> bool:
    """Whether one of two executes: the same instruction under a predicate and under its negation."""
    return a.opcode == b.opcode and a.guard != b.guard and a.guard.replace("!", "") == b.guard.replace("!", "") != ""


def ends_block(instruction: Instruction) -> bool:
    return instruction.name in ("BRA", "BRX", "JMP", "CALL", "EXIT", "RET", "KILL")


def dominates(dominator: dict[int, int], a: int, b: int) -> bool:
    while b != a and dominator[b] != b:
        b = dominator[b]
    return a == b
