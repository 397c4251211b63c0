"""qops, and what its fused operators replace: its own operators one by one."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

import qops
from bench.models import EPS, Int8Layer
from bench.problems import (
    QUANTIZERS,
    Int4Gemm,
    Int8Gemm,
    Int8WeightOnlyGemm,
    Norm,
    Quantize,
    Result,
    Rotary,
    SiluMul,
)
from bench.providers import OURS, Provider

ONE_BY_ONE = "qops unfused"
EXACT = "exact weights, fp32 sums"


def int4_gemm(p: Int4Gemm) -> Callable[[], Result]:
    weight = qops.Int4Weight.from_canonical(p.qweight, p.scales, kind=p.kind, zeros=p.zeros)
    return functools.partial(qops.int4_gemm, p.x, weight)


def int4_dequantize(p: Int4Gemm) -> Callable[[], Result]:
    weight = qops.Int4Weight.from_canonical(p.qweight, p.scales, kind=p.kind, zeros=p.zeros)
    return functools.partial(qops.int4_dequantize, weight, p.x.dtype)


def int8_weight_only_gemm(p: Int8WeightOnlyGemm) -> Callable[[], Result]:
    return functools.partial(qops.int8_weight_only_gemm, p.x, qops.Int8Weight.from_canonical(p.codes, p.scales))


def int8_gemm(p: Int8Gemm) -> Callable[[], Result]:
    weight = qops.Int8Weight.from_canonical(p.codes, p.w_scale[:, None])
    return functools.partial(qops.int8_gemm, p.q, p.scale, weight, out_dtype=p.out_dtype)


def rms_norm(p: Norm) -> Callable[[], Result]:
    return functools.partial(qops.rms_norm, p.x, p.weight, p.eps)


def add_rms_norm(p: Norm) -> Callable[[], Result]:
    return functools.partial(qops.add_rms_norm, p.x, p.residual, p.weight, p.eps)


def rms_norm_int8(p: Norm) -> Callable[[], Result]:
    return functools.partial(qops.rms_norm_int8, p.x, p.weight, p.eps)


def add_rms_norm_int8(p: Norm) -> Callable[[], Result]:
    return functools.partial(qops.add_rms_norm_int8, p.x, p.residual, p.weight, p.eps)


def quantize(p: Quantize) -> Callable[[], Result]:
    if p.rule == "asym":
        return functools.partial(qops.quantize_int8_asym, p.x)
    if p.rule == "static":
        return functools.partial(qops.quantize_int8_static, p.x, p.scale, p.zero_point)
    return functools.partial(qops.quantize_int8, p.x, p.rule)


def rotary(p: Rotary) -> Callable[[], Result]:
    return functools.partial(qops.rotary, p.q, p.k, p.cos, p.sin)


def qk_norm_rotary(p: Rotary) -> Callable[[], Result]:
    return functools.partial(qops.qk_norm_rotary, p.q, p.k, p.q_weight, p.k_weight, p.cos, p.sin, p.eps)


def silu_mul(p: SiluMul) -> Callable[[], Result]:
    return functools.partial(qops.silu_mul, p.gate_up)


def silu_mul_int8(p: SiluMul) -> Callable[[], Result]:
    return functools.partial(qops.silu_mul_int8, p.gate_up)


def int8_layer(p: Int8Layer) -> Callable[[], Result]:
    """The operators of a fused layer of ``qops.quantize_model(model, "int8")``."""
    packed = {name: qops.Int8Weight.from_canonical(codes, s[:, None]) for name, (codes, s) in p.weights().items()}
    packed["gate_up"].mix_gate_up()
    linear = functools.partial(qops.int8_gemm, out_dtype=p.x.dtype)

    def call() -> tuple[Tensor, ...]:
        rows, scale, z = qops.add_rms_norm_int8(p.x, p.residual, p.first_norm, EPS)
        qkv = linear(rows, scale, packed["qkv"]).view(p.rows, sum(p.heads), -1)
        q, k, v = qkv.split(p.heads, dim=1)
        qops.rotary_(q, k, p.cos, p.sin)
        z = linear(*qops.quantize_int8(p.attention), packed["o"], residual=z)
        hidden = linear(*qops.rms_norm_int8(z, p.second_norm, EPS), packed["gate_up"], silu_mul=True)
        return q, k, v, z, linear(*qops.quantize_int8(hidden), packed["down"])

    return call


def norm_then_quantize(p: Norm) -> Callable[[], Result]:
    return lambda: qops.quantize_int8(qops.rms_norm(p.x, p.weight, p.eps))


def add_norm_then_quantize(p: Norm) -> Callable[[], Result]:
    def call() -> tuple[Tensor, ...]:
        y, z = qops.add_rms_norm(p.x, p.residual, p.weight, p.eps)
        return *qops.quantize_int8(y), z

    return call


def norms_then_rotary(p: Rotary) -> Callable[[], Result]:
    def call() -> tuple[Tensor, Tensor]:
        q, k = qops.rms_norm(p.q, p.q_weight, p.eps), qops.rms_norm(p.k, p.k_weight, p.eps)
        return qops.rotary(q, k, p.cos, p.sin)

    return call


def silu_then_quantize(p: SiluMul) -> Callable[[], Result]:
    return lambda: qops.quantize_int8(qops.silu_mul(p.gate_up))


def _provider(name: str, op: str, build: Callable[..., Callable[[], Result]], accuracy: str) -> Provider:
    return Provider(name, op, ("cpu", "cuda"), build, accuracy)


PROVIDERS = [
    _provider(OURS, "int4_gemm", int4_gemm, EXACT),
    _provider(OURS, "int4_dequantize", int4_dequantize, "rounded once"),
    Provider(
        OURS,
        "int8_weight_only_gemm",
        ("cpu", "cuda"),
        int8_weight_only_gemm,
        EXACT,
        unsupported=lambda device, axes: "it has no CUDA kernel" if device == "cuda" else None,
    ),
    _provider(OURS, "int8_gemm", int8_gemm, "exact sums"),
    *(
        _provider(OURS, build.__name__, build, "rounded as Transformers")
        for build in (
            *(rms_norm, add_rms_norm, rms_norm_int8, add_rms_norm_int8, qk_norm_rotary, silu_mul, silu_mul_int8),
            int8_layer,
        )
    ),
    *(_provider(OURS, op, quantize, "bits of the rule") for op in QUANTIZERS),
    _provider(OURS, "rotary", rotary, "rounded once"),
    _provider(ONE_BY_ONE, "rms_norm_int8", norm_then_quantize, "rounded as Transformers"),
    _provider(ONE_BY_ONE, "add_rms_norm_int8", add_norm_then_quantize, "rounded as Transformers"),
    _provider(ONE_BY_ONE, "qk_norm_rotary", norms_then_rotary, "rounded as Transformers"),
    _provider(ONE_BY_ONE, "silu_mul_int8", silu_then_quantize, "rounded as Transformers"),
]
