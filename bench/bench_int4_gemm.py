"""int4_gemm against dense bfloat16, for the weights that decoding reads."""

from __future__ import annotations

import functools

import pytest
import torch

import qops
from bench.harness import Comparison
from bench.weight_only import ROWS, SHAPES, compare_with_dense
from qops.testing import generator


@functools.lru_cache(maxsize=1)
def quantized(n: int, k: int) -> qops.Int4Weight:
    """The large layer symmetric in groups of 128, the others as a Q4_1 GGUF stores them: groups of 32 with offsets."""
    rng = generator(n + k)
    if k >= 4096:
        return qops.Int4Weight.quantize(torch.randn(n, k, generator=rng), group_size=128, scale_dtype=torch.float16)
    qweight = torch.randint(0, 256, (n, k // 2), generator=rng, dtype=torch.uint8)
    scales = (0.5 + torch.rand(n, k // 32, generator=rng)).half()
    offsets = (-8 * scales.float() * (0.9 + 0.2 * torch.rand(n, k // 32, generator=rng))).half().float()
    return qops.Int4Weight.from_canonical(qweight, scales, kind="offset", zeros=offsets)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def bench_int4_gemm(compare: Comparison, n: int, k: int, rows: int) -> None:
    compare_with_dense(compare, "int4_gemm", qops.int4_gemm, quantized(n, k), rows)
