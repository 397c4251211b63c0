"""int8_gemm against what PyTorch has for 8-bit activations and weights, and against dense bfloat16."""

from __future__ import annotations

import pytest

from bench.problems.shared.cases import Case, benchmarked


@pytest.mark.parametrize("case", benchmarked("int8_gemm"), ids=str)
def bench_int8_gemm(compare, case: Case) -> None:
    compare(case)
