"""Liger: Triton kernels made for training; what their backward pass needs is stored, too."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.problems import Result
from bench.problems.rms_norm import Norm
from bench.problems.rotary import Rotary
from bench.problems.shared.provider import Provider
from bench.problems.silu_mul import SiluMul

CASTING = "llama"


def rms_norm(p: Norm) -> Callable[[], Result]:
    from liger_kernel.ops.rms_norm import rms_norm_forward

    def call() -> Tensor:
        return rms_norm_forward(p.x, p.weight, p.eps, 0.0, CASTING, None)[0]

    return call


def add_rms_norm(p: Norm) -> Callable[[], Result]:
    from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward

    def call() -> tuple[Tensor, Tensor]:
        y, z, *_ = fused_add_rms_norm_forward(p.x, p.residual, p.weight, p.eps, 0.0, CASTING)
        return y, z

    return call


def rotary(p: Rotary) -> Callable[[], Result]:
    """In place on contiguous q and k, which it would copy otherwise: only the first call has the problem's inputs."""
    from liger_kernel.ops.rope import rope_forward

    # [1, heads, T, D] as views of [1, T, heads, D], as in Transformers; cosines in both halves of a head.
    q, k = (x.clone()[None].transpose(1, 2) for x in (p.q, p.k))
    cos, sin = (torch.cat((x, x), dim=-1)[None] for x in (p.cos, p.sin))

    def call() -> tuple[Tensor, Tensor]:
        q_, k_, *_ = rope_forward(q, k, cos, sin)
        return q_[0].transpose(0, 1), k_[0].transpose(0, 1)

    return call


def silu_mul(p: SiluMul) -> Callable[[], Result]:
    from liger_kernel.ops.swiglu import swiglu_fused_gate_up_forward

    def call() -> Tensor:
        return swiglu_fused_gate_up_forward(p.gate_up)[1]

    return call


PROVIDERS = [
    Provider("liger", op, ("cuda",), build, accuracy, ("liger-kernel",))
    for op, build, accuracy in (
        ("rms_norm", rms_norm, "rounded as Transformers"),
        ("add_rms_norm", add_rms_norm, "rounded as Transformers"),
        ("rotary", rotary, "x's dtype inside, in place"),
        ("silu_mul", silu_mul, "rounded twice"),
    )
]
