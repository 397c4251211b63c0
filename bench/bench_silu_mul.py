"""silu_mul against the formula of Transformers."""

from __future__ import annotations

import pytest

from bench.problems.shared.cases import Case, benchmarked


@pytest.mark.parametrize("case", benchmarked("silu_mul"), ids=str)
def bench_silu_mul(compare, case: Case) -> None:
    compare(case)
