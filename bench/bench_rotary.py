"""rotary against the formula of Transformers."""

from __future__ import annotations

import pytest

from bench.problems.shared.cases import Case, benchmarked


@pytest.mark.parametrize("case", benchmarked("rotary"), ids=str)
def bench_rotary(compare, case: Case) -> None:
    compare(case)
