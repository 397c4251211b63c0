"""int4_gemm against dense bfloat16, for the weights that decoding reads."""

from __future__ import annotations

import pytest

from bench.problems.shared.cases import Case, benchmarked


@pytest.mark.parametrize("case", benchmarked("int4_gemm"), ids=str)
def bench_int4_gemm(compare, case: Case) -> None:
    compare(case)
