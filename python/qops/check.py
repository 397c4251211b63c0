"""``python -m qops check``: every kernel of this installation proves itself on this machine.

The cases stand in ``_check_cases.py``. The level of instructions is chosen when the module loads, so each has a process
of its own; their results must be the same, bit for bit, and a GPU's too where the contract says so.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from qops import _native, build_info
from qops._check_cases import CHECKS, OWN_BITS_ON_A_GPU, Run


@dataclass
class Outcome:
    """What an operator did at one level, or on one GPU.

    Attributes:
        op, place: which, and where.
        cases: a digest of the results of each.
        failed: the case that failed; None where none did.
        what: it was.
        has_kernel: whether there is anything to check.
    """

    op: str
    place: str
    cases: dict[str, str] = field(default_factory=dict)
    failed: str | None = None
    what: str = ""
    has_kernel: bool = True


def operators() -> list[str]:
    """Every operator that this installation registers, and every one that has a check: each must have the other."""
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("qops::"))
    return sorted({name.removeprefix("qops::").partition(".")[0] for name in names} | set(CHECKS))


def places() -> list[str]:
    """The levels of this build that this CPU runs, and the GPUs that it has kernels for."""
    gpus = (index for index in range(torch.cuda.device_count()) if why_unused(index) is None)
    return [*build_info()["isa_available"].split(), *(f"cuda:{index}" for index in gpus)]


def why_unused(gpu: int) -> str | None:
    """Why this build has nothing to run on a GPU, or None."""
    archs = build_info()["cuda_archs"].split()
    if not archs:
        return "no CUDA kernels in this build"
    major, minor = torch.cuda.get_device_capability(gpu)
    if any(_runs(arch, major, minor) for arch in archs):
        return None
    return f"no code for compute capability {major}.{minor} in this build"


def _runs(arch: str, major: int, minor: int) -> bool:
    """Whether a GPU of this compute capability runs an entry of ``cuda_archs``."""
    name, _, kind = arch.partition("-")
    built_for, this = int(name.rstrip("af")), 10 * major + minor
    if name.endswith("a"):
        return built_for == this
    return built_for <= this and (kind == "virtual" or built_for // 10 == major)


def _has_kernel(name: str, key: str) -> bool:
    if key == "CUDA" and name in _native.without_cuda:
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def outcome(op: str, place: str, seed: int) -> Outcome:
    """Runs the cases of an operator in this process until one fails."""
    device = torch.device(place if place.startswith("cuda") else "cpu")
    found = Outcome(op, place)
    registered = [name for name in torch._C._dispatch_get_all_op_names() if name.split(".")[0] == f"qops::{op}"]
    if op not in CHECKS or not registered:
        found.failed, found.what = "none", "has no check" if registered else "has a check, but is not registered"
        return found
    key = "CUDA" if device.type == "cuda" else "CPU"
    missing = [name for name in registered if not _has_kernel(name, key)]
    found.has_kernel = len(missing) < len(registered)
    if missing:
        # Everywhere all overloads have one, or none has.
        if key == "CPU" or found.has_kernel or op not in _native.WITHOUT_CUDA_KERNEL:
            found.failed, found.what = "none", f"no {key} kernel for {', '.join(sorted(missing))}"
        return found
    run = Run(device, seed)
    _native._C.poison_outputs(True)  # an element that no kernel writes is NaN
    try:
        with torch.inference_mode():
            CHECKS[op](run)
    except Exception as error:  # whatever goes wrong in a kernel is what this is to report
        found.failed = run.case
        found.what = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    finally:
        _native._C.poison_outputs(False)
    found.cases = run.digests
    return found


class _Child:
    """A process for another level; it writes an outcome a line."""

    def __init__(self, place: str, ops: Sequence[str], seed: int) -> None:
        self._place, self._ops = place, ops
        # This package, wherever it was imported from.
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})\n"
        code += "from qops.__main__ import main\nsys.exit(main())"
        command = [sys.executable, "-c", code, "check", "--json", *_options(place, seed)]
        command += ["--op", ops[0]] if len(ops) == 1 else []
        # Levels run at the same time, and threads that spin while they wait would take each other's cores.
        changes = {"QOPS_ISA": place, "OMP_WAIT_POLICY": "passive"}
        self._process = subprocess.Popen(
            command, env={**os.environ, **changes}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def outcomes(self) -> Iterator[Outcome]:
        text, errors = self._process.communicate()
        found = [Outcome(**json.loads(line)) for line in text.splitlines()]
        yield from found
        code, missing = self._process.returncode, self._ops[len(found) :]
        if code != 0 or missing:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            last = errors.strip().splitlines()[-1:] or [""]
            op = missing[0] if missing else self._ops[-1]
            yield Outcome(op, self._place, failed="unknown", what=f"its process ended with {how} {last[0]}".rstrip())


def _options(place: str, seed: int) -> list[str]:
    return ["--at", place, "--seed", str(seed)]


def _compare(outcomes: Sequence[Outcome]) -> None:
    """Marks the first case of an operator whose results are not those of the first place where all passed."""
    passed = [result for result in outcomes if result.failed is None and result.has_kernel]
    for other in passed[1:]:
        if other.place.startswith("cuda") and other.op in OWN_BITS_ON_A_GPU:
            continue
        for case, digest in other.cases.items():
            # A GPU may have no kernels for a dtype, and its layouts another name.
            if passed[0].cases.get(case, digest) != digest:
                other.failed, other.what = case, f"other bits than at {passed[0].place}"
                break


def run(
    write: Callable[[str], object],
    machine: str,
    about: str,
    op: str | None = None,
    at: str | None = None,
    seed: int = 0,
    as_json: bool = False,
) -> int:
    """Checks operators and writes a line for each of them.

    Args:
        write: takes the lines.
        machine: what this is, in a line.
        about: the same in all that a report needs, written after a failure.
        op: this operator alone.
        at: this level or GPU alone.
        seed: of the inputs.
        as_json: write an outcome a line and nothing else, as a process for one level does.

    Returns:
        The exit status: 1 where anything failed.
    """
    start = time.monotonic()
    ops, where = [op] if op else operators(), [at] if at else places()
    own = build_info()["isa"]
    if as_json:
        for name in ops:
            write(json.dumps(asdict(outcome(name, where[0], seed))))
        return 0
    write(f"{machine}: {', '.join(where)}")
    # Every level has a process of its own, but for this one's if it is all that is asked for.
    here = where if where == [own] else [place for place in where if place.startswith("cuda")]
    children = [_Child(place, ops, seed) for place in where if place not in here]
    found = [outcome(name, place, seed) for name in ops for place in here]
    found += [result for child in children for result in child.outcomes()]
    failures: list[Outcome] = []
    for name in ops:
        mine = sorted((result for result in found if result.op == name), key=lambda result: where.index(result.place))
        if not mine:
            continue  # the process that would have checked it has ended, which is another operator's failure
        _compare(mine)
        failures += (result for result in mine if result.failed is not None)
        write(f"{name:<22} {_line(mine)}")
    for failure in failures:
        write(f"\nFAILED: {failure.op} at {failure.place}, seed {seed}")
        write(f"  case: {failure.failed}\n  what: {failure.what}")
        place = [] if failure.what.startswith("other bits") else _options(failure.place, seed)
        write(f"  again: {' '.join(['python -m qops check --op', failure.op, *(place or ['--seed', str(seed)])])}")
    if failures:
        write(f"\n{about}")
    seconds = time.monotonic() - start
    write(f"operators: {len(ops)}, failures: {len(failures)}, seconds: {seconds:.1f}")
    return int(bool(failures))


def _line(outcomes: Sequence[Outcome]) -> str:
    cases = max(len(result.cases) for result in outcomes)
    passed = [result.place for result in outcomes if result.failed is None and result.has_kernel]
    parts = [f"{cases:>3} cases passed: {', '.join(passed)}"] if passed else []
    failed = [result.place for result in outcomes if result.failed is not None]
    parts += [f"FAILED: {', '.join(failed)}"] if failed else []
    absent = [result.place for result in outcomes if not result.has_kernel and result.failed is None]
    parts += [f"no kernel: {', '.join(absent)}"] if absent else []
    return "; ".join(parts)
