from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.harness import Comparison, Result, table, write

RESULTS = pytest.StashKey[list[Result]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--qops-json", type=Path, metavar="PATH", help="write every sample to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = []


@pytest.fixture
def compare(benchmark, request: pytest.FixtureRequest):
    with torch.inference_mode():
        yield Comparison(benchmark, request.config.stash[RESULTS])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    if not results:
        return
    terminalreporter.section("interleaved; times in microseconds; / qops: how many times longer than qops")
    terminalreporter.write_line(table(results))
    if path := config.getoption("--qops-json"):
        write(path, results)
        terminalreporter.write_line(f"wrote {path}")
