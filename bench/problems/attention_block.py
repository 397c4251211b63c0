"""The halves of a decoder layer at a decoding step, with 4-bit weights, against the same in torch with dense ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import qops
from bench.problems.int4_gemm import Int4Gemm
from bench.problems.shared.cases import MODELS, Case, Selection, chosen
from bench.problems.shared.draws import Random
from bench.problems.shared.operator import EPS, Operator, Traffic, sizes_of
from bench.problems.shared.provider import Axes, Formula, Result, dense
from qops.ops.decode_attention import decode_attention_ref

# One token that follows so many.
CONTEXTS = (64, 1024)


# Codes and scales of a symmetric weight.
Codes = tuple[Tensor, Tensor]


def group_of(k: int) -> int:
    return next(group for group in (128, 64, 16) if k % group == 0)


def drawn(rng: Random, n: int, k: int, dtype: torch.dtype) -> Codes:
    return rng.bytes(n, k // 2), rng.int4_scales(k, n, k // group_of(k)).to(dtype)


def int4(codes: Codes) -> Int4Gemm:
    """The weight; what it is multiplied with stands elsewhere."""
    qweight, scales = codes
    return Int4Gemm(scales[:0], qweight, scales, None, 2 * qweight.shape[1] // scales.shape[1], "symmetric")


def dense_weights(*weights: Codes) -> list[Tensor]:
    return [int4(codes).dequantize(dtype=torch.float32).to(codes[1].dtype) for codes in weights]


def wide(*tensors: Tensor | Codes) -> list[Tensor]:
    """In float64 on the CPU."""
    return [(t.double() if isinstance(t, Tensor) else int4(t).dequantize()).cpu() for t in tensors]


@dataclass(frozen=True)
class MlpBlock:
    """``y = x + down(silu(gate) * up)``, gate and up of the normed x [1, H]."""

    x: Tensor
    norm: Tensor
    gate_up: Codes
    down: Codes

    def arguments(self) -> tuple[Any, ...]:
        return self.x, self.norm, EPS, int4(self.gate_up).packed().mix_gate_up(), int4(self.down).packed()

    def dense(self) -> tuple[Tensor, ...]:
        return self.x, self.norm, *dense_weights(self.gate_up, self.down)


def dense_mlp(x: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(F.rms_norm(x, norm.shape, norm, EPS), gate_up).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, down)


def mlp_by_operators(x: Tensor, norm: Tensor, eps: float, gate_up: qops.Int4Weight, down: qops.Int4Weight) -> Tensor:
    y = qops.int4_gemm(qops.rms_norm(x, norm, eps), gate_up, silu_mul=True)
    return qops.int4_gemm(y, down, residual=x)


@dataclass(frozen=True)
class AttentionBlock:
    """``y = x + o(attention)`` of the normed x [1, 1, H], whose keys and values become the last of the cache."""

    x: Tensor
    norm: Tensor
    qkv: Codes
    o: Codes
    keys: Tensor
    values: Tensor
    cos: Tensor
    sin: Tensor

    def arguments(self) -> tuple[Any, ...]:
        weights = (int4(codes).packed() for codes in (self.qkv, self.o))
        return self.x, self.norm, EPS, *weights, self.keys, self.values, self.cos, self.sin

    def dense(self) -> tuple[Tensor, ...]:
        return self.x, self.norm, *dense_weights(self.qkv, self.o), self.keys, self.values, self.cos, self.sin


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As Transformers: [1, 1, heads, D]."""
    cos, sin = (torch.cat((table, table), -1).to(x.dtype) for table in (cos, sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def dense_attention(
    x: Tensor, norm: Tensor, qkv: Tensor, o: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    kv_heads, d = keys.shape[1], keys.shape[3]
    heads = F.linear(F.rms_norm(x, norm.shape, norm, EPS), qkv).unflatten(-1, (-1, d))
    q, k, v = heads.split((heads.shape[2] - 2 * kv_heads, kv_heads, kv_heads), 2)
    keys[:, :, -1:], values[:, :, -1:] = rotated(k, cos, sin).transpose(1, 2), v.transpose(1, 2)
    packed = rotated(q, cos, sin).reshape(1, kv_heads, -1, d)
    return x + F.linear(F.scaled_dot_product_attention(packed, keys, values).reshape(1, 1, -1), o)


def attention_by_operators(
    x: Tensor,
    norm: Tensor,
    eps: float,
    qkv: qops.Int4Weight,
    o: qops.Int4Weight,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    kv_heads, d = keys.shape[1], keys.shape[3]
    heads = qops.int4_gemm(qops.rms_norm(x, norm, eps), qkv).unflatten(-1, (-1, d))
    q, k, v = heads.split((heads.shape[2] - 2 * kv_heads, kv_heads, kv_heads), 2)
    qops.rotary_(q, k, cos, sin)
    keys[:, :, -1:], values[:, :, -1:] = k.transpose(1, 2), v.transpose(1, 2)
    return qops.int4_gemm(qops.decode_attention(q, keys, values).flatten(2), o, residual=x)


def call_attention(*arguments: Any) -> Tensor:
    *first, cos, sin = arguments
    return qops.attention_block(*first, cos=cos, sin=sin)


class Block(Operator):
    """Of the models that benchmarks know."""

    redrawn = True
    fused = True
    accuracy = "exact weights, rounded as Transformers"

    def shapes_of(self, axes: Axes) -> list[tuple[int, int]]:
        raise NotImplementedError

    def weight_bytes(self, axes: Axes, bits: int | None = None) -> int:
        size, shapes = sizes_of(axes, "dtype")[0], self.shapes_of(axes)
        if bits is not None:
            return sum(n * k * bits // 8 for n, k in shapes)
        return sum(n * k // 2 + n * (k // group_of(k)) * size for n, k in shapes)

    def compiled(self) -> list[Formula]:
        return []

    def unsupported(self, device: str, axes: Axes) -> str | None:
        return "it has no CUDA kernel" if device == "cuda" else None


class MlpBlockOperator(Block):
    axes = "model T H I"
    tiny = {"model": "tiny", "T": 1, "H": 64, "I": 128}  # noqa: RUF012 (never written)

    def cases(self, selection: Selection) -> Iterator[Case]:
        for dtype in selection.dtypes:
            for model, sizes in MODELS.items():
                if sizes["H"] in chosen([s["H"] for s in MODELS.values()], selection.widths):
                    for cache in selection.caches_of(None):
                        axes = {"model": model, "T": 1, "H": sizes["H"], "I": sizes["I"]}
                        yield Case(self.name, {**axes, "dtype": dtype, "cache": cache})

    def shapes_of(self, axes: Axes) -> list[tuple[int, int]]:
        h, columns = sizes_of(axes, "H I")
        return [(2 * columns, h), (h, columns)]

    def make(self, axes: Axes, rng: Random, dtype: torch.dtype) -> MlpBlock:
        t, h = sizes_of(axes, "T H")
        gate_up, down = (drawn(rng, n, k, dtype) for n, k in self.shapes_of(axes))
        return MlpBlock(rng.activations(t, h).to(dtype), rng.uniform(0.5, 1.5, h).to(dtype), gate_up, down)

    def exact(self, problem: MlpBlock, rows: Tensor, columns: Tensor | None) -> tuple[Tensor, ...]:
        tensors = (problem.x, problem.norm, problem.gate_up, problem.down)
        return (dense_mlp(*wide(*tensors))[rows],)

    def traffic(self, axes: Axes) -> Traffic:
        t, h, columns, size = sizes_of(axes, "T H I dtype")
        return Traffic(self.weight_bytes(axes) + (t + 1) * h * size, t * h * size, 6 * t * h * columns)

    def unfused(self, problem: MlpBlock) -> Callable[[], Result]:
        return functools.partial(mlp_by_operators, *problem.arguments())

    def formulas(self) -> list[Formula]:
        return dense(dense_mlp, lambda problem: problem.dense())


class AttentionBlockOperator(Block):
    axes = "model T S H Hq Hk D"
    tiny = {"model": "tiny", "T": 1, "S": 40, "H": 64, "Hq": 4, "Hk": 2, "D": 16}  # noqa: RUF012 (never written)

    def cases(self, selection: Selection) -> Iterator[Case]:
        for dtype in selection.dtypes:
            for model, sizes in MODELS.items():
                if sizes["H"] not in chosen([s["H"] for s in MODELS.values()], selection.widths):
                    continue
                for s in CONTEXTS:
                    for cache in selection.caches_of(None):
                        heads = {name: sizes[name] for name in ("H", "Hq", "Hk", "D")}
                        yield Case(self.name, {"model": model, "T": 1, "S": s, **heads, "dtype": dtype, "cache": cache})

    def shapes_of(self, axes: Axes) -> list[tuple[int, int]]:
        h, q_heads, kv_heads, d = sizes_of(axes, "H Hq Hk D")
        return [((q_heads + 2 * kv_heads) * d, h), (h, q_heads * d)]

    def make(self, axes: Axes, rng: Random, dtype: torch.dtype) -> AttentionBlock:
        t, s, h, kv_heads, d = sizes_of(axes, "T S H Hk D")
        qkv, o = (drawn(rng, n, k, dtype) for n, k in self.shapes_of(axes))
        x, norm = rng.activations(1, t, h).to(dtype), rng.uniform(0.5, 1.5, h).to(dtype)
        keys, values = (rng.normal(1, kv_heads, s, d).to(dtype) for _ in range(2))
        angles = rng.uniform(0, 3, t, d // 2)
        return AttentionBlock(x, norm, qkv, o, keys, values, angles.cos(), angles.sin())

    def exact(self, problem: AttentionBlock, rows: Tensor, columns: Tensor | None) -> tuple[Tensor, ...]:
        p = problem
        d, kv_heads = p.keys.shape[3], p.keys.shape[1]
        x, norm, qkv, o, cos, sin = wide(p.x, p.norm, p.qkv, p.o, p.cos, p.sin)
        heads = F.linear(F.rms_norm(x, norm.shape, norm, EPS), qkv).unflatten(-1, (-1, d))
        q, k, v = heads.split((heads.shape[2] - 2 * kv_heads, kv_heads, kv_heads), 2)
        keys, values = wide(p.keys, p.values)
        keys[:, :, -1:], values[:, :, -1:] = rotated(k, cos, sin).transpose(1, 2), v.transpose(1, 2)
        return (x + F.linear(decode_attention_ref(rotated(q, cos, sin), keys, values).flatten(2), o),)

    def traffic(self, axes: Axes) -> Traffic:
        t, s, h, q_heads, kv_heads, d, size = sizes_of(axes, "T S H Hq Hk D dtype")
        weights = sum(2 * t * n * k for n, k in self.shapes_of(axes))
        # Of the cache all but the new rows, which are written; and the tables, in float32.
        read = self.weight_bytes(axes) + (2 * s * kv_heads * d + (t + 1) * h) * size + 4 * t * d
        return Traffic(read, t * h * size, weights + 4 * t * q_heads * s * d)

    def ours(self, problem: AttentionBlock) -> Callable[[], Result]:
        return functools.partial(call_attention, *problem.arguments())

    def unfused(self, problem: AttentionBlock) -> Callable[[], Result]:
        return functools.partial(attention_by_operators, *problem.arguments())

    def formulas(self) -> list[Formula]:
        return dense(dense_attention, lambda problem: problem.dense())


OPERATORS = (AttentionBlockOperator("attention_block"), MlpBlockOperator("mlp_block"))
