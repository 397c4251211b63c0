"""quantize_int8 and its asymmetric and static forms against the same formula in eager PyTorch."""

from __future__ import annotations

import pytest

from bench.cases import CPU, Case, cases


@pytest.mark.parametrize("case", cases("quantize_int8", CPU), ids=str)
def bench_quantize_int8(compare, case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("case", cases("quantize_int8_asym", CPU), ids=str)
def bench_quantize_int8_asym(compare, case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("case", cases("quantize_int8_static", CPU), ids=str)
def bench_quantize_int8_static(compare, case: Case) -> None:
    compare(case)
