"""int4_dequantize against eager PyTorch on the same codes."""

from __future__ import annotations

import pytest

from bench.cases import CPU, Case, cases


@pytest.mark.parametrize("case", cases("int4_dequantize", CPU), ids=str)
def bench_int4_dequantize(compare, case: Case) -> None:
    compare(case)
