"""SGLang's kernels (sglang-kernel), from the shared object of its wheel for sm_90.

Its fused norm and rotary embedding computes the cosines itself from a base and a scaling, which is another operator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.peers import libraries
from bench.peers.cuda.vllm_rows import rotary_by, silu_mul_by
from bench.peers.layouts import multiples
from bench.problems import Axes, Result
from bench.problems.int8_gemm import Int8Gemm
from bench.problems.rms_norm import Norm
from bench.problems.rotary import Rotary
from bench.problems.shared.provider import Provider
from bench.problems.silu_mul import SiluMul

REQUIRES = ("sglang-kernel",)
LIBRARY = "sgl_kernel/sm90/common_ops.abi3.so"
NEEDS = ("libnuma.so.1",)
PDL = True  # as its own wrappers choose on Hopper


def ops() -> Any:
    libraries.load(LIBRARY, NEEDS)
    return torch.ops.sgl_kernel


def int8_gemm(p: Int8Gemm) -> Callable[[], Result]:
    columns = p.codes.clone().T
    return functools.partial(ops().int8_scaled_mm, p.q, columns, p.scale, p.w_scale.clone(), p.out_dtype, None)


def rms_norm(p: Norm) -> Callable[[], Result]:
    op, y = ops().rmsnorm, torch.empty_like(p.x)

    def call() -> Tensor:
        op(y, p.x, p.weight, p.eps, PDL)
        return y

    return call


def add_rms_norm(p: Norm) -> Callable[[], Result]:
    assert p.residual is not None
    op, x, residual = ops().fused_add_rmsnorm, p.x.clone(), p.residual.clone()

    def call() -> tuple[Tensor, Tensor]:
        op(x, residual, p.weight, p.eps, PDL)
        return x, residual

    return call


def rotary(p: Rotary) -> Callable[[], Result]:
    return rotary_by(ops().rotary_embedding, p)


def silu_mul(p: SiluMul) -> Callable[[], Result]:
    return silu_mul_by(ops().silu_and_mul, p)


def _gemm_unsupported(device: str, axes: Axes) -> str | None:
    return multiples(8, 16)(int(axes["N"]), int(axes["K"]))


PROVIDERS = [
    Provider("sglang", "int8_gemm", ("cuda",), int8_gemm, "exact sums", REQUIRES, unsupported=_gemm_unsupported),
    Provider("sglang", "rms_norm", ("cuda",), rms_norm, "rounded once", REQUIRES),
    Provider("sglang", "add_rms_norm", ("cuda",), add_rms_norm, "fp32 sum of x and residual, in place", REQUIRES),
    Provider("sglang", "rotary", ("cuda",), rotary, "cosines in x's dtype, rounded once, in place", REQUIRES),
    Provider("sglang", "silu_mul", ("cuda",), silu_mul, "rounded once", REQUIRES),
]
