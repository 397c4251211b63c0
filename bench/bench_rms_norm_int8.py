"""rms_norm_int8 and add_rms_norm_int8 against eager PyTorch, and against this library's operators one by one."""

from __future__ import annotations

import pytest

from bench.problems.shared.cases import Case, benchmarked


@pytest.mark.parametrize("case", benchmarked("rms_norm_int8"), ids=str)
def bench_rms_norm_int8(compare, case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("case", benchmarked("add_rms_norm_int8"), ids=str)
def bench_add_rms_norm_int8(compare, case: Case) -> None:
    compare(case)
