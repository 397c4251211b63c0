"""int8_weight_only_gemm against dense bfloat16, for the weights that decoding reads."""

from __future__ import annotations

import pytest

from bench.cases import CPU, Case, cases


@pytest.mark.parametrize("case", cases("int8_weight_only_gemm", CPU), ids=str)
def bench_int8_weight_only_gemm(compare, case: Case) -> None:
    compare(case)
