"""``pytest bench --benchmark-only``: the cases of ``bench.run`` under pytest-benchmark, with its table and its JSON.

On a GPU every provider that is installed (ours, cuBLAS, eager and compiled PyTorch, peers) is a benchmark of its own,
in the group of its case and beside the limit. They are measured as ``bench.run`` does: a process each, verified,
interleaved, CUDA graphs over rotated weights, CUDA events; pytest-benchmark is given the samples. On the CPU one
process has ours, oneDNN, eager PyTorch and the limit; what is published comes from ``python -m bench.run``.

QOPS_BENCH_DEVICE=cpu, cuda or emulated chooses; the last takes the way of a GPU where there is none, and its times say
nothing. With ``--benchmark-disable`` results are verified, and nothing is timed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import problems
from bench.peers import MODULES as ALL_MODULES
from bench.peers import providers
from bench.peers.providers import EAGER_MODULES
from bench.problems.shared import devices
from bench.problems.shared.cases import Case
from bench.problems.shared.provider import LIMIT, OURS
from bench.run import open_session, table
from bench.timing import document, limits, samplers
from bench.timing.document import Document, cpu_device
from bench.timing.session import Session, free_memory_bytes, new_row

DEVICE = devices.chosen()
MODULES = ALL_MODULES if DEVICE == "cuda" else EAGER_MODULES
PROTOCOL = {"cpu": samplers.Protocol(), "cuda": samplers.QUICK, "emulated": samplers.EMULATED}[DEVICE]
RESULTS = pytest.StashKey["Results"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--qops-json", type=Path, metavar="PATH", help="write every sample to this file")


class Results:
    """The document, the processes of a GPU's providers, and the cases that they have been asked for."""

    def __init__(self, config: pytest.Config) -> None:
        self._path = config.getoption("--qops-json")
        self._document: Document | None = None
        self._session: Session | None = None
        self._rows: dict[str, dict[str, dict[str, Any]]] = {}

    @property
    def document(self) -> Document:
        if self._document is None:
            device = cpu_device() if DEVICE == "cpu" else document.cuda_device(self.session().machine, DEVICE)
            self._document = Document(self._path, device, PROTOCOL)
        return self._document

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self._document.rows if self._document is not None else []

    def session(self, timed: bool = True) -> Session:
        """Of all cases of a run; what is not timed is prepared, and that is all."""
        if self._session is None:
            protocol = PROTOCOL if timed else dataclasses.replace(PROTOCOL, rounds=0)
            self._session = open_session(DEVICE, document.cores(), protocol, MODULES)
        return self._session

    def of(self, case: Case, names: list[str], timed: bool) -> dict[str, dict[str, Any]]:
        """The rows of a case by provider, measured when the first of them is asked for."""
        if str(case) not in self._rows:
            offered = [p for p in of_case(case.op) if p.name in names]
            rows = self.session(timed).run(case, offered)
            self._rows[str(case)] = {row["provider"]: row for row in rows}
            if timed:
                self.document.add(case, rows, offered)
        return self._rows[str(case)]

    def close(self) -> None:
        if self._session is not None:
            self._session.close()


class Player:
    """A clock, and a call that takes on it what was measured elsewhere."""

    def __init__(self) -> None:
        self.now, self.left = 0.0, list[float]()

    def __call__(self) -> float:
        return self.now

    def play(self) -> None:
        self.now += self.left.pop(0)


PLAYER = Player()


def of_case(op: str) -> list[providers.Provider]:
    """Whoever is installed, ours first."""
    return [p for p in providers.all(op, devices.of_providers(DEVICE), MODULES) if not p.missing()]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = Results(config)


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[RESULTS].close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if DEVICE != "cpu" and "provider" in metafunc.fixturenames:
        op = metafunc.function.__name__.removeprefix("bench_")
        metafunc.parametrize("provider", [*(p.name for p in of_case(op)), LIMIT])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A GPU's samples come from its own processes; they are played to pytest-benchmark, whose clock is ours."""
    for item in items:
        if DEVICE != "cpu" and "benchmark" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=PLAYER))


class OnGpu:
    """What the ``compare`` fixture gives to a benchmark on a GPU."""

    def __init__(self, benchmark: Any, results: Results, provider: str, items: list[pytest.Item]) -> None:
        self._benchmark, self._results, self._provider, self._items = benchmark, results, provider, items

    def __call__(self, case: Case) -> None:
        names = [
            item.callspec.params["provider"]
            for item in self._items
            if isinstance(item, pytest.Function) and str(item.callspec.params.get("case")) == str(case)
        ]
        row = self._results.of(case, names, timed=not self._benchmark.disabled)[self._provider]
        if row["error"]:
            (pytest.skip if row["error"].startswith("Unsupported: ") else pytest.fail)(row["error"])
        self._benchmark.group, self._benchmark.name = str(case), self._provider
        self._benchmark.extra_info.update({key: row[key] for key in ("provider", "accuracy", "max_err", "axes")})
        PLAYER.left = [1e-6 * us for us in row["samples_us"]] or [0.0]
        self._benchmark.pedantic(PLAYER.play, rounds=len(PLAYER.left))


class Comparison:
    """What it gives on the CPU."""

    def __init__(self, benchmark: Any, results: Results) -> None:
        self._benchmark, self._results = benchmark, results

    def __call__(self, case: Case) -> None:
        """pytest-benchmark times ours, and the set-up of each of its rounds takes a sample of the others."""
        case = case.with_axes(threads=torch.get_num_threads())
        offered = of_case(case.op)
        self._benchmark.group = case.op
        if self._benchmark.disabled:
            problem = problems.make(case.op, case.axes)
            for provider in offered:
                samplers.verify(provider, problem, provider.build(problem)())
            self._benchmark.pedantic(offered[0].build(problem))  # a benchmark that calls nothing is a warning
            return
        rows = {provider.name: new_row(case, provider.name, provider.accuracy) for provider in offered}
        memory_bytes = free_memory_bytes() // (len(offered) + 1)
        sampled: dict[str, samplers.Sampled] = {}
        for provider in offered:
            sampled[provider.name], found = samplers.prepare(provider, case.axes, "cpu", PROTOCOL, memory_bytes)
            rows[provider.name].update(found)
        limit = limits.CpuLimit(case.op, case.axes, PROTOCOL, memory_bytes)
        sampled[LIMIT] = limit
        rows[LIMIT] = {**new_row(case, LIMIT, ""), "rotated_inputs": limit.copies, "peak_kind": limit.kind}
        ours = sampled.pop(OURS)
        assert isinstance(ours, samplers.Sampler)
        turns = [*sampled]

        def set_up() -> tuple[tuple[Any, ...], dict[str, Any]]:
            for name in turns:
                for key, value in sampled[name].sample().items():
                    rows[name].setdefault("samples_us" if key == "us" else key, []).append(value)
            turns.append(turns.pop(0))  # another one goes first in the next round
            ours.sample()  # the caches are others'
            return (ours.batch(ours.calls),), {}

        self._benchmark.pedantic(ours.run, setup=set_up, rounds=PROTOCOL.rounds)
        rows[OURS]["samples_us"] = [1e6 * seconds / ours.calls for seconds in self._benchmark.stats.stats.data]
        for name, row in rows.items():
            row["calls_per_sample"] = (ours if name == OURS else sampled[name]).calls
        self._results.document.add(case, list(rows.values()), offered)


@pytest.fixture
def provider() -> str:
    """Whose time a benchmark shows: on the CPU ours; on a GPU each one's, as pytest_generate_tests says."""
    return OURS


@pytest.fixture
def compare(benchmark: Any, provider: str, request: pytest.FixtureRequest):
    results = request.config.stash[RESULTS]
    if DEVICE != "cpu":
        yield OnGpu(benchmark, results, provider, request.session.items)
        return
    with torch.inference_mode():
        yield Comparison(benchmark, results)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if rows := config.stash[RESULTS].rows:
        where = {
            "cpu": "interleaved with PyTorch in one process",
            "cuda": "interleaved, a process for each provider",
            "emulated": "times of an emulator, no speeds",
        }[DEVICE]
        terminalreporter.section(where)
        terminalreporter.write_line(table(rows))
