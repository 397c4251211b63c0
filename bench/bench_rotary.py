"""rotary against the formula of Transformers."""

from __future__ import annotations

import pytest

from bench.cases import CPU, Case, cases


@pytest.mark.parametrize("case", cases("rotary", CPU), ids=str)
def bench_rotary(compare, case: Case) -> None:
    compare(case)
