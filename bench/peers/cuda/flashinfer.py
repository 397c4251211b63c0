"""FlashInfer: norms (CuTe DSL, or CUDA where that is not installed), rotary embedding and SiLU (CUDA).

It compiles with nvcc at the first call of an operator. Norms and rotary embedding are in place, as in its engines:
only the first call has the problem's inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bench.peers.cuda.vllm_rows import cos_sin_cache, one_qkv
from bench.problems import Axes, Result
from bench.problems.rms_norm import Norm
from bench.problems.rotary import Rotary
from bench.problems.shared.provider import Provider
from bench.problems.silu_mul import SiluMul


def rms_norm(p: Norm) -> Callable[[], Result]:
    from flashinfer.norm import rmsnorm

    return functools.partial(rmsnorm, p.x, p.weight, eps=p.eps, out=torch.empty_like(p.x))


def add_rms_norm(p: Norm) -> Callable[[], Result]:
    from flashinfer.norm import fused_add_rmsnorm

    assert p.residual is not None
    x, residual = p.x.clone(), p.residual.clone()

    def call() -> tuple[Tensor, Tensor]:
        fused_add_rmsnorm(x, residual, p.weight, eps=p.eps)
        return x, residual

    return call


def rotary(p: Rotary) -> Callable[[], Result]:
    from flashinfer.rope import apply_rope_with_cos_sin_cache_inplace

    positions, cache = cos_sin_cache(p, torch.float32)
    _, q, k = one_qkv(p)
    head = q.shape[2]

    def call() -> tuple[Tensor, Tensor]:
        apply_rope_with_cos_sin_cache_inplace(positions, q.flatten(1), k.flatten(1), head, cache, is_neox=True)
        return q, k

    return call


def silu_mul(p: SiluMul) -> Callable[[], Result]:
    from flashinfer.activation import silu_and_mul

    return functools.partial(silu_and_mul, p.gate_up)


def _head_unsupported(device: str, axes: Axes) -> str | None:
    return None if axes["D"] in (64, 128, 256, 512) else "D = 64, 128, 256, 512 only"


PROVIDERS = [
    Provider("flashinfer", op, ("cuda",), build, accuracy, ("flashinfer-python",))
    for op, build, accuracy in (
        ("rms_norm", rms_norm, "rounded once"),
        ("add_rms_norm", add_rms_norm, "fp32 sum of x and residual, in place"),
        ("silu_mul", silu_mul, "rounded once"),
    )
] + [
    Provider(
        "flashinfer",
        "rotary",
        ("cuda",),
        rotary,
        "fp32 cosines, rounded once, in place",
        ("flashinfer-python",),
        unsupported=_head_unsupported,
    )
]
