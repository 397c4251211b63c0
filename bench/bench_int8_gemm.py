"""int8_gemm against what PyTorch has for 8-bit activations and weights, and against dense bfloat16."""

from __future__ import annotations

import pytest

from bench.cases import CPU, Case, cases


@pytest.mark.parametrize("case", cases("int8_gemm", CPU), ids=str)
def bench_int8_gemm(compare, case: Case) -> None:
    compare(case)
