"""qk_norm_rotary against the formulas of Transformers, and against rms_norm (twice) and rotary."""

from __future__ import annotations

import pytest

from bench.problems.shared.cases import Case, benchmarked


@pytest.mark.parametrize("case", benchmarked("qk_norm_rotary"), ids=str)
def bench_qk_norm_rotary(compare, case: Case) -> None:
    compare(case)
