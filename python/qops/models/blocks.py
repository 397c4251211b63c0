"""Decoding steps of a fused layer by the block operators: two calls a layer instead of eight or more.

A chain of operators pays for a call and a parallel region each; at a few tokens that is more time than small models need
to read their weights. Where everything in a half of a layer is known, it is one operator: :func:`qops.attention_block`,
which also appends to the cache, and :func:`qops.mlp_block`. Their bits are those of the chain.

Which modules a half has is found once and then watched: what somebody replaces is noticed at the next step. The cache is Transformers' own: a layer of it whose keys and values were made here stand at the beginning of larger
tensors, which take the next token without a copy.

This module imports Transformers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from qops.nn import MLP, Int4Linear, Int8WeightOnlyLinear, MergedLinear, RMSNorm
from qops.ops._checks import INT4_KINDS, MAX_DECODE_TOKENS

# Positions that a cache gets room for at a time, at least; half of what it holds, if that is more.
_ROOM = 256
# Where a cache's layer keeps what _Grown is.
_GROWN = "_qops_grown"


class _Unknown(Exception):
    """Something that the block operators do not compute."""


class Places:
    """Where the arguments of a block operator stand, and what has to stay as it is for that.

    Tensors are looked up in each call, so that none is kept alive and none is stale.
    """

    def __init__(self) -> None:
        self.arguments: list[tuple[dict[str, Any], str]] = []
        self.settled: list[tuple[dict[str, Any], str, Any]] = []

    def settle(self, owner: dict[str, Any], name: str) -> Any:
        """What stands there, and has to."""
        value = owner.get(name)
        self.settled.append((owner, name, value))
        return value

    def hold(self) -> bool:
        """Whether all that was settled stands."""
        for owner, name, value in self.settled:  # noqa: SIM110 (a generator takes twice as long)
            if owner.get(name) is not value:
                return False
        return True

    def add(self, owner: dict[str, Any], name: str) -> None:
        self.arguments.append((owner, name))

    def add_value(self, value: Any) -> None:
        self.arguments.append(({"value": value}, "value"))

    def values(self) -> list[Any]:
        """The arguments, now."""
        return [owner.get(name) for owner, name in self.arguments]

    def add_norm(self, norm: Any) -> Style:
        """The weight of a norm that gives dense rows."""
        if type(norm) is not RMSNorm or self.settle(norm.__dict__, "int8") is not None:
            raise _Unknown
        own = norm.__dict__
        self.add(self.settle(own, "_parameters"), "weight")
        return Style(*(self.settle(own, name) for name in Style._fields))

    def add_linear(self, linear: Any) -> None:
        """packed, scales, zeros, perm, bias, kind."""
        if type(linear) is MergedLinear:
            linear = self.settle(self.settle(linear.__dict__, "_modules"), "merged")
        if type(linear) not in (Int4Linear, Int8WeightOnlyLinear) or self.settle(linear.__dict__, "float32_output"):
            raise _Unknown
        own = linear.__dict__
        weight = self.settle(self.settle(own, "_modules"), "weight")
        buffers = self.settle(weight.__dict__, "_buffers")
        if not weight.is_packed or buffers["packed"].device.type != "cpu":
            raise _Unknown
        for name in ("packed", "scales", "zeros", "perm"):
            self.add(buffers, name)
        self.add(self.settle(own, "_parameters"), "bias")
        self.add_value(INT4_KINDS.index(self.settle(weight.__dict__, "kind")))

    def add_norms(self, modules: dict[str, Any], first: str, last: str | None) -> Style:
        """The norms before and, where there is one, after a half, and what they share."""
        style = self.add_norm(self.settle(modules, first))
        if last is None:
            self.add_value(None)
        elif self.add_norm(self.settle(modules, last)) != style:
            raise _Unknown
        for value in style:
            self.add_value(value)
        return style


class Style(NamedTuple):
    """What the norms of a block share."""

    eps: float
    weight_offset: float
    rounding: str


class Halves:
    """The halves of a fused decoder layer that are known to be what a block operator computes.

    Attributes:
        attention, mlp: None where it is not known.
    """

    def __init__(self, layer: Any) -> None:
        after = ("post_attention_layernorm", "post_feedforward_layernorm") if layer.sandwich else (None, None)
        self.attention = _known(AttentionHalf, layer, "input_layernorm", after[0])
        self.mlp = _known(MlpHalf, layer, layer.before_mlp, after[1])


def _known(half: type[Any], layer: Any, first: str, last: str | None) -> Any:
    try:
        return half(layer, first, last)
    except _Unknown:
        return None


class MlpHalf(Places):
    """norm, gate and up, SiLU-mul, down, residual."""

    def __init__(self, layer: Any, first: str, last: str | None) -> None:
        super().__init__()
        modules = self.settle(layer.__dict__, "_modules")
        mlp = self.settle(modules, "mlp")
        if type(mlp) is not MLP or self.settle(mlp.__dict__, "act") is not None:
            raise _Unknown
        self.add_norms(modules, first, last)
        parts = self.settle(mlp.__dict__, "_modules")
        self.add_linear(self.settle(parts, "gate_up_proj"))
        self.add_value(self.settle(mlp.__dict__, "activates_in_gemm"))
        self.add_linear(self.settle(parts, "down_proj"))

    def step(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.qops.mlp_block.default(x, *self.values())


class AttentionHalf(Places):
    """norm, q k v, their norms and rotation, the cache, attention, o, residual."""

    def __init__(self, layer: Any, first: str, last: str | None) -> None:
        from qops.models.decoder import Attention

        super().__init__()
        modules = self.settle(layer.__dict__, "_modules")
        attention = self.settle(modules, "self_attn")
        if not isinstance(attention, Attention):
            raise _Unknown
        own = attention.__dict__
        style = self.add_norms(modules, first, last)
        parts = self.settle(own, "_modules")
        self.add_linear(self.settle(parts, "qkv_proj"))
        for name in ("q_norm", "k_norm"):
            if name not in parts:
                self.add_value(None)
            elif self.add_norm(self.settle(parts, name)) != style:
                raise _Unknown
        self.tables = len(self.arguments)
        self.add_linear(self.settle(parts, "o_proj"))
        self.add_value(float(self.settle(own, "scaling")))
        self.rotates = self.settle(own, "rotates")
        self.layer_idx = self.settle(own, "layer_idx")
        self.head_dim = self.settle(own, "head_dim")
        self.kv_heads = self.settle(own, "key_value_heads")
        self.is_causal = attention.is_causal
        extras = self.settle(own, "extras")
        self.window = self.settle(extras, "sliding_window") or 0
        if self.settle(extras, "softcap") is not None:  # which Transformers' SDPA does not apply
            raise _Unknown

    def step(self, x: torch.Tensor, shared: Any, mask: Any, cache: Any) -> torch.Tensor | None:
        """x after this half, with its keys and values in the cache; None where the chain has to do it."""
        room = room_for(cache, self.layer_idx, x, self.kv_heads, self.head_dim)
        if room is None or not decodes(x, room.keys, mask, self.is_causal):
            return None
        values = self.values()
        tables = (shared.cos, shared.sin, shared.positions) if self.rotates else (None, None, None)
        window = self.window if mask is None else 0
        y = torch.ops.qops.attention_block.default(
            x,
            *values[: self.tables],
            *tables,
            room.keys,
            room.values,
            *values[self.tables :],
            mask,
            window,
            0.0,
            room.first_position,
        )
        room.take()
        return y


def may_step(x: torch.Tensor) -> bool:
    """Whether hidden states [B, T, H] are those of few tokens on a CPU, in eager mode and without autocast."""
    return (
        x.dim() == 3
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and 1 <= x.shape[1] <= MAX_DECODE_TOKENS
        and not torch.is_autocast_enabled("cpu")
    )


def decodes(x: torch.Tensor, keys: torch.Tensor, mask: Any, is_causal: bool) -> bool:
    """Whether `decode_attention` gives what Transformers' SDPA means, of x [B, T, ...] and keys [B, Hkv, S, D]."""
    if x.dtype is not keys.dtype:
        return False
    tokens, rows = x.shape[1], keys.shape[2]
    if mask is None:
        # Several tokens behind others come with a mask; alone, they are causal.
        return tokens == 1 or (tokens == rows and is_causal)
    return mask.dtype is torch.bool and mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[3] == rows


# The cache -----------------------------------------------------------------------------------------------------------


class _Grown(NamedTuple):
    """Keys and values [B, Hkv, room, D] of a layer of a cache, and the views of them that it had at last.

    Whoever else has made views of its own, or copies, is noticed by that: rows behind the last views are free.
    """

    keys: torch.Tensor
    values: torch.Tensor
    last_keys: torch.Tensor
    begin: int
    end: int


class Room:
    """Views of a cache's layer that have room for new tokens, which are theirs after :meth:`take`."""

    __slots__ = ("begin", "end", "first_position", "grown_keys", "grown_values", "keys", "layer", "tokens", "values")

    def __init__(
        self, layer: Any, keys: torch.Tensor, values: torch.Tensor, begin: int, end: int, tokens: int, first: int
    ) -> None:
        self.layer, self.grown_keys, self.grown_values = layer, keys, values
        self.begin, self.end, self.tokens, self.first_position = begin, end, tokens, first
        self.keys, self.values = keys.narrow(2, begin, end - begin), values.narrow(2, begin, end - begin)

    def take(self) -> None:
        layer, begin, keys, values = self.layer, self.begin, self.keys, self.values
        if type(layer) is DynamicSlidingWindowLayer:
            layer.cumulative_length += self.tokens
            dropped = max(0, self.end - begin - (layer.sliding_window - 1))
            if dropped > 0:
                begin += dropped
                keys = self.grown_keys.narrow(2, begin, self.end - begin)
                values = self.grown_values.narrow(2, begin, self.end - begin)
        layer.keys, layer.values = keys, values
        layer.__dict__[_GROWN] = _Grown(self.grown_keys, self.grown_values, keys, begin, self.end)


def room_for(cache: Any, index: int, x: torch.Tensor, kv_heads: int, head_dim: int) -> Room | None:
    """Room in a layer of a cache for the tokens of x [B, T, H]; None where it is not one that is known to grow."""
    if type(cache) is not DynamicCache or cache.offloading or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    kind = type(layer)
    if kind is DynamicLayer:
        first = 0
    elif kind is DynamicSlidingWindowLayer and not layer.record_past:
        first = layer.cumulative_length
    else:
        return None
    held = layer.keys
    if not layer.is_initialized or held is None or held.dim() != 4:
        return None
    batch, tokens = x.shape[0], x.shape[1]
    rows = held.shape[2]
    if kind is DynamicSlidingWindowLayer:
        first -= rows
    grown = layer.__dict__.get(_GROWN)
    if grown is not None and grown.last_keys is held and grown.end + tokens <= grown.keys.shape[2]:
        return Room(layer, grown.keys, grown.values, grown.begin, grown.end + tokens, tokens, first)
    shape = (batch, kv_heads, rows, head_dim)
    same = held.shape == shape and layer.values.shape == shape and held.dtype == layer.values.dtype == x.dtype
    if not same or held.device != x.device:
        return None
    room = (batch, kv_heads, rows + tokens + max(_ROOM, rows // 2), head_dim)
    keys, values = x.new_empty(room), x.new_empty(room)
    keys[:, :, :rows], values[:, :, :rows] = held, layer.values
    return Room(layer, keys, values, 0, rows + tokens, tokens, first)


def first_position(cache: Any, index: int, keys: torch.Tensor) -> int:
    """Of the first of the keys [B, Hkv, S, D] that a cache has given, new ones included."""
    layers = getattr(cache, "layers", None)
    if layers and type(layers[index]) is DynamicSlidingWindowLayer:
        return max(0, layers[index].cumulative_length - keys.shape[2])
    return 0
