"""silu_mul_int8 against the formula of Transformers, and against silu_mul and quantize_int8."""

from __future__ import annotations

import pytest

from bench.problems.shared.cases import Case, benchmarked


@pytest.mark.parametrize("case", benchmarked("silu_mul_int8"), ids=str)
def bench_silu_mul_int8(compare, case: Case) -> None:
    compare(case)
