"""A W8A8 decoder layer without attention itself, whose output is an input, against the same weights dense."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import qops
from bench.problems.rms_norm import transformers_norm
from bench.problems.rotary import transformers_rotary
from bench.problems.shared.cases import TOKENS, Selection, chosen
from bench.problems.shared.draws import Random
from bench.problems.shared.model import ROPE_THETA, ModelOperator, linears
from bench.problems.shared.operator import EPS, Traffic, sizes_of
from bench.problems.shared.provider import Axes, Formula, Result, dense
from bench.problems.silu_mul import silu_then_mul
from qops.ops.rms_norm import rms_norm_ref
from qops.ops.rotary import rotary_ref
from qops.ops.silu_mul import silu_mul_ref


@dataclass(frozen=True)
class Int8Layer:
    """A layer over T tokens, between the output ``x`` of the layer before and its own output.

    ``z = x + residual``; ``q, k, v = norm(z) @ qkv.T``, then q and k are rotated; ``z' = z + attention @ o.T``;
    ``down = silu_mul(norm(z') @ gate_up.T) @ down.T``. The results are q, k, v [T, heads, D], z' and down [T, H].
    The weights have int8 codes [N, K] with a scale for each row; what they multiply is quantised per token by rule 127.
    """

    x: Tensor
    residual: Tensor
    attention: Tensor
    first_norm: Tensor
    second_norm: Tensor
    qkv: Tensor
    qkv_scale: Tensor
    o: Tensor
    o_scale: Tensor
    gate_up: Tensor
    gate_up_scale: Tensor
    down: Tensor
    down_scale: Tensor
    cos: Tensor
    sin: Tensor
    heads: tuple[int, int, int]

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def device(self) -> torch.device:
        return self.x.device

    def weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Codes and scales by name."""
        return {
            "qkv": (self.qkv, self.qkv_scale),
            "o": (self.o, self.o_scale),
            "gate_up": (self.gate_up, self.gate_up_scale),
            "down": (self.down, self.down_scale),
        }

    def reference(self, rows: Tensor) -> tuple[Tensor, ...]:
        """In float64 on the problem's device, with activations that are not quantised."""

        def linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
            return x @ codes.double().T * scale.double()

        z = self.x[rows].double() + self.residual[rows].double()
        qkv = linear(rms_norm_ref(z, self.first_norm, EPS, rounding="fp32"), self.qkv, self.qkv_scale)
        q, k, v = qkv.view(len(rows), sum(self.heads), -1).split(self.heads, dim=1)
        positions = torch.arange(len(rows), device=self.device)
        q, k = (rotary_ref(t, self.cos[rows], self.sin[rows], positions) for t in (q, k))
        z = z + linear(self.attention[rows].double(), self.o, self.o_scale)
        y = linear(rms_norm_ref(z, self.second_norm, EPS, rounding="fp32"), self.gate_up, self.gate_up_scale)
        down = linear(silu_mul_ref(*y.chunk(2, dim=-1), rounding="fp32"), self.down, self.down_scale)
        return q, k, v, z, down


class Int8LayerOperator(ModelOperator):
    axes = "layer T H I Hq Hk D"
    unit = "int8"

    def cases_of(self, name: str, sizes: dict[str, int | str], selection: Selection) -> Iterator[dict[str, int | str]]:
        """The weights come from memory, from copies of them."""
        sizes = {axis: size for axis, size in sizes.items() if axis in self.axes.split()}
        for tokens in chosen(TOKENS, selection.tokens):
            yield {"layer": name, "T": tokens, **sizes}

    def make(self, axes: Axes, rng: Random, dtype: torch.dtype) -> Int8Layer:
        t, h, i, q_heads, k_heads, d = sizes_of(axes, "T H I Hq Hk D")
        heads = (q_heads, k_heads, k_heads)
        sizes = {"qkv": (sum(heads) * d, h), "o": (h, q_heads * d), "gate_up": (2 * i, h), "down": (h, i)}
        weights: dict[str, Tensor] = {}
        for name, (n, k) in sizes.items():
            weights |= {name: rng.int8_codes(n, k), f"{name}_scale": rng.int8_scales(k, n)}
        positions, pairs = torch.arange(t, device=rng.device)[:, None], torch.arange(0, d, 2, device=rng.device)
        angles = positions * ROPE_THETA ** (-pairs / d)
        return Int8Layer(
            x=rng.normal(t, h).to(dtype),
            residual=rng.normal(t, h).to(dtype),
            attention=rng.normal(t, q_heads * d).to(dtype),
            first_norm=rng.uniform(0.5, 1.5, h).to(dtype),
            second_norm=rng.uniform(0.5, 1.5, h).to(dtype),
            **weights,
            cos=angles.cos().to(dtype),
            sin=angles.sin().to(dtype),
            heads=heads,
        )

    def traffic(self, axes: Axes) -> Traffic:
        t, h, q_heads, k_heads, d, size = sizes_of(axes, "T H Hq Hk D dtype")
        read = self.weight_bytes(axes) + (t * (2 * h + (q_heads + 1) * d) + 2 * h) * size
        return Traffic(read, t * ((q_heads + 2 * k_heads) * d + 2 * h) * size, 2 * t * self.products(axes))

    def weight_bytes(self, axes: Axes, bits: int | None = None) -> int:
        return sum(n * k + 4 * n if bits is None else n * k * bits // 8 for n, k in linears(axes).values())

    def ours(self, p: Int8Layer) -> Callable[[], Result]:
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

    def formulas(self) -> list[Formula]:
        return dense(dense_layer, _arguments)

    def compiled(self) -> list[Formula]:
        return [replace(formula, name=f"torch.compile, {formula.name}") for formula in self.formulas()]


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
    return q, k, v, z, F.linear(silu_then_mul(gate_up), down_weight)


def _arguments(p: Int8Layer) -> tuple[Any, ...]:
    weights = tuple((codes.float() * scale[:, None]).to(p.x.dtype) for codes, scale in p.weights().values())
    cos, sin = (torch.cat((table, table), dim=-1) for table in (p.cos, p.sin))
    return p.x, p.residual, p.attention, (p.first_norm, p.second_norm), weights, cos, sin, p.heads


OPERATORS = (Int8LayerOperator("int8_layer"),)
