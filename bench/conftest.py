"""``pytest bench --benchmark-only``: the cases of ``bench.run`` under pytest-benchmark, against PyTorch alone.

The numbers that are published come from ``python -m bench.run``, where each provider has a process of its own. Here one
process has ours, oneDNN, eager PyTorch and the limit. With ``--benchmark-disable`` results are verified, and nothing is
timed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import limits, problems, providers, timing
from bench.cases import Case
from bench.document import Document, cpu_device
from bench.providers import LIMIT, OURS
from bench.run import table
from bench.session import free_memory_bytes, new_row

MODULES = tuple(f"bench.peers.{name}" for name in ("ours", "vendor", "eager", "decode"))
PROTOCOL = timing.Protocol()
DOCUMENT = pytest.StashKey[Document]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--qops-json", type=Path, metavar="PATH", help="write every sample to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[DOCUMENT] = Document(config.getoption("--qops-json"), cpu_device(), PROTOCOL)


class Comparison:
    """What the ``compare`` fixture gives to a benchmark."""

    def __init__(self, benchmark: Any, results: Document) -> None:
        self._benchmark, self._results = benchmark, results

    def __call__(self, case: Case) -> None:
        """pytest-benchmark times ours, and the set-up of each of its rounds takes a sample of the others."""
        case = case.with_axes(threads=torch.get_num_threads())
        offered = providers.all(case.op, "cpu", MODULES)
        self._benchmark.group = case.op
        if self._benchmark.disabled:
            problem = problems.make(case.op, case.axes)
            for provider in offered:
                timing.verify(provider, problem, provider.build(problem)())
            self._benchmark.pedantic(offered[0].build(problem))  # a benchmark that calls nothing is a warning
            return
        rows = {provider.name: new_row(case, provider.name, provider.accuracy) for provider in offered}
        memory_bytes = free_memory_bytes() // (len(offered) + 1)
        sampled: dict[str, timing.Sampled] = {}
        for provider in offered:
            sampled[provider.name], found = timing.prepare(provider, case.axes, "cpu", PROTOCOL, memory_bytes)
            rows[provider.name].update(found)
        limit = limits.CpuLimit(case.op, case.axes, PROTOCOL, memory_bytes)
        sampled[LIMIT] = limit
        rows[LIMIT] = {**new_row(case, LIMIT, ""), "rotated_inputs": limit.copies, "peak_kind": limit.kind}
        ours = sampled.pop(OURS)
        assert isinstance(ours, timing.Sampler)
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
        self._results.add(case, list(rows.values()), offered)


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest):
    with torch.inference_mode():
        yield Comparison(benchmark, request.config.stash[DOCUMENT])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash[DOCUMENT]
    if results.rows:
        terminalreporter.section("interleaved with PyTorch in one process")
        terminalreporter.write_line(table(results.rows))
