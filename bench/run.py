"""Times operators against every peer that is installed, and against the limit of this machine.

    python -m bench.run int4_gemm --out r.json        # one thread, then all
    python -m bench.run all --quick                    # two minutes
    python -m bench.run int4_gemm --layers "llama3-70b o" --rows 1,16 --threads all --providers "qops,onednn*"
    python -m bench.run all --device cuda --out r.json
    python -m bench.run all --list                     # cases and providers; nothing runs

Ctrl-C keeps what was measured; the same command with the same --out goes on from there.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import problems
from bench.peers import MODULES, providers
from bench.peers.providers import EAGER_MODULES
from bench.problems import cases
from bench.problems.shared import devices
from bench.problems.shared.cases import LAYERS, MODELS, SELECTIONS, Case, Selection, interleaved
from bench.problems.shared.provider import LIMIT, OURS, Provider
from bench.reporting.stats import median
from bench.timing import document, samplers
from bench.timing.document import Document, OtherRun
from bench.timing.session import Failure, Session, TimeUp

QUICK_SECONDS = 120.0
# So many providers prepare their calls at a time on a GPU.
CUDA_SLOTS = 6
PROTOCOLS = {"default": samplers.Protocol(), "quick": samplers.QUICK, "full": samplers.FULL}


class Mistake(Exception):
    """What is wrong with a command line or a machine, in one line."""


@dataclass(frozen=True)
class Plan:
    """What a command line asks for."""

    device: str
    threads: list[int]
    cases: list[Case]
    offered: Mapping[str, list[Provider]]
    protocol: samplers.Protocol
    budget_seconds: float | None
    end_seconds: float | None = None

    def steps(self) -> Iterator[tuple[int, Case]]:
        """In their order: workers are started for one number of threads after the other."""
        for threads in self.threads:
            for case in self.cases:
                yield threads, case.with_axes(threads=threads) if self.device == "cpu" else case


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__, formatter_class=form)
    parser.add_argument("ops", nargs="+", metavar="OP", help=f"all, or some of {', '.join(problems.OPS)}")
    parser.add_argument("--device", choices=devices.KINDS, default="cpu")
    parser.add_argument("--threads", help='on the CPU: numbers and "all" (cores); default 1,all, or all with --quick')
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON document, written after each case, or continued")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", help="few cases, two minutes")
    size.add_argument("--full", dest="size", action="store_const", const="full", help="every case: many hours on a CPU")
    parser.add_argument(
        "--providers",
        help='names, with "*": those alone, installed or not; "!NAME": all others; the limit is always there',
    )
    parser.add_argument("--layers", help='names, with "*", of GEMMs\' layers and of models, out of all')
    parser.add_argument("--rows", help="numbers of rows (tokens), out of all")
    parser.add_argument("--depth", type=int, metavar="N", help="decode with models of so many layers alone")
    parser.add_argument("--budget-seconds", type=float, metavar="S", help="start no case after so many")
    parser.add_argument("--end-seconds", type=float, metavar="S", help="end after so many, whatever is under way")
    parser.add_argument(
        "--timeout-seconds", type=float, metavar="S", help="give up a provider without an answer so long"
    )
    parser.add_argument("--commit", default="", metavar="SHA", help="of this tree, where it is a copy without .git")
    parser.add_argument("--list", action="store_true", help="print cases and providers, and run nothing")
    parser.set_defaults(size="default")
    return parser.parse_args(argv)


def _matching(names: Sequence[str], patterns: str, what: str) -> list[str]:
    """The names that match one of the patterns (all, if each begins with "!") and none of those behind a "!"."""
    given = [pattern.strip() for pattern in patterns.split(",")]
    for pattern in given:
        if not fnmatch.filter(names, pattern.removeprefix("!")):
            raise Mistake(f"no {what} {pattern.removeprefix('!')!r}; there are: {', '.join(names)}")
    wanted = [pattern for pattern in given if not pattern.startswith("!")] or ["*"]
    refused = [pattern[1:] for pattern in given if pattern.startswith("!")]

    def matches(name: str, some: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in some)

    return [name for name in names if matches(name, wanted) and not matches(name, refused)]


def _numbers(text: str, what: str) -> list[int]:
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise Mistake(f"{what} must be numbers with commas between, got {text!r}")
    return [int(part) for part in text.split(",")]


def _selection(args: argparse.Namespace) -> Selection:
    """Of a size; what is named comes from everything there is."""
    selection = SELECTIONS[args.device, args.size]
    if args.layers:
        selection = replace(selection, layers=frozenset(_matching([*LAYERS, *MODELS], args.layers, "layer")))
    if args.rows:
        rows = frozenset(_numbers(args.rows, "--rows"))
        selection = replace(selection, rows=rows, tokens=rows)
    return replace(selection, depth=args.depth)


def _threads(args: argparse.Namespace) -> list[int]:
    if args.device != "cpu":
        return [document.cores()]
    words = (args.threads or ("all" if args.size == "quick" else "1,all")).split(",")
    wanted = [document.cores() if word == "all" else _numbers(word, "--threads")[0] for word in words]
    if not all(1 <= threads <= len(document.cpus()) for threads in wanted):
        raise Mistake(f"--threads must lie in 1 ... {len(document.cpus())}, got {args.threads}")
    return list(dict.fromkeys(wanted))


def plan(args: argparse.Namespace, modules: Sequence[str] = MODULES) -> Plan:
    kind = devices.of_providers(args.device)
    ops = [*problems.OPS] if "all" in args.ops else _matching(problems.OPS, ",".join(args.ops), "operator")
    offered = {op: providers.all(op, kind, modules) for op in ops}
    if args.providers:
        names = list(dict.fromkeys(p.name for found in offered.values() for p in found))
        wanted = _matching(names, args.providers, "provider")
        offered = {op: [p for p in found if p.name in wanted] for op, found in offered.items()}
    if not args.providers or args.providers.startswith("!"):
        offered = {op: [p for p in found if not p.missing()] for op, found in offered.items()}
    selection = _selection(args)
    budget = args.budget_seconds or (QUICK_SECONDS if args.size == "quick" else None)
    chosen = interleaved([list(cases(op, selection)) for op in ops])
    if not chosen:
        raise Mistake("no case is left")
    # The most telling ones first, should the time not suffice.
    telling = {str(case) for op in ops for case in cases(op, SELECTIONS[args.device, "quick"])}
    chosen.sort(key=lambda case: str(case) not in telling)
    protocol = samplers.EMULATED if args.device == "emulated" else PROTOCOLS[args.size]
    if args.timeout_seconds is not None:
        protocol = replace(protocol, timeout_seconds=args.timeout_seconds)
    return Plan(args.device, _threads(args), chosen, offered, protocol, budget, args.end_seconds)


def listing(wanted: Plan, modules: Sequence[str] = MODULES) -> str:
    """Cases, and providers with what they lack."""
    lines = [str(case) for _, case in wanted.steps()]
    lines.append(f"{len(lines)} cases\n")
    for op in wanted.offered:
        for provider in providers.all(op, devices.of_providers(wanted.device), modules):
            lack = ", ".join(provider.missing())
            lines.append(f"{op}: {provider.name} ({provider.accuracy})" + (f": not installed: {lack}" if lack else ""))
    return "\n".join(lines)


def measure(wanted: Plan, results: Document, sessions: Mapping[int, Session]) -> str | None:
    """Runs what the document does not have; why it ended early, if it did."""
    started = time.monotonic()
    steps = list(wanted.steps())

    def names(case: Case) -> list[str]:
        return [*(p.name for p in wanted.offered[case.op]), LIMIT]

    todo = [(threads, case) for threads, case in steps if not results.has(case, names(case))]
    index = 0
    try:
        with tqdm(total=len(steps), initial=len(steps) - len(todo), unit="case", disable=None, file=sys.stderr) as bar:
            for index, (threads, case) in enumerate(todo):
                if wanted.budget_seconds is not None and time.monotonic() - started > wanted.budget_seconds:
                    return f"the time is up, {len(todo) - index} of {len(steps)} cases are left"
                bar.set_description(str(case))
                rows = sessions[threads].run(case, wanted.offered[case.op])
                results.add(case, rows, wanted.offered[case.op])
                bar.update()
    except TimeUp:
        return f"the time is up, {len(todo) - index} of {len(steps)} cases are left"
    except KeyboardInterrupt:  # also between two cases
        return f"interrupted, {len(todo) - index} of {len(steps)} cases are left"
    return None


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a case: our median, the fastest peer, how many times our time it takes, and our share of the limit.

    Ratios are medians of the ratios of each round. Below, what was not timed and why.
    """
    by_case: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_case.setdefault(str(Case(row["op"], row["axes"])), {})[row["provider"]] = row
    lines = [("case", "qops us", "fastest peer", "its us / ours", "of the limit")]
    for case, found in by_case.items():
        samples = {name: row["samples_us"] for name, row in found.items() if row["samples_us"]}
        ours = samples.pop(OURS, None)
        limit = samples.pop(LIMIT, None)
        cells = [case, "-", "-", "-", "-"]
        peer = min(samples, key=lambda name: median(samples[name]), default=None)
        if peer is not None:
            cells[2] = peer
        if ours is not None:
            cells[1] = f"{median(ours):.4g}"
            if peer is not None:
                cells[3] = f"{median([a / b for a, b in zip(samples[peer], ours, strict=True)]):.2f}"
            if limit is not None:
                cells[4] = f"{median([a / b for a, b in zip(limit, ours, strict=True)]):.0%}"
        lines.append(tuple(cells))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    align = (str.ljust, str.rjust, str.ljust, str.rjust, str.rjust)
    text = ["  ".join(f(cell, w) for f, cell, w in zip(align, line, widths, strict=True)).rstrip() for line in lines]
    lost = Counter((row["provider"], row["error"]) for row in rows if row["error"])
    text += [f"not timed: {name}: {error} ({count} cases)" for (name, error), count in lost.items()]
    return "\n".join(text)


def account(sessions: Mapping[int, Session]) -> str:
    """Where the time of a run went."""
    lines = []
    for threads, session in sessions.items():
        spent = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in session.seconds.items())
        lines.append(f"{threads} threads: {spent}")
    return "\n".join(lines)


def open_session(device: str, threads: int, protocol: samplers.Protocol, modules: Sequence[str]) -> Session:
    """With as many slots as the device's providers may prepare their calls in at a time."""
    slots = document.slots(threads) if device == "cpu" else [document.cpus()] * CUDA_SLOTS
    return Session(device, slots, protocol, modules, document.gpu_clocks if device == "cuda" else None)


def main(argv: Sequence[str] | None = None, modules: Sequence[str] | None = None) -> int:
    """Run the command line and return the process's exit code."""
    args = arguments(argv)
    modules = modules or (EAGER_MODULES if args.device == "emulated" else MODULES)
    sessions: dict[int, Session] = {}
    started = time.monotonic()
    try:
        wanted = plan(args, modules)
        if args.list:
            print(listing(wanted, modules))
            return 0
        if wanted.device == "cuda" and not torch.cuda.is_available():
            raise Mistake("no CUDA device is visible to torch")
        for threads in wanted.threads:
            sessions[threads] = open_session(wanted.device, threads, wanted.protocol, modules)
            if wanted.end_seconds is not None:
                sessions[threads].end = started + wanted.end_seconds
        device = (
            document.cpu_device()
            if wanted.device == "cpu"
            else document.cuda_device(sessions[wanted.threads[0]].machine, wanted.device)
        )
        results = Document(args.out, device, wanted.protocol, args.commit)
        early = measure(wanted, results, sessions)
    except (Mistake, OtherRun, Failure, TimeUp) as problem:
        print(f"bench.run: {problem or 'the time is up before the first case'}", file=sys.stderr)
        return 2
    finally:
        for session in sessions.values():
            session.close()
    print(table(results.rows))
    print(account(sessions), file=sys.stderr)
    if wanted.device == "emulated":
        print("these are times of an emulator, no speeds")
    if early:
        print(f"bench.run: {early}; the same command goes on" if args.out else f"bench.run: {early}", file=sys.stderr)
    if args.out:
        print(f"wrote {args.out}")
    return 130 if early and early.startswith("interrupted") else 0


if __name__ == "__main__":
    sys.exit(main())
