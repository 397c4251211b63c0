"""int8_weight_only_gemm against dense bfloat16, for the weights that decoding reads."""

from __future__ import annotations

import functools

import pytest
import torch

import qops
from bench.harness import Comparison
from bench.weight_only import ROWS, SHAPES, compare_with_dense
from qops.testing import generator


@functools.lru_cache(maxsize=1)
def quantized(n: int, k: int) -> qops.Int8Weight:
    """Groups of 32, as a Q8_0 GGUF stores them."""
    weight = torch.randn(n, k, generator=generator(n + k))
    return qops.Int8Weight.quantize(weight, group_size=32, scale_dtype=torch.float16)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def bench_int8_weight_only_gemm(compare: Comparison, n: int, k: int, rows: int) -> None:
    compare_with_dense(compare, "int8_weight_only_gemm", qops.int8_weight_only_gemm, quantized(n, k), rows)
