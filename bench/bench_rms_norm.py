"""rms_norm and add_rms_norm against eager PyTorch."""

from __future__ import annotations

import pytest

from bench.problems.shared.cases import Case, benchmarked


@pytest.mark.parametrize("case", benchmarked("rms_norm"), ids=str)
def bench_rms_norm(compare, case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("case", benchmarked("add_rms_norm"), ids=str)
def bench_add_rms_norm(compare, case: Case) -> None:
    compare(case)
