"""int4_dequantize against eager PyTorch on the same codes, and against a copy of the dense weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import qops
from bench.harness import OURS, Comparison, Provider
from qops.testing import generator

DTYPE = torch.bfloat16
GROUP = 128
SHAPES = ((4096, 4096), (28672, 4096))


def eager(qweight: Tensor, scales: Tensor) -> Tensor:
    codes = torch.stack((qweight & 15, qweight >> 4), dim=-1).view(*scales.shape, GROUP).to(DTYPE)
    return ((codes - 8) * scales.unsqueeze(-1)).flatten(1)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def bench_int4_dequantize(compare: Comparison, n: int, k: int) -> None:
    dense = torch.randn(n, k, generator=generator(n))
    weight = qops.Int4Weight.quantize(dense, group_size=GROUP, scale_dtype=DTYPE)
    qweight, scales = (weight.canonical()[name] for name in ("qweight", "scales"))
    dense = weight.dequantize(DTYPE)
    bytes_moved = qweight.nbytes + scales.nbytes + dense.nbytes
    copies = range(compare.copies(bytes_moved))
    providers = [
        Provider(OURS, qops.int4_dequantize, [(copy.deepcopy(weight), DTYPE) for _ in copies]),
        Provider("torch eager", eager, [(qweight.clone(), scales) for _ in copies]),
        Provider("torch copy", torch.clone, [(dense.clone(),) for _ in copies]),
    ]
    axes: dict[str, int | str] = {"N": n, "K": k, "G": GROUP, "dtype": "bfloat16", "cache": "cold"}
    reference = weight.dequantize(torch.float64)
    compare("int4_dequantize", axes, providers, reference, bytes_moved=bytes_moved, flops=2 * n * k)
