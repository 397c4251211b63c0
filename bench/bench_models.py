"""A W8A8 decoder layer and decoding with 4-bit weights, each against the same weights dense."""

from __future__ import annotations

import pytest

from bench.problems.shared.cases import Case, benchmarked


@pytest.mark.parametrize("case", benchmarked("int8_layer"), ids=str)
def bench_int8_layer(compare, case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("case", benchmarked("int4_decode"), ids=str)
def bench_int4_decode(compare, case: Case) -> None:
    compare(case)
