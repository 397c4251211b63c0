"""How the steps of ``bench.gpu_evidence`` run and end, and what is kept of them, whatever happens."""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "build" / "gpu_evidence" / "site"
PEERS = ROOT / "build" / "gpu_evidence" / "peers"
SCHEMA = "qops-gpu-evidence-2"
OUTCOME = re.compile(r"(tests/\S+?\.py::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
STARTED = re.compile(r"(tests/\S+?\.py::\S+)")


@dataclass
class Step:
    """How one command ended: passed, failed, timed out, interrupted, unavailable or left out, with the reason.

    ``failed`` names what failed in it: tests, or providers at an operator.
    """

    stage: str
    name: str
    command: list[str]
    status: str
    seconds: float
    note: str
    source: str
    utc: str
    failed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Ended:
    """What a command came to: its exit status, None where its time was over, or it could not be started."""

    code: int | None
    lines: list[str]
    seconds: float
    is_missing: bool = False
    is_interrupted: bool = False


@dataclass
class Tests:
    """What ``pytest -v`` has said until it ended, or was ended."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    running: str = ""


def tests_of(lines: Sequence[str]) -> Tests:
    """A line begins with the name of a test, and ends with its outcome; whatever a crash says may stand between."""
    found = Tests()
    for line in lines:
        if outcome := OUTCOME.match(line):
            found.passed += outcome[2] == "PASSED"
            found.failed += [outcome[1]] * (outcome[2] in ("FAILED", "ERROR"))
            found.running = ""
        elif started := STARTED.match(line):
            found.running = started[1]
    return found


def rows_of(file: Path) -> list[dict[str, Any]]:
    """Of a document of ``bench.run``, as far as it was written."""
    return json.loads(file.read_text())["results"] if file.is_file() else []


@dataclass
class Evidence:
    """What this machine has shown so far.

    Attributes:
        out: folder of the results.
        kind: "cuda" or "emulated".
        device: the GPU's name.
        source: fingerprint of the tree.
        has_qops, has_kernels: what the stage ``build`` has found to work.
        deadline: of the stage, by ``time.monotonic()``.
    """

    out: Path
    kind: str
    device: str
    source: str
    modules: Path | None = None
    peers: Path | None = None
    commit: str = ""
    depth: int | None = None
    has_qops: bool = True
    has_kernels: bool = True
    versions: dict[str, str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    deadline: float = 0.0
    interrupted: threading.Event = field(default_factory=threading.Event)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _groups: set[int] = field(default_factory=set)

    @property
    def has_gpu(self) -> bool:
        return self.kind == "cuda"

    def of(self, stage: str) -> list[Step]:
        """Its steps on this source."""
        return [step for step in self.steps if (step.stage, step.source) == (stage, self.source)]

    def passed(self, stage: str, name: str | None = None) -> bool:
        """Whether it has passed, of this source: all of it, or one step."""
        steps = [step for step in self.steps if step.stage == stage and name in (None, step.name)]
        return bool(steps) and all((step.status, step.source) == ("passed", self.source) for step in steps)

    def record(
        self,
        stage: str,
        name: str,
        command: Sequence[str],
        status: str,
        seconds: float,
        note: str,
        failed: Sequence[str] = (),
    ) -> None:
        """In place of what the step came to before; written at once."""
        utc = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        step = Step(stage, name, list(command), status, round(seconds, 1), note, self.source, utc, list(failed))
        with self._lock:
            self.steps = [step for step in self.steps if (step.stage, step.name) != (stage, name)]
            self.steps.append(step)
            document = {
                "schema": SCHEMA,
                "device": self.device,
                "versions": self.versions,
                "steps": list(map(asdict, self.steps)),
            }
            whole = self.out / "evidence.json.part"
            whole.write_text(json.dumps(document, indent=1) + "\n")
            whole.replace(self.out / "evidence.json")
            print(f"=== {stage}, {name}: {status} in {seconds:.0f} s {note}".rstrip(), flush=True)

    def left(self) -> float:
        """Seconds of the stage."""
        return self.deadline - time.monotonic()

    def stop(self) -> None:
        """Ends whatever runs, and lets nothing begin; what was running is recorded with what it has said."""
        with self._lock:
            self.interrupted.set()
            for group in self._groups:
                kill(group)

    def execute(self, stage: str, name: str, command: Sequence[str], limit: float, env: Mapping[str, str]) -> Ended:
        """Runs a command in the root of the tree, with what was built before the tree's own modules."""
        limit = max(1.0, min(limit, self.left()))
        print(f"\n=== {stage}, {name}: at most {limit:.0f} s\n+ {' '.join(command)}", flush=True)
        start, lines, late = time.monotonic(), list[str](), threading.Event()
        if self.interrupted.is_set():
            return Ended(None, [], 0.0, is_interrupted=True)
        environment = {**os.environ, "PYTHONPATH": f"{SITE}{os.pathsep}{PEERS}", "PYTHONUNBUFFERED": "1", **env}
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, text=True, errors="replace", start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except FileNotFoundError:
            return Ended(None, [f"{command[0]} is not installed"], 0.0, is_missing=True)

        def give_up() -> None:
            late.set()
            kill(process.pid)

        with self._lock:
            self._groups.add(process.pid)
            if self.interrupted.is_set():
                kill(process.pid)
        timer = threading.Timer(limit, give_up)
        timer.daemon = True
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            with self._lock, (self.out / "evidence.log").open("a") as log:
                log.write(f"{name}: {line}")
        code = process.wait()
        timer.cancel()
        with self._lock:
            self._groups.discard(process.pid)
        if code != 0:
            print("".join(lines[-25:]), end="")
        stopped = self.interrupted.is_set() and code < 0
        return Ended(None if late.is_set() else code, lines, time.monotonic() - start, is_interrupted=stopped)

    def run(
        self,
        stage: str,
        name: str,
        command: Sequence[str],
        limit: float = float("inf"),
        env: Mapping[str, str] | None = None,
        unavailable: str = r"(?!)",
    ) -> bool:
        """Runs a command and records it.

        Args:
            stage, name: of the step.
            command: ended when the limit, or the stage's time, is over, with all processes that it has started.
            limit: seconds.
            env: on top of this process's.
            unavailable: where this matches what a failed command printed, the machine lacks something.

        Returns:
            Whether it passed.
        """
        ended = self.execute(stage, name, command, limit, env or {})
        status = status_of(ended, unavailable)
        tests = tests_of(ended.lines)
        note = summary(ended.lines, unavailable)
        if status in ("failed", "timed out") and tests.running:
            note = f"in {tests.running}: {note}"
        self.record(stage, name, command, status, ended.seconds, note, failing(tests, status))
        return status == "passed"

    def run_tests(self, stage: str, name: str, command: Sequence[str], limit: float = float("inf")) -> bool:
        """The same for ``pytest -v``, of which at least one test has to pass: what skips all has shown nothing."""
        ended = self.execute(stage, name, command, limit, {})
        status, tests = status_of(ended, r"(?!)"), tests_of(ended.lines)
        if (status == "passed" and not tests.passed) or ended.code == 5:
            status, note = "failed", f"no test has run: {summary(ended.lines, r'(?!)')}"
        elif tests.running:
            what = "it hangs" if status == "timed out" else f"exit status {ended.code}"
            note = f"{tests.passed} passed, {len(tests.failed)} failed, then {what} in {tests.running}"
        else:
            note = summary(ended.lines, r"(?!)")
        self.record(stage, name, command, status, ended.seconds, note, failing(tests, status))
        return status == "passed"

    def run_bench(self, stage: str, command: Sequence[str], file: Path, ours: str = "qops") -> bool:
        """The same for ``bench.run``, which ends well whatever its providers do: ours must have its times."""
        before = {json.dumps(row) for row in rows_of(file)}
        ended = self.execute(stage, "bench.run", command, float("inf"), {})
        status = status_of(ended, r"(?!)")
        rows = rows_of(file)
        lost = {f"{row['provider']}, {row['op']}: {row['error']}": row for row in rows if has_failed(row)}
        timed = sum(row["provider"].startswith(ours) and bool(row["samples_us"]) for row in rows)
        note = f"{timed} cases timed, {len(rows)} rows" if rows else summary(ended.lines, r"(?!)")
        note += f"; lost: {'; '.join(lost)}" if lost else ""
        if status == "passed" and not (timed and len(rows) >= len(before)):
            status, note = "failed", f"nothing is timed: {note}"
        if status == "passed" and any(row["provider"] == ours for row in lost.values()):
            status = "failed"
        self.record(stage, "bench.run", command, status, ended.seconds, note[:2000], sorted(lost))
        return status == "passed"


def has_failed(row: Mapping[str, Any]) -> bool:
    """Not where a provider does not take a case."""
    return bool(row["error"]) and not row["error"].startswith("Unsupported: ")


def failing(tests: Tests, status: str) -> list[str]:
    """Also the one in which a process has crashed, or was killed."""
    return [*tests.failed, *([tests.running] if tests.running and status != "passed" else [])]


def kill(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def status_of(ended: Ended, unavailable: str) -> str:
    if ended.is_missing:
        return "unavailable"
    if ended.is_interrupted:
        return "interrupted"
    if ended.code is None:
        return "timed out"
    if ended.code == 0:
        return "passed"
    return "unavailable" if re.search(unavailable, "".join(ended.lines)) else "failed"


def summary(lines: Sequence[str], unavailable: str) -> str:
    """The line that says it all: the reason, what pytest counted, else the last."""
    for pattern in (unavailable, r"\d+ (passed|failed|skipped).* in "):
        for line in reversed(lines):
            if re.search(pattern, line):
                return line.strip(" =\n")[:160]
    return next((line.strip()[:160] for line in reversed(lines) if line.strip()), "")
