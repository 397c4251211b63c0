"""``bench_<operator>`` for each problem, whose cases it runs against what PyTorch offers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.problems import OPS, Case, benchmarked


def benchmark_of(op: str) -> Callable[..., None]:
    @pytest.mark.parametrize("case", benchmarked(op), ids=str)
    def run(compare, case: Case) -> None:
        compare(case)

    run.__name__ = f"bench_{op}"
    return run


globals().update({f"bench_{op}": benchmark_of(op) for op in OPS})
