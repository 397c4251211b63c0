"""quantize_int8 and its asymmetric and static forms against the same formula in eager PyTorch."""

from __future__ import annotations

import pytest

from bench.problems.shared.cases import Case, benchmarked


@pytest.mark.parametrize("case", benchmarked("quantize_int8"), ids=str)
def bench_quantize_int8(compare, case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("case", benchmarked("quantize_int8_asym"), ids=str)
def bench_quantize_int8_asym(compare, case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("case", benchmarked("quantize_int8_static"), ids=str)
def bench_quantize_int8_static(compare, case: Case) -> None:
    compare(case)
