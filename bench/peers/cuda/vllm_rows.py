"""vLLM's operators on rows, from a shared object of its wheel: norms, quantisers, rotary embedding, SiLU.

It writes to tensors that the caller gives; they are allocated once here, as in its CUDA graphs. What it does in place
has the problem's inputs in the first call alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.peers import libraries
from bench.peers.cuda.vllm_gemm import REQUIRES, STABLE_LIBRARY
from bench.problems import Axes, Result
from bench.problems.quantize_int8 import Quantize
from bench.problems.rms_norm import Norm
from bench.problems.rotary import Rotary
from bench.problems.shared.provider import Provider
from bench.problems.silu_mul import SiluMul


def ops() -> Any:
    libraries.load(STABLE_LIBRARY)
    return torch.ops._C


def new_int8_rows(x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    q = torch.empty(x.shape[0], columns, dtype=torch.int8, device=x.device)
    return q, torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)


def cos_sin_cache(p: Rotary, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Positions, and the cosines and sines of a position beside each other."""
    positions = torch.arange(p.q.shape[0], device=p.q.device)
    return positions, torch.cat((p.cos, p.sin), dim=-1).to(dtype)


def one_qkv(p: Rotary) -> tuple[Tensor, Tensor, Tensor]:
    """A fresh tensor [T, (Hq + 2 Hk) D], and its q and k [T, heads, D]."""
    qkv = torch.cat((p.q, p.k, p.k), dim=1)
    q, k, _ = qkv.split((p.q.shape[1], p.k.shape[1], p.k.shape[1]), dim=1)
    return qkv.flatten(1), q, k


def rms_norm(p: Norm) -> Callable[[], Result]:
    op, y = ops().rms_norm, torch.empty_like(p.x)

    def call() -> Tensor:
        op(y, p.x, p.weight, p.eps)
        return y

    return call


def add_rms_norm(p: Norm) -> Callable[[], Result]:
    assert p.residual is not None
    op, x, residual = ops().fused_add_rms_norm, p.x.clone(), p.residual.clone()

    def call() -> tuple[Tensor, Tensor]:
        op(x, residual, p.weight, p.eps)
        return x, residual

    return call


def norm_int8(p: Norm) -> Callable[[], Result]:
    """Fused, with the residual in place where there is one."""
    op = ops().rms_norm_dynamic_per_token_quant
    residual = None if p.residual is None else p.residual.clone()
    q, scale = new_int8_rows(p.x, p.x.shape[1])

    def call() -> tuple[Tensor, ...]:
        op(q, p.x, p.weight, scale, p.eps, None, residual)
        return (q, scale[:, 0]) if residual is None else (q, scale[:, 0], residual)

    return call


def norm_then_quantize(p: Norm) -> Callable[[], Result]:
    """What its int8 models do: two kernels."""
    norm = rms_norm(p) if p.residual is None else add_rms_norm(p)
    op = ops().dynamic_scaled_int8_quant
    q, scale = new_int8_rows(p.x, p.x.shape[1])

    def call() -> tuple[Tensor, ...]:
        results = norm()
        y, *residual = results if isinstance(results, tuple) else (results,)
        op(q, y, scale, None)
        return q, scale[:, 0], *residual

    return call


def quantize_int8(p: Quantize) -> Callable[[], Result]:
    op = ops().dynamic_scaled_int8_quant
    q, scale = new_int8_rows(p.x, p.x.shape[1])
    zero_point = torch.empty(p.x.shape[0], 1, dtype=torch.int32, device=p.x.device) if p.rule == "asym" else None

    def call() -> tuple[Tensor, ...]:
        op(q, p.x, scale, zero_point)
        return (q, scale[:, 0]) if zero_point is None else (q, scale[:, 0], zero_point[:, 0])

    return call


def quantize_int8_static(p: Quantize) -> Callable[[], Result]:
    assert p.scale is not None
    op, q = ops().static_scaled_int8_quant, torch.empty_like(p.x, dtype=torch.int8)
    scale, zero_point = p.scale.view(1), None if p.zero_point is None else p.zero_point.view(1)

    def call() -> Tensor:
        op(q, p.x, scale, zero_point)
        return q

    return call


def rotary_by(op: Callable[..., Any], p: Rotary) -> Callable[[], Result]:
    """Of vLLM's operator, whose form others have taken over."""
    head = p.q.shape[2]
    positions, cache = cos_sin_cache(p, p.q.dtype)
    _, q, k = one_qkv(p)

    def call() -> tuple[Tensor, Tensor]:
        op(positions, q.flatten(1), k.flatten(1), head, cache, True)
        return q, k

    return call


def rotary(p: Rotary) -> Callable[[], Result]:
    return rotary_by(ops().rotary_embedding, p)


def qk_norm_rotary(p: Rotary) -> Callable[[], Result]:
    op = ops().fused_qk_norm_rope
    positions, cache = cos_sin_cache(p, p.q.dtype)
    qkv, q, k = one_qkv(p)
    (q_heads, head), k_heads = q.shape[1:], k.shape[1]

    def call() -> tuple[Tensor, Tensor]:
        op(qkv, q_heads, k_heads, k_heads, head, p.eps, p.q_weight, p.k_weight, cache, True, positions)
        return q, k

    return call


def silu_mul_by(op: Callable[..., Any], p: SiluMul) -> Callable[[], Result]:
    """Of vLLM's operator, likewise."""
    y = torch.empty(p.gate_up.shape[0], p.gate_up.shape[1] // 2, dtype=p.gate_up.dtype, device=p.gate_up.device)

    def call() -> Tensor:
        op(y, p.gate_up)
        return y

    return call


def silu_mul(p: SiluMul) -> Callable[[], Result]:
    return silu_mul_by(ops().silu_and_mul, p)


def silu_then_quantize(p: SiluMul) -> Callable[[], Result]:
    silu, op = silu_mul(p), ops().dynamic_scaled_int8_quant
    q, scale = new_int8_rows(p.gate_up, p.gate_up.shape[1] // 2)

    def call() -> tuple[Tensor, ...]:
        op(q, silu(), scale, None)
        return q, scale[:, 0]

    return call


def _rule_unsupported(device: str, axes: Axes) -> str | None:
    return None if axes["rule"] in ("127", "asym", "static") else "rule 127 only"


def _head_unsupported(device: str, axes: Axes) -> str | None:
    return None if axes["D"] in (64, 128, 256) else "D = 64, 128, 256 only"


def _provider(name: str, op: str, build: Callable[..., Callable[[], Result]], accuracy: str, **kwargs: Any) -> Provider:
    return Provider(name, op, ("cuda",), build, accuracy, REQUIRES, **kwargs)


PROVIDERS = [
    _provider("vllm", "rms_norm", rms_norm, "rounded as Transformers"),
    _provider("vllm", "add_rms_norm", add_rms_norm, "rounded as Transformers, in place"),
    _provider("vllm fused", "rms_norm_int8", norm_int8, "norm rounded as Transformers"),
    _provider("vllm fused", "add_rms_norm_int8", norm_int8, "fp32 sum of x and residual, in place"),
    _provider("vllm", "rms_norm_int8", norm_then_quantize, "rounded as Transformers"),
    _provider("vllm", "add_rms_norm_int8", norm_then_quantize, "rounded as Transformers, in place"),
    _provider("vllm", "quantize_int8", quantize_int8, "bits of rule 127", unsupported=_rule_unsupported),
    _provider("vllm", "quantize_int8_asym", quantize_int8, "range without 0 where a row has one sign"),
    _provider("vllm", "quantize_int8_static", quantize_int8_static, "bits of the rule but for ties"),
    _provider("vllm", "rotary", rotary, "cosines in x's dtype, rounded once, in place"),
    _provider("vllm", "qk_norm_rotary", qk_norm_rotary, "fp32 inside, in place", unsupported=_head_unsupported),
    _provider("vllm", "silu_mul", silu_mul, "rounded as Transformers"),
    _provider("vllm", "silu_mul_int8", silu_then_quantize, "rounded as Transformers"),
]
