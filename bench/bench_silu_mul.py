"""silu_mul against the formula of Transformers."""

from __future__ import annotations

import pytest

from bench.cases import CPU, Case, cases


@pytest.mark.parametrize("case", cases("silu_mul", CPU), ids=str)
def bench_silu_mul(compare, case: Case) -> None:
    compare(case)
