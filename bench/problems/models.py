"""What a layer and a whole model compute, of many operators: their inputs, exact results, bytes and arithmetic.

``int8_layer`` is a W8A8 decoder layer without attention itself, whose output is an input. ``int4_decode`` is a step of
a loop that decodes one token for each of M sequences, on a Llama with 4-bit linears and a dense output layer; M divided
by its time is the number of tokens a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bench.problems.shared.draws import Random
from qops.ops.rms_norm import rms_norm_ref
from qops.ops.rotary import rotary_ref
from qops.ops.silu_mul import silu_mul_ref

Axes = Mapping[str, int | str]

OPS = ("int8_layer", "int4_decode")
EPS = 1e-5
ROPE_THETA = 500000.0
GROUPS = (128, 64, 32, 16)


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


class Int4Matrix(NamedTuple):
    """``w[n, k] = scales[n, k / G] * (code - 8)``, codes of even k in the low nibbles of ``qweight [N, K / 2]``."""

    qweight: Tensor
    scales: Tensor

    def dense(self) -> Tensor:
        """float64 [N, K]."""
        codes = torch.stack((self.qweight & 15, self.qweight >> 4), dim=-1).view(*self.scales.shape, -1)
        return ((codes.double() - 8) * self.scales.double()[..., None]).flatten(1)


class DecodeLayer(NamedTuple):
    """Weights of a layer by Transformers' names, and its keys and values [M, Hk, context, D]."""

    linears: dict[str, Int4Matrix]
    norms: dict[str, Tensor]
    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Int4Decode:
    """The logits [M, V] of the token after ``ids [M]``, which stand at position ``context`` of their sequences."""

    ids: Tensor
    table: Tensor
    head: Tensor
    norm: Tensor
    layers: tuple[DecodeLayer, ...]
    sizes: dict[str, int]
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        return self.ids.shape[0]

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def reference(self, rows: Tensor) -> tuple[Tensor, ...]:
        """In float64 on the problem's device, a dense weight at a time."""
        m, d, context = len(rows), self.sizes["D"], self.sizes["C"]
        angles = context * ROPE_THETA ** (-torch.arange(0, d, 2, device=self.device, dtype=torch.float64) / d)
        cos, sin = angles.cos()[None], angles.sin()[None]
        x = self.table[self.ids[rows]].double()
        for layer in self.layers:

            def linear(name: str, x: Tensor, layer: DecodeLayer = layer) -> Tensor:
                return x @ layer.linears[name].dense().T

            y = rms_norm_ref(x, layer.norms["input_layernorm"], EPS, rounding="fp32")
            q, k, v = (linear(f"self_attn.{part}_proj", y).view(m, 1, -1, d) for part in "qkv")
            q, k = (rotary_ref(t, cos, sin) for t in (q, k))
            keys, values = (
                torch.cat((cached[rows].double(), new.transpose(1, 2)), dim=2)
                for cached, new in ((layer.keys, k), (layer.values, v))
            )
            q = q.view(m, keys.shape[1], -1, d)
            attention = (q @ keys.transpose(2, 3) * d**-0.5).softmax(-1) @ values
            x = x + linear("self_attn.o_proj", attention.reshape(m, -1))
            y = rms_norm_ref(x, layer.norms["post_attention_layernorm"], EPS, rounding="fp32")
            y = silu_mul_ref(linear("mlp.gate_proj", y), linear("mlp.up_proj", y), rounding="fp32")
            x = x + linear("mlp.down_proj", y)
        return (rms_norm_ref(x, self.norm, EPS, rounding="fp32") @ self.head.double().T,)


def _sizes(axes: Axes, names: str) -> list[int]:
    return [int(axes[name]) for name in names.split()]


def group_size(k: int) -> int:
    """Of a 4-bit weight, as ``qops.quantize_model`` chooses it."""
    return next(size for size in GROUPS if k % size == 0)


def _linears(axes: Axes) -> dict[str, tuple[int, int]]:
    """(N, K) of each linear of a layer."""
    h, i, q_heads, k_heads, d = _sizes(axes, "H I Hq Hk D")
    attention = {"q": (q_heads * d, h), "k": (k_heads * d, h), "v": (k_heads * d, h), "o": (h, q_heads * d)}
    mlp = {"gate": (i, h), "up": (i, h), "down": (h, i)}
    found = {f"self_attn.{name}_proj": size for name, size in attention.items()}
    return found | {f"mlp.{name}_proj": size for name, size in mlp.items()}


def make(op: str, axes: Axes, rng: Random, dtype: torch.dtype) -> Int8Layer | Int4Decode:
    """The inputs of one case. Activations have no outliers, as those of a smoothed model."""
    return _int8_layer(axes, rng, dtype) if op == "int8_layer" else _int4_decode(axes, rng, dtype)


def _int8_layer(axes: Axes, rng: Random, dtype: torch.dtype) -> Int8Layer:
    t, h, i, q_heads, k_heads, d = _sizes(axes, "T H I Hq Hk D")
    heads = (q_heads, k_heads, k_heads)
    sizes = {"qkv": (sum(heads) * d, h), "o": (h, q_heads * d), "gate_up": (2 * i, h), "down": (h, i)}
    weights: dict[str, Tensor] = {}
    for name, (n, k) in sizes.items():
        weights |= {name: rng.int8_codes(n, k), f"{name}_scale": rng.int8_scales(k, n)}
    angles = torch.arange(t, device=rng.device)[:, None] * ROPE_THETA ** (-torch.arange(0, d, 2, device=rng.device) / d)
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


def _int4_decode(axes: Axes, rng: Random, dtype: torch.dtype) -> Int4Decode:
    m, depth, h, k_heads, d, vocabulary, context = _sizes(axes, "M L H Hk D V C")

    def matrix(n: int, k: int, factor: float) -> Int4Matrix:
        codes = rng.bytes(n, k // 2)
        # 0 becomes 8, for a mean of zero: else every product adds a multiple of the sum of its inputs, the same to all
        # outputs, and after some layers a model amplifies the rounding of a row a hundred times.
        codes |= ((codes & 15) == 0) * 8
        codes |= ((codes >> 4) == 0) * 128
        return Int4Matrix(codes, (factor * rng.int4_scales(k, n, k // group_size(k))).to(dtype))

    def norm() -> Tensor:
        return rng.uniform(0.5, 1.5, h).to(dtype)

    def layer() -> DecodeLayer:
        # What is added to the residual is as small as in a model that is trained: together as large as the embedding.
        factors = dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), (2 * depth) ** -0.5)
        linears = {name: matrix(n, k, factors.get(name, 1.0)) for name, (n, k) in _linears(axes).items()}
        norms = {"input_layernorm": norm(), "post_attention_layernorm": norm()}
        keys, values = (rng.normal(m, k_heads, context, d).to(dtype) for _ in range(2))
        return DecodeLayer(linears, norms, keys, values)

    return Int4Decode(
        ids=torch.randint(vocabulary, (m,), generator=rng.generator, device=rng.device),
        table=rng.normal(vocabulary, h).to(dtype),
        head=(rng.normal(vocabulary, h) / h**0.5).to(dtype),
        norm=norm(),
        layers=tuple(layer() for _ in range(depth)),
        sizes={name: int(value) for name, value in axes.items() if isinstance(value, int)},
        dtype=dtype,
    )


def _itemsize(axes: Axes) -> int:
    return getattr(torch, str(axes["dtype"])).itemsize


def bytes_and_flops(op: str, axes: Axes) -> tuple[int, int]:
    """What must be read and written at least, and the multiplications and additions of products and attention."""
    size, products = _itemsize(axes), sum(n * k for n, k in _linears(axes).values())
    h, q_heads, d = _sizes(axes, "H Hq D")
    moved = weight_bytes(op, axes) + written_bytes(op, axes)
    if op == "int8_layer":
        (t,) = _sizes(axes, "T")
        return moved + (t * (2 * h + (q_heads + 1) * d) + 2 * h) * size, 2 * t * products
    m, depth, k_heads, vocabulary, context = _sizes(axes, "M L Hk V C")
    cached, norms = 2 * m * depth * k_heads * context * d, (2 * depth + 1) * h
    # Of the table, a row for each sequence.
    read = 8 * m + (m * h + vocabulary * h + norms + cached) * size
    return moved + read, 2 * m * (depth * (products + 2 * q_heads * d * (context + 1)) + vocabulary * h)


def written_bytes(op: str, axes: Axes) -> int:
    """The part of the bytes that are results."""
    if op == "int4_decode":
        m, vocabulary = _sizes(axes, "M V")
        return m * vocabulary * _itemsize(axes)
    t, h, q_heads, k_heads, d = _sizes(axes, "T H Hq Hk D")
    return t * ((q_heads + 2 * k_heads) * d + 2 * h) * _itemsize(axes)


def weight_bytes(op: str, axes: Axes, bits: int | None = None) -> int:
    """Of the quantised weights as the problem stores them, or dense with so many bits a value."""
    sizes = _linears(axes).values()
    if op == "int8_layer":
        return sum(n * k + 4 * n if bits is None else n * k * bits // 8 for n, k in sizes)
    (depth,) = _sizes(axes, "L")
    scales = {k: k // group_size(k) * _itemsize(axes) for _, k in sizes}
    return depth * sum(n * (k // 2 + scales[k]) if bits is None else n * k * bits // 8 for n, k in sizes)
