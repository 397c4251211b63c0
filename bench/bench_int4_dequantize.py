"""int4_dequantize against eager PyTorch on the same codes."""

from __future__ import annotations

import pytest

from bench.problems.shared.cases import Case, benchmarked


@pytest.mark.parametrize("case", benchmarked("int4_dequantize"), ids=str)
def bench_int4_dequantize(compare, case: Case) -> None:
    compare(case)
