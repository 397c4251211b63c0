"""oneDNN and cuBLAS as PyTorch calls them: dense products of the dequantised weight, and what they have for int8.

On the CPU, F.linear is oneDNN's best dense product: with the weight transposed it is slower, prepacked it is the same
(M = 1, 4 and 64 of 4096 x 4096 on a Xeon with AMX).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers.providers import Provider
from bench.problems import GEMMS, Axes, Int4Gemm, Int8Gemm, Int8WeightOnlyGemm, Result, dequantize

DENSE = "weights rounded to 16 bits"
UNSIGNED_ZERO = 128


def dense(p: Int4Gemm | Int8WeightOnlyGemm | Int8Gemm) -> Callable[[], Result]:
    """Of the weight as the model had it, in the dtype of the activations."""
    if isinstance(p, Int8Gemm):
        # The product of the scales and the codes, which quantising took apart.
        x = (p.q.float() * p.scale[:, None]).to(p.out_dtype)
        return functools.partial(F.linear, x, (p.codes.float() * p.w_scale[:, None]).to(p.out_dtype))
    return functools.partial(F.linear, p.x, dequantize(p, dtype=torch.float32).to(p.x.dtype))


def scaled_int_mm(q: Tensor, scale: Tensor, codes: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What a W8A8 linear is without a kernel of its own."""
    return (torch._int_mm(q, codes.T) * w_scale * scale[:, None]).to(dtype)


def int_mm(p: Int8Gemm) -> Callable[[], Result]:
    return functools.partial(scaled_int_mm, p.q, p.scale, p.codes.clone(), p.w_scale, p.out_dtype)


def int_mm_limits(device: str, axes: Axes) -> str | None:
    return "torch._int_mm needs M > 16 on CUDA" if device == "cuda" and int(axes["M"]) <= 16 else None


def qlinear(p: Int8Gemm) -> Callable[[], Result]:
    """With unsigned activations, 128 above the signed code: signed ones end in oneDNN's reference kernel."""
    unsigned = (p.q.int() + UNSIGNED_ZERO).to(torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(p.codes.clone(), None)
    zeros = torch.zeros(len(p.w_scale), dtype=torch.int32)

    def call() -> Tensor:
        y = torch.ops.onednn.qlinear_pointwise(
            unsigned, 1.0, UNSIGNED_ZERO, packed, p.w_scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return (y * p.scale[:, None]).to(p.out_dtype)

    return call


PROVIDERS = [
    *(
        Provider(f"{library} F.linear", op, (device,), dense, DENSE, weight_bits=16)
        for op in GEMMS
        for device, library in (("cpu", "onednn"), ("cuda", "cublas"))
    ),
    Provider("onednn _int_mm", "int8_gemm", ("cpu",), int_mm, "exact sums"),
    Provider("cublas _int_mm", "int8_gemm", ("cuda",), int_mm, "exact sums", unsupported=int_mm_limits),
    Provider("onednn qlinear", "int8_gemm", ("cpu",), qlinear, "exact sums"),
]
