"""What the benchmarks of the two weight-only GEMMs share: the same case against dense bfloat16.

Peers multiply by the dequantised weight in bfloat16: F.linear with the weight as a model stores it, [N, K], and
torch.matmul with its transpose laid out as [K, N]; both end in oneDNN. All three rotate through copies of their weight,
because decoding reads every weight of a model once per token.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import qops
from bench.harness import OURS, Comparison, Provider
from qops.testing import random_activations

ROWS = (1, 4, 16, 64)
# A square layer of a 7-billion-parameter model; the down, up and output projections of one of 135 million.
SHAPES = ((4096, 4096), (576, 1536), (1536, 576), (49152, 576))
Weight = qops.Int4Weight | qops.Int8Weight


@functools.lru_cache(maxsize=1)
def dequantized(weight: Weight) -> Tensor:
    return weight.dequantize(torch.float64)


def compare_with_dense(
    compare: Comparison, op: str, gemm: Callable[[Tensor, Any], Tensor], weight: Weight, rows: int
) -> None:
    """Times ``gemm(x [rows, K], weight)`` against dense products of the same dequantised weight."""
    n, k = weight.out_features, weight.in_features
    x = random_activations(rows, k, dtype=torch.bfloat16, seed=0)
    exact = dequantized(weight)
    dense = exact.bfloat16()
    weight_bytes = sum(buffer.nbytes for buffer in weight.buffers())
    copies = range(compare.copies(weight_bytes))
    dense_copies = range(compare.copies(dense.nbytes))
    providers = [
        Provider(OURS, gemm, [(x, copy.deepcopy(weight)) for _ in copies]),
        Provider("onednn F.linear", F.linear, [(x, dense.clone()) for _ in dense_copies]),
        Provider("onednn matmul", torch.matmul, [(x, dense.T.contiguous()) for _ in dense_copies]),
    ]
    axes: dict[str, int | str] = {"M": rows, "N": n, "K": k, "G": weight.group_size, "dtype": "bfloat16"}
    if isinstance(weight, qops.Int4Weight):
        axes["kind"] = weight.kind
    axes["cache"] = "cold"
    y_bytes = rows * n * x.element_size()
    compare(
        op,
        axes,
        providers,
        x.double() @ exact.T,
        bytes_moved=weight_bytes + x.nbytes + y_bytes,
        flops=2 * rows * n * k,
    )
