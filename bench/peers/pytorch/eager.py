"""Eager PyTorch: its own operators, and the formulas of the libraries that models and quantised checkpoints come from.

``FORMULAS`` are functions of tensors, which ``compiled.py`` compiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import problems
from bench.peers.providers import Provider
from bench.problems import Int4Gemm, Norm, Problem, Quantize, Result, Rotary, SiluMul
from bench.problems.models import EPS, Int8Layer

TRANSFORMERS = "rounded as Transformers"
# Where the formula is the contract itself, up to what float32 rounds in another order.
RULE = "formula of the rule"


def transformers_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """LlamaRMSNorm."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def functional_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def per_token_127(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float()
    a = wide.abs().amax(-1, keepdim=True)
    return (wide * (127 / a)).round().to(torch.int8), (a / 127).squeeze(-1)


def per_token_compressed_tensors(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / scale).clamp(-128, 127).round().to(torch.int8), scale.float().squeeze(-1)


def per_token_torchao(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = (x.abs().amax(-1, keepdim=True) / 127.5).float()
    return (x * (1 / scale)).round().clamp(-128, 127).to(torch.int8), scale.squeeze(-1)


def per_token_asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.float()
    low, high = wide.aminmax(dim=-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / 255
    zero_point = -128 - (low / scale).round()
    q = ((wide * (1 / scale)).round() + zero_point).clamp(-128, 127).to(torch.int8)
    return q, scale.squeeze(-1), zero_point.squeeze(-1).to(torch.int32)


def static(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return ((x * (1 / scale)).round() + zero_point).clamp(-128, 127).to(torch.int8)


PER_TOKEN = {
    "127": per_token_127,
    "compressed-tensors": per_token_compressed_tensors,
    "torchao": per_token_torchao,
    "asym": per_token_asymmetric,
}


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def transformers_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """apply_rotary_pos_emb: q and k [T, heads, D] as views [heads, T, D], the layout it expects; cos, sin [T, D]."""
    q, k = q.transpose(0, 1), k.transpose(0, 1)
    q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
    return q.transpose(0, 1), k.transpose(0, 1)


def transformers_qk(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Qwen3Attention."""
    return transformers_rotary(transformers_norm(q, q_weight, eps), transformers_norm(k, k_weight, eps), cos, sin)


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def silu_mul_int8(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return per_token_127(silu_mul(gate_up))


def dense_layer(
    x: Tensor,
    residual: Tensor,
    attention: Tensor,
    norms: tuple[Tensor, Tensor],
    weights: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
    heads: tuple[int, int, int],
) -> tuple[Tensor, ...]:
    """A layer with dense weights, q, k and v and gate and up each in one product; cos and sin as for rotary."""
    qkv_weight, o_weight, gate_up_weight, down_weight = weights
    z = x + residual
    qkv = F.linear(transformers_norm(z, norms[0], EPS), qkv_weight)
    q, k, v = qkv.view(len(qkv), sum(heads), -1).split(heads, dim=1)
    q, k = transformers_rotary(q, k, cos, sin)
    z = z + F.linear(attention, o_weight)
    gate_up = F.linear(transformers_norm(z, norms[1], EPS), gate_up_weight)
    return q, k, v, z, F.linear(silu_mul(gate_up), down_weight)


def _layer(p: Int8Layer) -> tuple[Any, ...]:
    weights = tuple((codes.float() * scale[:, None]).to(p.x.dtype) for codes, scale in p.weights().values())
    cos, sin = (torch.cat((table, table), dim=-1) for table in (p.cos, p.sin))
    return p.x, p.residual, p.attention, (p.first_norm, p.second_norm), weights, cos, sin, p.heads


def _with_residual(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        z = x + residual
        return norm(z, weight, eps), z

    return add_norm


def _to_int8(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def norm_int8(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return per_token_127(norm(x, weight, eps))

    return norm_int8


def _with_residual_to_int8(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def add_norm_int8(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        z = x + residual
        return *per_token_127(norm(z, weight, eps)), z

    return add_norm_int8


def _norm(p: Norm) -> tuple[Any, ...]:
    return (p.x, p.weight, p.eps) if p.residual is None else (p.x, p.residual, p.weight, p.eps)


def _rotary(p: Rotary) -> tuple[Any, ...]:
    """With the tables doubled, as Transformers keeps them."""
    cos, sin = torch.cat((p.cos, p.cos), dim=-1), torch.cat((p.sin, p.sin), dim=-1)
    return (p.q, p.k, cos, sin) if p.q_weight is None else (p.q, p.k, p.q_weight, p.k_weight, cos, sin, p.eps)


def _quantize(p: Quantize) -> tuple[Any, ...]:
    return (p.x,) if p.scale is None else (p.x, p.scale, p.zero_point)


def _silu(p: SiluMul) -> tuple[Any, ...]:
    return (p.gate_up,)


@dataclass(frozen=True)
class Formula:
    """``function(problem)`` is a function of tensors, ``arguments(problem)`` are these."""

    name: str
    op: str
    accuracy: str
    arguments: Callable[[Any], tuple[Any, ...]]
    function: Callable[[Any], Callable[..., Result]]

    def build(self, problem: Problem) -> Callable[[], Result]:
        return functools.partial(self.function(problem), *self.arguments(problem))


# No part of FORMULAS: its name is the vendor library's, and its weights have 16 bits.
DENSE_LAYER = Formula("F.linear", "int8_layer", "weights rounded to 16 bits", _layer, lambda p: dense_layer)
LIBRARIES = {"cpu": "onednn", "cuda": "cublas"}


def _norms(name: str, norm: Callable[..., Tensor], accuracy: str) -> list[Formula]:
    forms = {
        "rms_norm": norm,
        "add_rms_norm": _with_residual(norm),
        "rms_norm_int8": _to_int8(norm),
        "add_rms_norm_int8": _with_residual_to_int8(norm),
    }
    return [Formula(name, op, accuracy, _norm, lambda p, form=form: form) for op, form in forms.items()]


def int4_dequantize(p: Int4Gemm) -> Callable[[], Result]:
    return functools.partial(problems.dequantize, p, dtype=p.x.dtype)


FORMULAS = [
    *_norms("transformers formula", transformers_norm, TRANSFORMERS),
    *(
        Formula("torch eager", op, RULE, _quantize, lambda p: PER_TOKEN[p.rule])
        for op in ("quantize_int8", "quantize_int8_asym")
    ),
    Formula("torch eager", "quantize_int8_static", RULE, _quantize, lambda p: static),
    Formula("transformers formula", "rotary", TRANSFORMERS, _rotary, lambda p: transformers_rotary),
    Formula("transformers formula", "qk_norm_rotary", TRANSFORMERS, _rotary, lambda p: transformers_qk),
    Formula("transformers formula", "silu_mul", TRANSFORMERS, _silu, lambda p: silu_mul),
    Formula("transformers formula", "silu_mul_int8", TRANSFORMERS, _silu, lambda p: silu_mul_int8),
]

PROVIDERS = [
    *(
        Provider(
            f"{library} {DENSE_LAYER.name}",
            DENSE_LAYER.op,
            (device,),
            DENSE_LAYER.build,
            DENSE_LAYER.accuracy,
            weight_bits=16,
        )
        for device, library in LIBRARIES.items()
    ),
    Provider("torch eager", "int4_dequantize", ("cpu", "cuda"), int4_dequantize, "in 16 bits"),
    *(
        Provider(formula.name, formula.op, ("cpu", "cuda"), formula.build, formula.accuracy)
        for formula in (*FORMULAS, *_norms("torch F.rms_norm", functional_norm, "rounded once"))
    ),
]
