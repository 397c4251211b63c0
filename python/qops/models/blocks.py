"""Decoding steps of a fused layer by the block operators: two calls a layer instead of eight or more.

A chain of operators pays for a call and a parallel region each; at a few tokens that is more time than small models
need to read their weights. Where everything in a half of a layer is known, it is one operator:
:func:`qops.attention_block`, which also appends to the cache, and :func:`qops.mlp_block`. Their bits are those of the
chain.

Which modules a half has is found once and then watched: what somebody replaces is noticed at the next step. The cache
is Transformers' own: keys and values of a layer of it become the beginning of larger tensors, which take the next token
without a copy.

This module imports Transformers.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from qops import _layout, nn
from qops.nn import MLP, MergedLinear, RMSNorm
from qops.nn.hooks import Noticed
from qops.nn.mlp import rows_rule
from qops.ops._checks import INT4_KINDS, MAX_DECODE_TOKENS
from qops.ops.decoder_block import INPUTS

# Positions that a cache gets room for at a time, at least; half of what it holds, if that is more.
_POSITIONS = 256
# What linears multiply: one of INPUTS. Of others no block operator computes it.
_INPUTS: dict[type, int] = {
    nn.Int4Linear: INPUTS.index("float"),
    nn.Int8WeightOnlyLinear: INPUTS.index("float"),
    nn.Int4Int8Linear: INPUTS.index("127"),
    nn.Int8Linear: INPUTS.index("127"),
    nn.Int8CompressedTensorsLinear: INPUTS.index("compressed-tensors"),
    nn.Int8TorchaoLinear: INPUTS.index("torchao"),
    nn.Int8AsymmetricLinear: INPUTS.index("255"),
    nn.Int8AsymmetricCompressedTensorsLinear: INPUTS.index("compressed-tensors-asymmetric"),
}
# Of layers of caches. Not in them: copies would have rooms that are not theirs.
_ROOMS: weakref.WeakKeyDictionary[Any, Room] = weakref.WeakKeyDictionary()
# Functions of classes that are not called here, and that somebody may put others in the place of.
_FUNCTIONS = [(kind, "forward", kind.forward) for kind in (MLP, MergedLinear, RMSNorm, *_INPUTS)]
_FUNCTIONS += [(kind, "update", kind.update) for kind in (DynamicCache, DynamicLayer, DynamicSlidingWindowLayer)]


class _Unknown(Exception):
    """Something that the block operators do not compute."""


class Places:
    """Where what a half of a layer is made of stands, and what has to stay as it is for that.

    Tensors are looked up in each call, so that none is kept alive and none is stale.

    Attributes:
        is_known: whether a block operator computes it.
        style: of its norms.
        kinds: of its weights, each with what it multiplies behind it.
    """

    style: Style

    def __init__(self, layer: Any, first: str, last: str | None) -> None:
        self.settled: list[tuple[dict[str, Any], str, Any]] = []
        self.kinds: list[int] = []
        self.count = 0  # of parts
        self.tensors: list[tuple[int, dict[str, Any], str]] = []
        self.weights: list[tuple[int, dict[str, Any]]] = []
        try:
            self.look(layer, first, last)
            self.is_known = True
        except _Unknown:
            self.is_known = False

    def look(self, layer: Any, first: str, last: str | None) -> None:
        """Finds them, between norms of these names; :class:`_Unknown` at what no block operator computes."""
        raise NotImplementedError

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

    def parts(self) -> list[Any] | None:
        """What it is made of, now, in the order of `decoder_block.PARTS`; None where a weight is not packed."""
        parts: list[Any] = [None] * self.count
        for index, owner, name in self.tensors:
            if name not in owner:
                return None
            parts[index] = owner[name]
        for index, weight in self.weights:
            buffers = weight["_buffers"]
            parts[index] = buffers.get("packed")
            parts[index + 1] = buffers.get("scales")
            parts[index + 2] = buffers["zeros"]
            parts[index + 3] = buffers["perm"]
            if parts[index] is None:
                return None
        return parts

    def add(self, owner: dict[str, Any], name: str) -> None:
        self.tensors.append((self.count, owner, name))
        self.count += 1

    def add_norm(self, norm: Any, reader: Any = None) -> Style:
        """The weight of a norm that gives dense rows, or int8 as the linear that reads them would make of those."""
        if type(norm) is not RMSNorm:
            raise _Unknown
        rule = self.settle(norm.__dict__, "int8")
        if rule is not None and rule != rows_rule(reader):
            raise _Unknown
        own = norm.__dict__
        self.add(own["_parameters"], "weight")
        return Style(*(self.settle(own, name) for name in Style._fields))

    def add_linear(self, linear: Any) -> None:
        """packed, scales, zeros, perm, bias."""
        if type(linear) is MergedLinear:
            linear = self.settle(linear.__dict__["_modules"], "merged")
        if type(linear) not in _INPUTS or self.settle(linear.__dict__, "float32_output"):
            raise _Unknown
        own = linear.__dict__
        weight = self.settle(own["_modules"], "weight")
        self.settle(weight.__dict__, "_layout")  # another one where it is packed or unpacked
        if not weight.is_packed or weight.device.type != "cpu":
            raise _Unknown
        self.weights.append((self.count, weight.__dict__))
        self.count += 4
        self.add(own["_parameters"], "bias")
        self.kinds += (INT4_KINDS.index(self.settle(weight.__dict__, "kind")), _INPUTS[type(linear)])

    def add_norms(self, modules: dict[str, Any], first: str, last: str | None, reader: Any) -> None:
        """The norms before and, where there is one, after a half, and what they share. `reader`: of the first."""
        self.style = self.add_norm(self.settle(modules, first), reader)
        if last is None:
            self.count += 1
        elif self.add_norm(self.settle(modules, last)) != self.style:
            raise _Unknown


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
        # What is not known may come to be, where what was in the way goes.
        attention = AttentionHalf(layer, "input_layernorm", after[0])
        mlp = MlpHalf(layer, layer.before_mlp, after[1])
        self.all = attention, mlp
        self.attention = attention if attention.is_known else None
        self.mlp = mlp if mlp.is_known else None

    def hold(self) -> bool:
        """Whether what was found stands."""
        attention, mlp = self.all
        return attention.hold() and mlp.hold()


class MlpHalf(Places):
    """norm, gate and up, SiLU-mul, down, residual."""

    def look(self, layer: Any, first: str, last: str | None) -> None:
        modules = layer.__dict__["_modules"]
        mlp = self.settle(modules, "mlp")
        if type(mlp) is not MLP:
            raise _Unknown
        parts = mlp.__dict__["_modules"]
        # A function stands in the one, a module in the other.
        if self.settle(mlp.__dict__, "act") is not None or self.settle(parts, "act") is not None:
            raise _Unknown
        gate_up = self.settle(parts, "gate_up_proj")
        self.add_norms(modules, first, last, gate_up)
        self.add_linear(gate_up)
        self.mixed = bool(self.settle(mlp.__dict__, "activates_in_gemm"))
        self.add_linear(self.settle(parts, "down_proj"))

    def step(self, x: torch.Tensor) -> torch.Tensor | None:
        """x after this half; None where the chain has to do it."""
        parts = self.parts()
        if parts is None:
            return None
        gate_up, down = self.kinds[:2], self.kinds[2:]
        norms = (*parts[:2], *self.style)
        return torch.ops.qops.mlp_block.default(x, *norms, *parts[2:7], *gate_up, self.mixed, *parts[7:], *down)


class AttentionHalf(Places):
    """norm, q k v, their norms and rotation, the cache, attention, o, residual."""

    def look(self, layer: Any, first: str, last: str | None) -> None:
        from qops.models.decoder import Attention

        modules = layer.__dict__["_modules"]
        attention = self.settle(modules, "self_attn")
        if not isinstance(attention, Attention):
            raise _Unknown
        own = attention.__dict__
        parts = own["_modules"]
        qkv = self.settle(parts, "qkv_proj")
        self.add_norms(modules, first, last, qkv)
        self.add_linear(qkv)
        for name in ("q_norm", "k_norm"):
            if name not in parts:
                self.count += 1
            elif self.add_norm(self.settle(parts, name)) != self.style:
                raise _Unknown
        self.add_linear(self.settle(parts, "o_proj"))
        self.rotates = self.settle(own, "rotates")
        self.layer_idx = self.settle(own, "layer_idx")
        self.head_dim = self.settle(own, "head_dim")
        self.kv_heads = self.settle(own, "key_value_heads")
        scale = self.settle(own, "scaling")
        if scale is None or self.settle(own, "training"):  # of dropout
            raise _Unknown
        self.scale = float(scale)
        self.settle(own, "is_causal")
        self.is_causal = attention.is_causal
        extras = own["extras"]
        self.window = self.settle(extras, "sliding_window") or 0
        if self.settle(extras, "softcap") is not None:  # which Transformers' SDPA does not apply
            raise _Unknown

    def step(self, x: torch.Tensor, shared: Any, mask: Any, cache: Any) -> torch.Tensor | None:
        """x after this half, with its keys and values in the cache; None where the chain has to do it."""
        parts, growth = self.parts(), self.growth(x, mask, cache)
        if parts is None or growth is None:
            return None
        room, qkv, o = growth.room, self.kinds[:2], self.kinds[2:]
        y = torch.ops.qops.attention_block.default(
            x,
            *parts[:2],
            *self.style,
            *parts[2:7],
            *qkv,
            *parts[7:9],
            *((shared.cos, shared.sin, shared.positions) if self.rotates else (None, None, None)),
            room.keys,
            room.values,
            *parts[9:],
            *o,
            self.scale,
            mask,
            self.window if mask is None else 0,
            0.0,
            room.first_position,
        )
        growth.take(x)
        return y

    def growth(self, x: torch.Tensor, mask: Any, cache: Any) -> Growth | None:
        """Where the keys and values of x go; None where the chain has to put them there."""
        layer = layer_of(cache, self.layer_idx)
        if layer is None:
            return None
        room = room_for(layer, x, self.kv_heads, self.head_dim)
        if room is None or not decodes(x, room.keys, mask, self.is_causal):
            return None
        return Growth(layer, layer.keys, layer.values, room)


# Layers of a forward -------------------------------------------------------------------------------------------------


class Ahead(NamedTuple):
    """A layer that has not been called yet, and what it will give.

    Attributes:
        halves: that were computed.
        written: counts of writes to the cache of the layer since.
        changes: of attributes of modules since; there are 40 to look at in a layer, which are in no cache of the core.
    """

    layer: Any
    halves: Halves
    growth: Growth
    output: torch.Tensor
    written: int
    changes: int

    def is_what(self, layer: Any) -> bool:
        """Whether this layer would give it now."""
        growth = self.growth
        if self.layer is not layer or not growth.holds or growth.room.written != self.written:
            return False
        return self.changes == Noticed.changes or self.halves.hold()


class Run:
    """Layers of one forward, each called on what the one before has given.

    Weights that stream through a core's caches take Python's own data with them: around the operators of a layer it
    needs three times as long as where it runs alone. So the first layer of a run has one operator compute all layers
    that followed it in the two forwards before, and the others, when they are called, find what they give. Until then
    nothing of it shows: new keys and values lie behind the rows of the cache. A layer that is not called on just that,
    or with another cache, mask or tables, computes by itself, and so does one of which a module or the cache has
    changed meanwhile. What weights, mask and tables hold is read when the first layer is called; writes that torch does
    not count (through `.data`) are not seen.

    Attributes:
        is_ours: whether the classes of modules and caches do what block operators do in their place.
    """

    __slots__ = ("ahead", "cache", "followers", "is_ours", "mask", "output", "shared", "version")

    def __init__(self) -> None:
        self.is_ours = all(getattr(kind, name) is function for kind, name, function in _FUNCTIONS)
        self.followers: list[weakref.ref[Any]] = []
        self.ahead: list[Ahead] = []  # the next one last
        self.output: torch.Tensor | None = None
        self.version: int | None = None
        self.mask = self.cache = self.shared = None

    def next(self, layer: Any, x: torch.Tensor, shared: Any, mask: Any, cache: Any) -> torch.Tensor | None:
        """x after the layer that is called now, where it has been computed or is, with others, now."""
        is_next = x is self.output and mask is self.mask and cache is self.cache and shared is self.shared
        if is_next and _version(x) == self.version:
            self.followers.append(weakref.ref(layer))
            ahead = self.ahead.pop() if self.ahead else None
            if ahead is None or not ahead.is_what(layer):
                self.ahead.clear()
                return None
            ahead.growth.take(x)
            return ahead.output
        self.ahead.clear()
        self.mask, self.cache, self.shared = mask, cache, shared
        # A forward that ends early, by turns with whole ones, would compute what nobody asks for.
        expected = min(layer.followers, key=len)
        self.followers = []
        layer.__dict__["followers"] = (self.followers, layer.followers[0])
        if not expected or not self.is_ours:
            return None
        with _writes_counted():
            return self.lead([layer, *(reference() for reference in expected)], x, shared)

    def lead(self, layers: list[Any], x: torch.Tensor, shared: Any) -> torch.Tensor | None:
        """x after the first of some layers, all of which are computed; None where there are not two to compute."""
        found: list[tuple[Any, Halves, Growth]] = []
        caches: set[int] = set()
        weights: list[Any] = []
        settings: list[int] = []
        common: Any = None  # what layers of one call share
        for layer in layers:
            halves = None if layer is None else layer.known_halves()
            if halves is None or halves.attention is None or halves.mlp is None:
                break
            attention, mlp = halves.attention, halves.mlp
            common = common or (*attention.style, attention.scale)
            if (*attention.style, attention.scale) != common or mlp.style != attention.style:
                break
            first, last = attention.parts(), mlp.parts()
            growth = attention.growth(x, self.mask, self.cache)
            if first is None or last is None or growth is None or not growth.is_in_place:
                break
            # A layer that stands there twice appends twice.
            if id(growth.layer) in caches:
                break
            caches.add(id(growth.layer))
            weights += first
            weights += last
            window = attention.window if self.mask is None else 0
            numbers = (mlp.mixed, attention.rotates, window, growth.room.first_position)
            settings += (*attention.kinds, *mlp.kinds, *map(int, numbers))
            found.append((layer, halves, growth))
        if len(found) < 2:
            return None
        outputs = torch.ops.qops.decoder_layers.default(
            x,
            weights,
            settings,
            *common,
            shared.cos,
            shared.sin,
            shared.positions,
            [growth.room.keys for _, _, growth in found],
            [growth.room.values for _, _, growth in found],
            self.mask,
        ).unbind()
        # No views for others: those of no_grad cannot be written with gradients.
        pairs = zip(found, outputs, strict=True)
        self.ahead = [Ahead(*of, output.data, of[2].room.written, Noticed.changes) for of, output in pairs]
        self.ahead.reverse()
        first = self.ahead.pop()
        first.growth.take(x)
        return first.output

    def give(self, output: torch.Tensor) -> torch.Tensor:
        """Notes what a layer gives."""
        self.output, self.version = output, _version(output)
        return output


def _version(x: torch.Tensor) -> int | None:
    """Changes where x is written; None of a tensor of inference mode, of which nobody knows."""
    return None if x.is_inference() else x._version


@contextlib.contextmanager
def _writes_counted() -> Iterator[None]:
    """Tensors made within have a version, in inference mode too."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def may_step(x: torch.Tensor) -> bool:
    """Whether hidden states [B, T, H] are those of few tokens on a CPU, in eager mode and without autocast."""
    return (
        x.dim() == 3
        and x.device.type == "cpu"
        and not _layout.has_gpu_layout(x.device)
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


class Growth(NamedTuple):
    """Keys and values that a layer of a cache is to get.

    Attributes:
        layer: of the cache.
        keys, values: that it has.
        room: with the new ones.
    """

    layer: Any
    keys: torch.Tensor
    values: torch.Tensor
    room: Room

    @property
    def holds(self) -> bool:
        """Whether the layer is as it was."""
        return self.layer.keys is self.keys and self.layer.values is self.values

    @property
    def is_in_place(self) -> bool:
        """Whether the room is that of the keys and values that the layer has, and no copy of them."""
        return self.room.last[0] is self.keys

    def take(self, x: torch.Tensor) -> None:
        """Those of x [B, T, H] are there."""
        self.room.take(self.layer, x.shape[1])


class Room:
    """Keys and values [B, Hkv, room, D] of a layer of a cache, of which it shows rows begin ... end - 1.

    Whoever else has made views of its own, or copies, is noticed by the views that the layer had at last: where it has
    them still, the rows behind are free.
    """

    __slots__ = ("all_keys", "all_values", "begin", "end", "first_position", "keys", "last", "size", "values")

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, end: int) -> None:
        self.all_keys, self.all_values, self.begin, self.end = keys, values, 0, end
        self.size = keys.shape[2]
        self.last: tuple[Any, Any] = (None, None)
        self.keys = self.values = keys  # until open() makes views
        self.first_position = 0

    def has_room(self, layer: Any, tokens: int) -> bool:
        """Whether these rows are the layer's, and so many more fit behind them."""
        is_its = self.last[0] is layer.keys and self.last[1] is layer.values
        # A copy that was made in inference mode cannot be written outside.
        return is_its and self.end + tokens <= self.size and not self.all_keys.is_inference()

    @property
    def written(self) -> int:
        """Counts writes."""
        return self.all_keys._version + self.all_values._version

    def open(self, layer: Any, tokens: int) -> Room:
        """Makes views with room for new tokens, which are the layer's after :meth:`take`."""
        rows = self.end + tokens - self.begin
        self.keys = self.all_keys.narrow(2, self.begin, rows)
        self.values = self.all_values.narrow(2, self.begin, rows)
        if type(layer) is DynamicSlidingWindowLayer:
            # A cache that Transformers has reset holds rows of zeros, and counts from 0.
            self.first_position = max(0, layer.cumulative_length - (rows - tokens))
        return self

    def take(self, layer: Any, tokens: int) -> None:
        """The new tokens are there."""
        keys, values, begin, end = self.keys, self.values, self.begin, self.end + tokens
        if type(layer) is DynamicSlidingWindowLayer:
            layer.cumulative_length += tokens
            dropped = end - begin - (layer.sliding_window - 1)
            if dropped > 0:
                begin += dropped
                keys, values = keys.narrow(2, dropped, end - begin), values.narrow(2, dropped, end - begin)
        layer.keys, layer.values = keys, values
        # Last what says that all this belongs together: who is interrupted before has a layer without room.
        self.begin, self.end = begin, end
        _ROOMS[layer] = self
        self.last = keys, values


def layer_of(cache: Any, index: int) -> Any:
    """A layer of a cache of which it is known how it grows, with keys and values; None of another."""
    if type(cache) is not DynamicCache or cache.offloading or index >= len(cache.layers):
        return None
    layer: Any = cache.layers[index]
    if "update" in cache.__dict__ or "update" in layer.__dict__:
        return None
    known = type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and not layer.record_past)
    return layer if known and layer.is_initialized and layer.keys is not None and layer.keys.dim() == 4 else None


def room_for(layer: Any, x: torch.Tensor, kv_heads: int, head_dim: int) -> Room | None:
    """Room in a layer of a cache for the tokens of x [B, T, H]; None where what it holds does not fit to them."""
    tokens, held = x.shape[1], layer.keys
    if held.requires_grad or layer.values.requires_grad:
        return None
    room = _ROOMS.get(layer)
    if room is not None and room.has_room(layer, tokens):
        return room.open(layer, tokens)
    rows = held.shape[2]
    shape = (x.shape[0], kv_heads, rows, head_dim)
    fits = held.shape == shape and layer.values.shape == shape and held.dtype == layer.values.dtype == x.dtype
    if not fits or held.device != x.device:
        return None
    sizes = (x.shape[0], kv_heads, rows + tokens + max(_POSITIONS, rows // 2), head_dim)
    with _writes_counted():
        room = Room(x.new_empty(sizes), x.new_empty(sizes), rows)
        room.all_keys[:, :, :rows], room.all_values[:, :, :rows] = held, layer.values
    return room.open(layer, tokens)


def first_position(cache: Any, index: int, keys: torch.Tensor) -> int:
    """Of the first of the keys [B, Hkv, S, D] that a cache has given, new ones included."""
    layers = getattr(cache, "layers", None)
    if layers and type(layers[index]) is DynamicSlidingWindowLayer:
        return max(0, layers[index].cumulative_length - keys.shape[2])
    return 0
