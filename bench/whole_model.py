"""Times whole models from a GGUF file on a CPU: qops beside llama.cpp and ik_llama.cpp, with the same file, in turn.

    python -m bench.whole_model                        # the model of the demo
    python -m bench.whole_model FILE.gguf --threads 1,2 --out r.json
    python -m bench.whole_model --seeded llama-3.2-1b  # random weights in the shape of a larger one

Each runner has a process of its own, which is stopped while others are measured. Tokens are given, not chosen: nobody
samples, but for Transformers' ``generate``. Before anything is timed, the logits after all tokens of both phases are
compared with those of a dense float32 model on Transformers' own layers, to whose largest value errors are relative.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.peers.models import MODULES, Model, Runner, seeded
from bench.problems.shared.operator import LARGEST_ERROR_OF_INT8_ACTIVATIONS as LARGEST_ERROR
from bench.problems.shared.provider import version
from bench.reporting.stats import median
from bench.timing import document

SCHEMA = "qops-whole-model-1"
# Of any vocabulary.
LONG_PROMPT = [3 + 29 * i % 61 for i in range(256)]
PROMPT, DECODED = LONG_PROMPT[:16], LONG_PROMPT[16:80]
PHASES = ("decode", "prefill")
ANSWER_SECONDS = 120.0


def runners(modules: Sequence[str] = MODULES) -> list[Runner]:
    return [runner for name in modules for runner in importlib.import_module(name).RUNNERS]


def feed(model: Model, phase: str) -> None:
    """All tokens of a phase: one after another behind a short prompt, or a long one at once."""
    model.restart()
    for tokens in [PROMPT, *([token] for token in DECODED)] if phase == "decode" else [LONG_PROMPT]:
        model.feed(tokens)


def seconds(runner: Runner, model: Model, phase: str) -> float:
    if phase == "decode":
        return runner.decode_seconds(model, PROMPT, DECODED)
    model.restart()
    start = time.perf_counter()
    model.feed(LONG_PROMPT)
    return time.perf_counter() - start


def dense_logits(path: Path) -> dict[str, np.ndarray]:
    """By phase; float32 throughout."""
    import qops
    from qops.models.load import dense_model

    model = dense_model(qops.load_model(path, dtype=torch.float32), torch.float32)
    tokens = {"decode": PROMPT + DECODED, "prefill": LONG_PROMPT}
    return {phase: model(torch.tensor([ids])).logits[0, -1].numpy() for phase, ids in tokens.items()}


def serve(connection: Connection, name: str, modules: Sequence[str], path: Path, threads: int) -> None:
    """Answers ("logits", phase) and ("seconds", phase), and sends what it raises; None ends it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # the peers print what they load
    try:
        with torch.inference_mode():
            runner = next(runner for runner in runners(modules) if runner.name == name)
            model = runner.open(path, threads)
            connection.send(None)
            while (request := connection.recv()) is not None:
                what, phase = request
                if what == "seconds":
                    connection.send(seconds(runner, model, phase))
                else:
                    feed(model, phase)
                    connection.send(model.logits())
    except Exception as error:
        connection.send(error)


class Process:
    """A runner's."""

    def __init__(self, runner: Runner, modules: Sequence[str], path: Path, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, runner.name, modules, path, threads)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        with _environment(OMP_NUM_THREADS=str(threads)):
            self._process.start()
        theirs.close()
        try:
            self._receive()
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def _receive(self) -> Any:
        if not self._connection.poll(ANSWER_SECONDS):
            raise RuntimeError(f"no answer in {ANSWER_SECONDS:.0f} s")
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"its process ended with exit code {self._process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def ask(self, what: str, phase: str) -> Any:
        self._signal(signal.SIGCONT)
        self._connection.send((what, phase))
        answer = self._receive()
        self._signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._signal(signal.SIGCONT)
            self._connection.send(None)
        self._process.join(10)
        self._process.kill()
        self._process.join()


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@dataclass
class Row:
    """What a runner did on a number of threads; ``reasons`` why a phase was not timed."""

    runner: str
    accuracy: str
    threads: int
    versions: dict[str, str | None]
    reasons: dict[str, str] = field(default_factory=dict)
    relative_error: dict[str, float] = field(default_factory=dict)
    same_token: dict[str, bool] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})


def verify(row: Row, phase: str, logits: np.ndarray, expected: np.ndarray) -> None:
    """ValueError where the logits are those of another model."""
    error = float(np.abs(logits - expected).max() / np.abs(expected).max())
    row.relative_error[phase] = error
    row.same_token[phase] = bool(logits.argmax() == expected.argmax())
    if not error <= LARGEST_ERROR:
        raise ValueError(f"wrong logits: error {error:.2g} of the largest, at most {LARGEST_ERROR}")


@contextlib.contextmanager
def _reasons(row: Row, phases: Sequence[str]) -> Iterator[None]:
    """Whatever a peer raises costs it these phases."""
    try:
        yield
    except Exception as error:
        row.reasons |= dict.fromkeys(phases, f"{type(error).__name__}: {error}")


def measure(path: Path, threads: int, rounds: int, wanted: Sequence[Runner], modules: Sequence[str]) -> list[Row]:
    """Every runner once a round, another one first each time."""
    expected = dense_logits(path)
    rows: dict[str, Row] = {}
    processes: dict[str, Process] = {}
    try:
        for runner in wanted:
            versions = {name: version(name) for name in runner.requires}
            row = rows[runner.name] = Row(runner.name, runner.accuracy, threads, versions)
            missing = [name for name, found in versions.items() if found is None]
            if missing:
                row.reasons = dict.fromkeys(PHASES, f"not installed: {', '.join(missing)}")
                continue
            with _reasons(row, PHASES):
                processes[runner.name] = process = Process(runner, modules, path, threads)
                for phase in PHASES:
                    with _reasons(row, [phase]):
                        verify(row, phase, process.ask("logits", phase), expected[phase])
        for index in range(rounds):
            names = list(processes)
            first = index % max(1, len(names))
            for name in names[first:] + names[:first]:
                for phase in PHASES:
                    if phase not in rows[name].reasons:
                        rows[name].seconds[phase].append(processes[name].ask("seconds", phase))
    finally:
        for process in processes.values():
            process.close()
    return list(rows.values())


def table(rows: Sequence[Row]) -> str:
    """Markdown: medians, and between brackets the least and the largest of all rounds."""
    lines = [
        "| threads | runner | decode, ms a token | prefill, tokens a second | errors | accuracy |",
        "|---:|---|---:|---:|---:|---|",
    ]
    for row in rows:
        step = [1e3 * seconds / len(DECODED) for seconds in row.seconds["decode"]]
        speed = [len(LONG_PROMPT) / seconds for seconds in row.seconds["prefill"]]
        cells = [
            row.reasons.get(phase) or f"{median(found):.{digits}f} ({min(found):.{digits}f} - {max(found):.{digits}f})"
            for phase, found, digits in (("decode", step, 2), ("prefill", speed, 0))
        ]
        errors = ", ".join(f"{error:.3f}" for error in row.relative_error.values())
        lines.append(f"| {row.threads} | {row.runner} | {' | '.join(cells)} | {errors} | {row.accuracy} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, modules: Sequence[str] = MODULES) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.whole_model", description=__doc__, formatter_class=form)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("file", nargs="?", type=Path, metavar="FILE.gguf", help="default: the model of qops.demo")
    source.add_argument("--seeded", choices=sorted(seeded.SHAPES), help="in place of a file, written for this run")
    parser.add_argument("--threads", default=f"1,{document.cores()}", help="numbers, with commas between")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON document with every sample")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.seeded:
            args.file = seeded.write(Path(folder, f"{args.seeded}-seeded.gguf"), seeded.SHAPES[args.seeded])
        elif args.file is None:
            from qops.demo.artefact import Cache

            args.file = Cache().ensure_gguf()
        return report(args, modules)


def report(args: argparse.Namespace, modules: Sequence[str]) -> int:
    rows: list[Row] = []
    with torch.inference_mode():
        for threads in dict.fromkeys(map(int, args.threads.split(","))):
            rows += measure(args.file, threads, args.rounds, runners(modules), modules)
    if args.out:
        found = {
            "schema": SCHEMA,
            "file": {"name": args.file.name, "bytes": args.file.stat().st_size},
            "git_sha": document.git("rev-parse", "HEAD"),
            "torch": torch.__version__,
            "device": document.cpu_device(),
            "tokens": {"prompt": len(PROMPT), "decode": len(DECODED), "prefill": len(LONG_PROMPT)},
            "rows": [vars(row) for row in rows],
        }
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
