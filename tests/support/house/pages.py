"""The examples of pages under docs/ whose packages an environment of the tests need not have."""

from __future__ import annotations

import doctest
from pathlib import Path

import torch

from tests.support.house.rules import fenced_blocks

DOCS = Path(__file__).resolve().parents[3] / "docs"


def python_blocks(page: str) -> list[str]:
    """The fenced python of a page."""
    return fenced_blocks((DOCS / page).read_text(), "python")


def run_examples(page: str) -> int:
    """Runs each block of a page as a doctest of its own; raises with doctest's report. Returns how many statements."""
    attempted = 0
    for block in python_blocks(page):
        report: list[str] = []
        test = doctest.DocTestParser().get_doctest(block, {}, page, page, 0)
        with torch.inference_mode(False), torch.enable_grad():  # as readers have it
            result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
        assert result.failed == 0, "".join(report)
        attempted += result.attempted
    return attempted
