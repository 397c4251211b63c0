"""int8_gemm against what PyTorch has for 8-bit activations and weights, and against dense bfloat16.

Peers: torch._int_mm with the scales in eager PyTorch, which is what a W8A8 linear is without a kernel of its own;
oneDNN's 8-bit linear, whose activations are unsigned and whose scale per token is eager; F.linear in bfloat16 with the
dequantised weight. Quantising the activations is timed for none of them. All rotate through copies of their weight.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import qops
from bench.harness import OURS, Comparison, Provider
from qops.ops.int8_gemm import int8_gemm_ref
from qops.testing import generator

ROWS = (1, 4, 16, 64, 256)
# A square layer of a 7-billion-parameter model; the down, up and output projections of one of 135 million.
SHAPES = ((4096, 4096), (576, 1536), (1536, 576), (49152, 576))


@functools.lru_cache(maxsize=1)
def quantized(n: int, k: int) -> qops.Int8Weight:
    weight = torch.randn(n, k, generator=generator(n + k))
    return qops.Int8Weight.quantize(weight, scale_dtype=torch.float32)


def int_mm(q: Tensor, scale: Tensor, codes: Tensor, w_scale: Tensor) -> Tensor:
    return (torch._int_mm(q, codes.T) * w_scale * scale[:, None]).bfloat16()


def qlinear(q: Tensor, scale: Tensor, prepacked: Tensor, w_scale: Tensor, zeros: Tensor) -> Tensor:
    """``q`` unsigned, 128 above the signed code."""
    y = torch.ops.onednn.qlinear_pointwise(
        q, 1.0, 128, prepacked, w_scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return (y * scale[:, None]).bfloat16()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def bench_int8_gemm(compare: Comparison, n: int, k: int, rows: int) -> None:
    weight = quantized(n, k)
    rng = generator(0)
    q = torch.randint(-127, 128, (rows, k), generator=rng, dtype=torch.int8)
    scale = torch.rand(rows, generator=rng) * 0.05
    canonical = weight.canonical()
    codes, w_scale = canonical["qweight"], canonical["scales"].view(-1)
    x, dense = (q * scale[:, None]).bfloat16(), weight.dequantize(torch.bfloat16)
    unsigned, zeros = (q.int() + 128).to(torch.uint8), torch.zeros(n, dtype=torch.int32)
    copies, dense_copies = range(compare.copies(codes.nbytes)), range(compare.copies(dense.nbytes))

    def prepacked() -> Tensor:
        return torch.ops.onednn.qlinear_prepack(codes.clone(), None)

    providers = [
        Provider(OURS, qops.int8_gemm, [(q, scale, copy.deepcopy(weight)) for _ in copies]),
        Provider("onednn _int_mm", int_mm, [(q, scale, codes.clone(), w_scale) for _ in copies]),
        Provider("onednn qlinear", qlinear, [(unsigned, scale, prepacked(), w_scale, zeros) for _ in copies]),
        Provider("onednn F.linear", F.linear, [(x, dense.clone()) for _ in dense_copies]),
    ]
    axes: dict[str, int | str] = {"M": rows, "N": n, "K": k, "dtype": "int8", "out": "bfloat16", "cache": "cold"}
    y_bytes = rows * n * x.element_size()
    compare(
        "int8_gemm",
        axes,
        providers,
        int8_gemm_ref(q, scale, weight),
        bytes_moved=sum(buffer.nbytes for buffer in weight.buffers()) + q.nbytes + scale.nbytes + y_bytes,
        flops=2 * rows * n * k,
    )
