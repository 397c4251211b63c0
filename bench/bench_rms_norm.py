"""rms_norm and add_rms_norm against eager PyTorch."""

from __future__ import annotations

import pytest

from bench.cases import CPU, Case, cases


@pytest.mark.parametrize("case", cases("rms_norm", CPU), ids=str)
def bench_rms_norm(compare, case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("case", cases("add_rms_norm", CPU), ids=str)
def bench_add_rms_norm(compare, case: Case) -> None:
    compare(case)
