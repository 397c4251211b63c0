"""A W8A8 decoder layer and decoding with 4-bit weights, each against the same weights dense."""

from __future__ import annotations

import pytest

from bench.cases import CPU, Case, cases


@pytest.mark.parametrize("case", cases("int8_layer", CPU), ids=str)
def bench_int8_layer(compare, case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("case", cases("int4_decode", CPU), ids=str)
def bench_int4_decode(compare, case: Case) -> None:
    compare(case)
