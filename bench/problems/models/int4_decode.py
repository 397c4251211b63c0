"""Decoding with a whole model: a step of a loop that decodes one token for each of M sequences, on a Llama.

M divided by its time is the number of tokens a second. Ours has 4-bit linears on qops operators and a dense output
layer; beside it stands Transformers' own with the same weights dense. A step is what ``generate`` does for a token,
without what it does on the host: embedding, layers, norm, output layer and the most likely token, which the next step
starts from. Keys and values stand in tensors of fixed size, in which every step writes the last position again, so that
a CUDA graph can hold a step and all of them cost the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import qops
from bench.problems.shared.cases import CONTEXT, SEQUENCES, Selection, chosen
from bench.problems.shared.draws import Random
from bench.problems.shared.model import ROPE_THETA, ModelOperator, linears
from bench.problems.shared.operator import EPS, Traffic, sizes_of
from bench.problems.shared.provider import Axes, Formula, Provider, Result, dense
from qops.formats.checkpoint import Facts, QuantizedFacts
from qops.models.load import build_model, dense_model
from qops.ops.rms_norm import rms_norm_ref
from qops.ops.rotary import rotary_ref
from qops.ops.silu_mul import silu_mul_ref

GROUPS = (128, 64, 32, 16)


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


def group_size(k: int) -> int:
    """Of a 4-bit weight, as ``qops.quantize_model`` chooses it."""
    return next(size for size in GROUPS if k % size == 0)


class Int4DecodeOperator(ModelOperator):
    axes = "layer M H I Hq Hk D L V C"
    comes_last = True
    tiny = {"cache": "hot"}  # noqa: RUF012
    unit = "bf16"
    accuracy = "exact weights, fp32 sums"

    def cases_of(self, name: str, sizes: dict[str, int | str], selection: Selection) -> Iterator[dict[str, int | str]]:
        """A model is larger than a cache anyway."""
        depth, vocabulary = sizes.pop("L"), sizes.pop("V")
        sizes |= {"L": selection.depth or depth, "V": vocabulary, "C": CONTEXT}
        for sequences in chosen(SEQUENCES, selection.rows):
            yield {"layer": name, "M": sequences, **sizes}

    def make(self, axes: Axes, rng: Random, dtype: torch.dtype) -> Int4Decode:
        m, depth, h, k_heads, d, vocabulary, context = sizes_of(axes, "M L H Hk D V C")

        def matrix(n: int, k: int, factor: float) -> Int4Matrix:
            codes = rng.bytes(n, k // 2)
            # 0 becomes 8, for a mean of zero: else every product adds a multiple of the sum of its inputs, the same to
            # all outputs, and after some layers a model amplifies the rounding of a row a hundred times.
            codes |= ((codes & 15) == 0) * 8
            codes |= ((codes >> 4) == 0) * 128
            return Int4Matrix(codes, (factor * rng.int4_scales(k, n, k // group_size(k))).to(dtype))

        def norm() -> Tensor:
            return rng.uniform(0.5, 1.5, h).to(dtype)

        def layer() -> DecodeLayer:
            # What is added to the residual is as small as in a trained model: together as large as the embedding.
            factors = dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), (2 * depth) ** -0.5)
            sizes = linears(axes).items()
            weights = {name: matrix(n, k, factors.get(name, 1.0)) for name, (n, k) in sizes}
            norms = {"input_layernorm": norm(), "post_attention_layernorm": norm()}
            keys, values = (rng.normal(m, k_heads, context, d).to(dtype) for _ in range(2))
            return DecodeLayer(weights, norms, keys, values)

        return Int4Decode(
            ids=torch.randint(vocabulary, (m,), generator=rng.generator, device=rng.device),
            table=rng.normal(vocabulary, h).to(dtype),
            head=(rng.normal(vocabulary, h) / h**0.5).to(dtype),
            norm=norm(),
            layers=tuple(layer() for _ in range(depth)),
            sizes={name: int(value) for name, value in axes.items() if isinstance(value, int)},
            dtype=dtype,
        )

    def traffic(self, axes: Axes) -> Traffic:
        """Of the table a row for each sequence is read; counted are products and attention."""
        m, depth, h, q_heads, k_heads, d = sizes_of(axes, "M L H Hq Hk D")
        vocabulary, context, size = sizes_of(axes, "V C dtype")
        cached, norms = 2 * m * depth * k_heads * context * d, (2 * depth + 1) * h
        read = self.weight_bytes(axes) + 8 * m + (m * h + vocabulary * h + norms + cached) * size
        layer = self.products(axes) + 2 * q_heads * d * (context + 1)
        return Traffic(read, m * vocabulary * size, 2 * m * (depth * layer + vocabulary * h))

    def weight_bytes(self, axes: Axes, bits: int | None = None) -> int:
        sizes, (depth, size) = linears(axes).values(), sizes_of(axes, "L dtype")
        scales = {k: k // group_size(k) * size for _, k in sizes}
        return depth * sum(n * (k // 2 + scales[k]) if bits is None else n * k * bits // 8 for n, k in sizes)

    def ours(self, problem: Int4Decode) -> Callable[[], Result]:
        return steps(int4_model(problem), problem)

    def providers(self) -> list[Provider]:
        return [replace(provider, requires=("transformers",)) for provider in super().providers()]

    def formulas(self) -> list[Formula]:
        found = dense(dense_decode, lambda p: ())
        return [replace(f, name=f"{f.name}, transformers", function=dense_decode) for f in found]

    def compiled(self) -> list[Formula]:
        return []


class Weights:
    """The problem's as a checkpoint that ``qops.load_model`` could be reading."""

    def __init__(self, p: Int4Decode) -> None:
        from transformers import LlamaConfig

        sizes = p.sizes
        self.config = LlamaConfig(
            vocab_size=sizes["V"],
            hidden_size=sizes["H"],
            intermediate_size=sizes["I"],
            num_hidden_layers=sizes["L"],
            num_attention_heads=sizes["Hq"],
            num_key_value_heads=sizes["Hk"],
            head_dim=sizes["D"],
            max_position_embeddings=sizes["C"] + 1,
            rms_norm_eps=EPS,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
        )
        self.dtype, self.fuses, self.generation_config = p.dtype, True, None
        self.format, self.path = "int4_decode", Path("int4_decode")
        self._weights: dict[str, Tensor | Int4Matrix] = {
            **{"model.embed_tokens": p.table, "model.norm": p.norm, "lm_head": p.head},
            **{f"model.layers.{i}.{part}": w for i, layer in enumerate(p.layers) for part, w in layer.linears.items()},
            **{f"model.layers.{i}.{part}": w for i, layer in enumerate(p.layers) for part, w in layer.norms.items()},
        }

        self.names = frozenset(f"{module}.weight" for module in self._weights)

    def holds(self, name: str) -> bool:
        return name in self.names

    def describe(self, name: str) -> Facts:
        found = self._weights[name.removesuffix(".weight")]
        if not isinstance(found, Int4Matrix):
            return Facts("dense", tuple(found.shape), found.nbytes)
        (rows, half), groups = found.qweight.shape, found.scales.shape[1]
        quantized = QuantizedFacts(2 * half // groups, found.scales.dtype, ("symmetric",), act_order=False)
        return Facts("int4", (rows, 2 * half), found.qweight.nbytes + found.scales.nbytes, quantized)

    def linear(self, module: str) -> type[qops.nn.Int4Linear] | None:
        return qops.nn.Int4Linear if isinstance(self._weights[module], Int4Matrix) else None

    def kind(self, module: str) -> str:
        return "int4" if self.linear(module) else "dense"

    def weight(self, module: str) -> Tensor | qops.Int4Weight:
        found = self._weights[module]
        if not isinstance(found, Int4Matrix):
            return found
        return qops.Int4Weight.from_canonical(*found, kind="symmetric", pack=False)

    def activations(self, module: str) -> dict[str, Tensor]:
        return {}

    def tensor(self, name: str) -> Tensor:
        raise ValueError(f"{name}: there are weights alone")

    def finish(self, model: Any) -> None:
        """Nothing is left over: the problem is made for this model."""


class Cache:
    """Keys and values [M, Hk, context + 1, D] of every layer; what is new is always the last of them."""

    def __init__(self, p: Int4Decode) -> None:
        def longer(tensor: Tensor) -> Tensor:
            return torch.cat((tensor, torch.zeros_like(tensor[:, :, :1])), dim=2)

        self._layers = [(longer(layer.keys), longer(layer.values)) for layer in p.layers]

    def update(self, key: Tensor, value: Tensor, layer: int, **_: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._layers[layer]
        keys[:, :, -1:].copy_(key)
        values[:, :, -1:].copy_(value)
        return keys, values


def steps(model: Any, p: Int4Decode) -> Callable[[], Result]:
    """The next step of each call."""
    from qops.models.decoder import cache_keyword

    decoder, cache, ids = model.model, Cache(p), p.ids[:, None].clone()
    keyword = cache_keyword(type(decoder))
    assert keyword is not None
    positions = torch.full((1, 1), p.sizes["C"], device=p.device)

    def call() -> Tensor:
        hidden = decoder.embed_tokens(ids)
        tables = decoder.rotary_emb(hidden, position_ids=positions)
        for layer in decoder.layers:
            hidden = layer(
                hidden,
                attention_mask=None,
                position_ids=positions,
                **{keyword: cache},
                use_cache=True,
                position_embeddings=tables,
            )
        logits = model.lm_head(decoder.norm(hidden))[:, 0]
        ids.copy_(logits.argmax(-1, keepdim=True))
        return logits

    return call


def int4_model(p: Int4Decode) -> Any:
    # Its results are compared with the dense model's before anything is timed.
    return build_model(Weights(p), p.dtype, p.device, prove=False)


def dense_decode(p: Int4Decode) -> Callable[[], Result]:
    return steps(dense_model(int4_model(p), p.dtype), p)


OPERATORS = (Int4DecodeOperator("int4_decode"),)
