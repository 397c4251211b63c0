"""The rounds of a case: every provider in a process of its own, one sample each in turn, A B C, B C A, C A B."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import problems
from bench.peers import MODULES
from bench.problems.shared.cases import Case
from bench.problems.shared.provider import LIMIT, Provider
from bench.timing import emulated, samplers
from bench.timing.samplers import Protocol

ROOT = Path(__file__).resolve().parents[2]
# A provider whose process has crashed so many times at an operator, or hung once, is not asked for that operator again.
MOST_CRASHES = 3
START_SECONDS = 120.0
# For all providers together, some of which hold their weights twice; of the memory that is free, of all of a GPU's.
MEMORY_SHARE = 0.5
CUDA_MEMORY_SHARE = 0.7


class Failure(Exception):
    """Why a provider has no time."""


class Hang(Failure):
    """It did not answer."""


class TimeUp(Exception):
    """The run is over in the middle of a case, which nobody is to blame for."""


class WorkerProcess:
    """A worker, on CPUs of its own choice, that runs only while it is asked: idle threads of others do not spin."""

    def __init__(
        self,
        device: str,
        cpus: Sequence[int],
        modules: Sequence[str],
        protocol: Protocol,
        emulator: str | None = None,
    ) -> None:
        threads = len(cpus)
        self._connection, theirs = multiprocessing.Pipe()
        # Who waits for an answer kills what has ended, while somebody else may be closing the session.
        self._killing = threading.Lock()
        self._stops = device == "cpu"
        self._started = False
        options = {
            "file": theirs.fileno(),
            "device": device,
            "threads": threads,
            "modules": list(modules),
            "protocol": asdict(protocol),
            "emulator": emulator,
        }
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        self._errors = tempfile.TemporaryFile("w+b")  # noqa: SIM115 (as long as the process)
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus)  # children inherit it, and so do all threads of theirs
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.timing.worker", json.dumps(options)],
                cwd=ROOT,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                start_new_session=True,  # Ctrl-C is the parent's
            )
        finally:
            os.sched_setaffinity(0, before)
        theirs.close()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, method: str, timeout: float, /, **arguments: Any) -> Any:
        """What the method returns. Raises Failure when it raises; the process is gone when it crashes or hangs."""
        try:
            if not self._started:
                self._receive(START_SECONDS)
                self._started = True
            if self._stops:
                os.killpg(self._process.pid, signal.SIGCONT)
            self._connection.send((method, arguments))
            good, answer = self._receive(timeout)
            if self._stops:
                os.killpg(self._process.pid, signal.SIGSTOP)
        except (EOFError, ConnectionError, ProcessLookupError):
            raise Failure(self._last_words()) from None
        if not good:
            raise Failure(answer)
        return answer

    def _receive(self, timeout: float) -> tuple[bool, Any]:
        if not self._connection.poll(timeout):
            self.kill()
            raise Hang(f"no answer in {timeout:.0f} s")
        return self._connection.recv()

    def _last_words(self) -> str:
        self.kill()
        code = self._process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"crashed: {how}" + (f": {lines[-1][:300]}" if lines else "")

    @contextlib.contextmanager
    def on(self, cpus: Sequence[int], afterwards: Sequence[int]) -> Iterator[None]:
        """All threads that it has and will have run on these CPUs meanwhile."""
        self._pin(cpus)
        try:
            yield
        finally:
            self._pin(afterwards)

    def _pin(self, cpus: Sequence[int]) -> None:
        # Threads end meanwhile, or all of it has.
        with contextlib.suppress(FileNotFoundError):
            for task in Path(f"/proc/{self._process.pid}/task").iterdir():
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(int(task.name), cpus)

    def kill(self) -> None:
        """With all processes that it has started. Any number of threads may."""
        with self._killing:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._connection.close()


def new_row(case: Case, name: str, accuracy: str) -> dict[str, Any]:
    """A row of the JSON document before anything was measured."""
    moved, flops = problems.bytes_and_flops(case.op, case.axes)
    return {
        "op": case.op,
        "provider": name,
        "axes": dict(case.axes),
        "accuracy": accuracy,
        "bytes": moved,
        "flops": flops,
        "max_err": None,
        "rotated_inputs": 0,
        "calls_per_sample": 0,
        "error": None,
        "samples_us": [],
    }


def rounds_of(costs: Sequence[float], protocol: Protocol) -> int:
    """How many rounds of samples that take so many seconds fit into the time of a case."""
    fitting = int(protocol.case_seconds / max(sum(costs), 1e-9))
    return min(protocol.rounds, max(protocol.least_rounds, fitting))


def turns(names: Sequence[str], index: int) -> list[str]:
    """The order of a round: another one goes first each time."""
    first = index % max(1, len(names))
    return [*names[first:], *names[:first]]


class Session:
    """The workers of one device and thread count, which live from case to case.

    ``slots`` are sets of CPUs, as many as there are threads in each: calls are timed on the first, and prepared on all.
    ``end``, by ``time.monotonic()``, is when whatever is under way raises TimeUp.
    """

    def __init__(
        self,
        device: str,
        slots: Sequence[Sequence[int]],
        protocol: Protocol,
        modules: Sequence[str] = MODULES,
        clocks: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        self._device, self._protocol, self._clocks = device, protocol, clocks
        self._slots = slots
        emulator = str(emulated.build()) if device == "emulated" else None
        # They start on all slots in turn; before they do anything they are pinned to one.
        starts = itertools.cycle(slots)
        self._start = lambda: WorkerProcess(device, next(starts), modules, protocol, emulator)
        self._workers: dict[str, WorkerProcess] = {}
        self._crashes: Counter[tuple[str, str]] = Counter()
        self._hung: set[tuple[str, str]] = set()
        self.end = math.inf
        self.seconds = dict.fromkeys(("preparing", "measuring", "releasing"), 0.0)

    def close(self) -> None:
        """Ends all workers, whatever they do."""
        for worker in self._workers.values():
            worker.kill()
        self._workers.clear()

    def _worker(self, provider: str) -> WorkerProcess:
        """The process that serves a provider."""
        worker = self._workers.get(provider)
        if worker is None or not worker.alive:
            worker = self._workers[provider] = self._start()
        return worker

    def ask(self, provider: str, method: str, op: str = "", /, **arguments: Any) -> Any:
        """Of the process of a provider; ``op`` is what a crash or a hang is counted for."""
        key = provider, op
        if key in self._hung:
            raise Failure("given up: it has hung before")
        if self._crashes[key] >= MOST_CRASHES:
            raise Failure(f"given up after {MOST_CRASHES} crashes")
        worker = self._worker(provider)
        # What the limit is measured with is compiled first: a part of its start.
        timeout = START_SECONDS if (provider, method) == (LIMIT, "prepare") else self._protocol.timeout_seconds
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeUp
        try:
            return worker.ask(method, min(left, timeout), **arguments)
        except Hang:
            if left <= timeout:
                raise TimeUp from None
            self._hung.add(key)
            raise
        finally:
            if not worker.alive:
                self._crashes[key] += 1

    @functools.cached_property
    def machine(self) -> dict[str, Any]:
        """The GPU. Asked once, of the process of the limit, in which no kernel of anybody else runs."""
        return self.ask(LIMIT, "machine")

    def run(self, case: Case, offered: Sequence[Provider]) -> list[dict[str, Any]]:
        """The rows of a case. Whatever a provider does, the others have theirs."""
        rows = {p.name: new_row(case, p.name, p.accuracy) for p in offered}
        rows[LIMIT] = new_row(case, LIMIT, "")
        try:
            with self._account("preparing"):
                costs = self._prepare(case, rows, offered)
            with self._account("measuring"):
                self._measure(case, rows, rounds_of(list(costs.values()), self._protocol), list(costs))
        finally:
            with self._account("releasing"):
                for name in rows:
                    if name in self._workers and self._workers[name].alive:
                        with contextlib.suppress(Failure, TimeUp):
                            self.ask(name, "release")
        return list(rows.values())

    @contextlib.contextmanager
    def _account(self, phase: str) -> Iterator[None]:
        """Where the time of a run goes."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] += time.monotonic() - start

    def _memory_bytes(self) -> int:
        """What all providers of a case may hold."""
        if self._device == "cpu":
            return free_memory_bytes()
        return int(CUDA_MEMORY_SHARE * self.machine["memory_bytes"])

    def _prepare(self, case: Case, rows: dict[str, dict[str, Any]], offered: Sequence[Provider]) -> dict[str, float]:
        """What a sample of each provider takes that can be timed.

        Last come those whose copies are built one by one: of these there are the fewer, the more all others read.
        """
        memory_bytes = self._memory_bytes() // len(rows)
        free: queue.SimpleQueue[Sequence[int]] = queue.SimpleQueue()
        for slot in self._slots:
            free.put(slot)
        costs: dict[str, float] = {}
        read: dict[str, int] = {}
        call_bytes = {p.name: samplers.call_bytes(p, case.axes) for p in offered}
        call_bytes[LIMIT] = rows[LIMIT]["bytes"]
        rebuilt = {p.name for p in offered if p.rebuilt}
        between_bytes = 0

        def prepare(name: str) -> None:
            slot = free.get()
            try:
                with self._worker(name).on(slot, self._slots[0]):
                    asked = {"name": name, "op": case.op, "axes": case.axes, "memory_bytes": memory_bytes}
                    found = self.ask(name, "prepare", case.op, **asked, between_bytes=between_bytes)
            except Failure as failure:
                rows[name]["error"] = str(failure)
            else:
                costs[name] = found.pop("seconds")
                read[name] = found.pop("made") * call_bytes[name]
                rows[name].update(found)
            finally:
                free.put(slot)

        # Here, since a worker ends with the thread that has started it.
        for name in rows:
            with contextlib.suppress(Failure):
                self._worker(name)
        with ThreadPoolExecutor(len(self._slots)) as pool:
            try:
                for future in [pool.submit(prepare, name) for name in rows if name != LIMIT and name not in rebuilt]:
                    future.result()
                prepare(LIMIT)  # alone, as it takes all that there is
                between_bytes = sum(read.values()) - max(read.values(), default=0)  # a round moves on past one
                for future in [pool.submit(prepare, name) for name in rows if name in rebuilt]:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.close()
                raise
        return {name: costs[name] for name in rows if name in costs}

    def _measure(self, case: Case, rows: dict[str, dict[str, Any]], rounds: int, names: list[str]) -> None:
        for index in range(rounds):
            for name in turns(names, index):
                row = rows[name]
                try:
                    sample = self.ask(name, "sample", case.op, name=name)
                except Failure as failure:
                    row["error"], row["samples_us"] = str(failure), []
                    names.remove(name)
                    continue
                row["samples_us"].append(sample.pop("us"))
                for key, value in sample.items():
                    row.setdefault(key, []).append(value)
            if self._clocks and index in (0, rounds // 2, rounds - 1):
                rows[LIMIT].setdefault("clocks", []).append(self._clocks())


def free_memory_bytes() -> int:
    """What the providers of a case may hold of the memory that is free."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return int(MEMORY_SHARE * 1024 * available)
