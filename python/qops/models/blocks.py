"""Decoding steps of a fused layer by the block operators: two calls a layer instead of eight or more.

A chain of operators pays for a call and a parallel region each; at a few tokens that is more time than small models
need to read their weights. Where everything in a half of a layer is known, it is one operator:
:func:`qops.attention_block`, which also appends to the cache, and :func:`qops.mlp_block`; and where layers follow one
another, all of them are (:class:`Run`). Their bits are those of the chain.

Which modules a half has is found once and then watched: what somebody replaces is noticed at the next step. The cache
is Transformers' own (`qops.models.rooms`).

This module imports Transformers.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from qops import _layout, nn
from qops.models.rooms import STACKS, Growth, Stack, layer_of, room_for, writes_counted
from qops.nn import MLP, MergedLinear, RMSNorm
from qops.nn.hooks import newest_hook
from qops.nn.mlp import rows_rule
from qops.ops._checks import INT4_KINDS, MAX_DECODE_TOKENS
from qops.ops.decoder_block import INPUTS
from qops.weights.noticed import Entries, Noticed, tell_of_change

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
# Functions of classes that are not called here, and that somebody may put others in the place of.
_FUNCTIONS = [(kind, "forward", kind.forward) for kind in (MLP, MergedLinear, RMSNorm, *_INPUTS)]
# Tracers put theirs there.
_FUNCTIONS += [(torch.nn.Module, "__call__", torch.nn.Module._wrapped_call_impl)]
_FUNCTIONS += [(torch.nn.Module, "_call_impl", torch.nn.Module._call_impl)]
_FUNCTIONS += [(kind, "update", kind.update) for kind in (DynamicCache, DynamicLayer, DynamicSlidingWindowLayer)]
# Whose operators are torch's alone.
_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))
_PROXY = torch._C._TorchDispatchModeKey.PROXY  # of make_fx
# The attributes of a module that has no tensor, and where in them a half looks for one that it does not have.
_NOTHING: dict[str, Any] = {"_buffers": {}}
_NO_TENSOR = (_NOTHING, "_buffers", "", False)


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
    # A class whose forward has to be this function.
    function: tuple[Any, Any] | None = None

    def __init__(self, layer: Any, first: str, last: str | None) -> None:
        self.settled: list[tuple[dict[str, Any], str, Any]] = []
        self.entries: list[tuple[dict[str, Any], str, Any, type]] = []
        self.kinds: list[int] = []
        self.tensors: list[tuple[dict[str, Any], str, str, bool]] = []
        try:
            self.look(layer, first, last)
            self.is_known = True
        except _Unknown:
            self.is_known = False

    def look(self, layer: Any, first: str, last: str | None) -> None:
        """Finds them, between norms of these names; :class:`_Unknown` at what no block operator computes."""
        raise NotImplementedError

    def settle(self, module: Any, name: str) -> Any:
        """The attribute of a :class:`Noticed`, which has to stay."""
        value = module.__dict__.get(name)
        self.settled.append((module.__dict__, name, value))
        return value

    def entry(self, owner: dict[str, Any], name: str) -> Any:
        """What stands there, and has to; who puts something else there need not set an attribute."""
        value = owner.get(name)
        self.entries.append((owner, name, value, type(value)))
        return value

    def hold(self) -> bool:
        """Whether all that was settled stands."""
        for owner, name, value in self.settled:
            if owner.get(name) is not value:
                return False
        for owner, name, value, kind in self.entries:
            if owner.get(name) is not value or type(value) is not kind:
                return False
        return self.function is None or self.function[0].forward is self.function[1]

    def parts(self) -> list[Any] | None:
        """What it is made of, now, in the order of `decoder_block.PARTS`; None where a weight is not packed."""
        parts: list[Any] = []
        for module, kind, name, is_needed in self.tensors:
            parts.append(module[kind].get(name))
            if is_needed and parts[-1] is None:
                return None
        return parts

    def add_norm(self, norm: Any, reader: Any = None) -> Style:
        """The weight of a norm that gives dense rows, or int8 as the linear that reads them would make of those."""
        if type(norm) is not RMSNorm:
            raise _Unknown
        rule = self.settle(norm, "int8")
        if rule is not None and rule != rows_rule(reader):
            raise _Unknown
        self.tensors.append((norm.__dict__, "_parameters", "weight", True))
        return Style(*(self.settle(norm, name) for name in Style._fields))

    def add_linear(self, linear: Any) -> None:
        """packed, scales, zeros, perm, bias."""
        if type(linear) is MergedLinear:
            linear = self.entry(linear.__dict__["_modules"], "merged")
        if type(linear) not in _INPUTS or self.settle(linear, "float32_output"):
            raise _Unknown
        own = linear.__dict__
        weight = self.entry(own["_modules"], "weight")
        self.settle(weight, "_layout")  # another one where it is packed or unpacked
        if not weight.is_packed or weight.device.type != "cpu":
            raise _Unknown
        for name in ("packed", "scales", "zeros", "perm"):
            self.tensors.append((weight.__dict__, "_buffers", name, name in ("packed", "scales")))
        self.tensors.append((own, "_parameters", "bias", False))
        self.kinds += (INT4_KINDS.index(self.settle(weight, "kind")), _INPUTS[type(linear)])

    def add_norms(self, modules: dict[str, Any], first: str, last: str | None, reader: Any) -> None:
        """The norms before and, where there is one, after a half, and what they share. `reader`: of the first."""
        self.style = self.add_norm(self.entry(modules, first), reader)
        if last is None:
            self.tensors.append(_NO_TENSOR)
        elif self.add_norm(self.entry(modules, last)) != self.style:
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
        for module in layer.modules():
            if isinstance(module, Noticed):
                module._count_entries()
        after = ("post_attention_layernorm", "post_feedforward_layernorm") if layer.sandwich else (None, None)
        # What is not known may come to be, where what was in the way goes.
        attention = AttentionHalf(layer, "input_layernorm", after[0])
        mlp = MlpHalf(layer, layer.before_mlp, after[1])
        self.all = attention, mlp
        self.attention = attention if attention.is_known else None
        self.mlp = mlp if mlp.is_known else None
        self.owner = weakref.ref(layer)
        tell_of_change(self)

    def let_go(self) -> None:
        """The layer looks anew. Whoever works with this goes on: it may be another thread that changes a module."""
        if (layer := self.owner()) is not None and layer.__dict__["halves"] is self:
            layer.__dict__["halves"] = None

    def hold(self) -> bool:
        """Whether what was found stands."""
        attention, mlp = self.all
        return attention.hold() and mlp.hold()


class MlpHalf(Places):
    """norm, gate and up, SiLU-mul, down, residual."""

    def look(self, layer: Any, first: str, last: str | None) -> None:
        modules = layer.__dict__["_modules"]
        mlp = self.entry(modules, "mlp")
        if type(mlp) is not MLP:
            raise _Unknown
        parts = mlp.__dict__["_modules"]
        # A function stands in the one, a module in the other.
        if self.settle(mlp, "act") is not None or self.entry(parts, "act") is not None:
            raise _Unknown
        gate_up = self.entry(parts, "gate_up_proj")
        self.add_norms(modules, first, last, gate_up)
        self.add_linear(gate_up)
        self.mixed = bool(self.settle(mlp, "activates_in_gemm"))
        self.add_linear(self.entry(parts, "down_proj"))

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
        attention = self.entry(modules, "self_attn")
        if not isinstance(attention, Attention):
            raise _Unknown
        kind: Any = type(attention)
        self.function = kind, kind.forward
        if kind.forward is not kind.own_forward:
            raise _Unknown
        parts = attention.__dict__["_modules"]
        qkv = self.entry(parts, "qkv_proj")
        self.add_norms(modules, first, last, qkv)
        self.add_linear(qkv)
        for name in ("q_norm", "k_norm"):
            norm = self.entry(parts, name)
            if norm is None:
                self.tensors.append(_NO_TENSOR)
            elif self.add_norm(norm) != self.style:
                raise _Unknown
        self.add_linear(self.entry(parts, "o_proj"))
        self.rotates = self.settle(attention, "rotates")
        self.layer_idx = self.settle(attention, "layer_idx")
        self.head_dim = self.settle(attention, "head_dim")
        self.kv_heads = self.settle(attention, "key_value_heads")
        scale = self.settle(attention, "scaling")
        if scale is None or self.settle(attention, "training"):  # of dropout
            raise _Unknown
        self.scale = float(scale)
        self.settle(attention, "is_causal")
        self.is_causal = attention.is_causal
        extras = self.settle(attention, "extras")
        if self.entry(extras, "softcap") is not None:  # which Transformers' SDPA does not apply
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
            0,  # as Transformers' SDPA, for which windows are a matter of masks and caches
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


class Plan:
    """Layers in a row as `decoder_layers` takes them: where their parts stand, and what has to stay as it is.

    All that is settled as long as nobody sets an attribute or an entry of a module of ours. It keeps no layer alive.
    Tensors it does, but the first layer keeps it for as long only, and not when another one goes.

    Attributes:
        halves: of each layer that is known, up to the first that is not.
        common: what the layers of one call share.
        settings: of each layer, one after another.
        weights: of each layer, one after another.
        indices: of their layers of a cache.
        is_causal: where all are, or none is; else None.
        handle: what `decoder_layers` knows weights and settings by; None of a single layer.
        is_whole: whether all layers are known.
    """

    def __init__(self, layers: list[Any]) -> None:
        # Norms may be given other rules by a look, which is a change.
        layers = [layers[0], *(layer if layer is not None and layer.known_halves() else None for layer in layers[1:])]
        self.hook, self.changes = newest_hook(), Noticed.changes
        self.followers = [weakref.ref(layer) for layer in layers[1:] if layer is not None]
        self.halves: list[Halves] = []
        self.settings: list[int] = []
        self.weights: list[Any] = []
        self.common: Any = None
        self.extras: list[tuple[dict[str, Any], str, Any, type]] = []
        self.functions = {(type(layer), type(layer).forward) for layer in layers if layer is not None}
        for layer in layers:
            halves = None if layer is None else layer.known_halves()
            if halves is None or halves.attention is None or halves.mlp is None:
                break
            attention, mlp = halves.attention, halves.mlp
            self.common = self.common or (*attention.style, attention.scale)
            if (*attention.style, attention.scale) != self.common or mlp.style != attention.style:
                break
            weights = attention.parts(), mlp.parts()
            # A class of its own may do something else in the place of our operators, and is not seen in lists.
            if (
                weights[0] is None
                or weights[1] is None
                or any(type(t) not in _PLAIN for t in (*weights[0], *weights[1]))
            ):
                break
            self.halves.append(halves)
            numbers = (mlp.mixed, attention.rotates, 0, 0, attention.layer_idx)
            self.settings += (*attention.kinds, *mlp.kinds, *map(int, numbers))
            self.weights += weights[0] + weights[1]
            self.functions.add(attention.function)
            self.extras += [entry for entry in attention.entries if type(entry[0]) is not Entries]
        self.is_whole = len(self.halves) == len(layers)
        self.indices = tuple(halves.all[0].layer_idx for halves in self.halves)
        causal = {halves.all[0].is_causal for halves in self.halves}
        self.is_causal = causal.pop() if len(causal) == 1 else None
        self.handle: Any = None
        if len(self.halves) > 1:
            self.handle = torch.ops.qops.decoder_plan.default(self.weights, self.settings, *self.common)
        own, self.owner = weakref.ref(self), weakref.ref(layers[0])

        def forget(_: Any) -> None:
            if (plan := own()) is not None:
                plan.let_go()

        self.watches = [weakref.ref(layer, forget) for layer in layers[1:] if layer is not None]
        tell_of_change(self)

    def let_go(self) -> None:
        """The first layer does not keep it any more. Whoever works with it goes on."""
        if (layer := self.owner()) is not None and layer.__dict__["plan"] is self:
            layer.__dict__["plan"] = None

    def holds(self, followers: list[weakref.ref[Any]]) -> bool:
        """Whether it is of these layers behind the first, and they are as they were."""
        if self.followers != followers or self.hook != newest_hook() or self.changes != Noticed.changes:
            return False
        if any(kind.forward is not function for kind, function in self.functions):
            return False
        return all(owner.get(name) is value for owner, name, value, _ in self.extras)

    def growths(self, x: torch.Tensor, mask: Any, cache: Any) -> list[Growth]:
        """Where the keys and values of x go, up to the first layer for which the chain has to put them there."""
        if not self.halves:
            return []
        stack = STACKS.get(cache) if type(cache) is DynamicCache else None
        if stack is not None and (found := stack.growths(self.indices, cache, x.shape[1])) is not None:
            return found if decodes(x, found[0].room.keys, mask, bool(self.is_causal)) else []
        growths: list[Growth] = []
        caches: set[int] = set()
        for halves in self.halves:
            growth = halves.all[0].growth(x, mask, cache)
            # A layer that stands there twice appends twice.
            if growth is None or not growth.is_in_place or id(growth.layer) in caches:
                break
            caches.add(id(growth.layer))
            growths.append(growth)
        if self.is_causal is not None and len(growths) == len(self.halves):
            stack = Stack.of_growths(self.indices, growths)
            if stack is not None:
                STACKS[cache] = stack
        return growths

    def outputs(self, x: torch.Tensor, growths: list[Growth], shared: Any, mask: Any) -> list[torch.Tensor]:
        """x after each of the layers whose caches grow so, with the new keys and values in their rooms."""
        tables = shared.cos, shared.sin, shared.positions
        caches = [growth.room.keys for growth in growths], [growth.room.values for growth in growths]
        first_positions = [growth.room.first_position for growth in growths]
        return torch.ops.qops.decoder_layers.planned(x, self.handle, *tables, *caches, first_positions, mask)


class Ahead(NamedTuple):
    """A layer that has not been called yet, and what it will give.

    Attributes:
        halves: that were computed.
        written: counts of writes to the cache of the layer since.
    """

    layer: weakref.ref[Any]
    halves: Halves
    growth: Growth
    output: torch.Tensor
    written: int


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
        changes, hook: of attributes of modules, and the newest one, when layers were computed.
        tokens: of each sequence, that they were computed for.
    """

    __slots__ = (
        *("ahead", "cache", "changes", "followers", "hook", "is_ours"),
        *("mask", "output", "shared", "tokens", "version"),
    )

    def __init__(self) -> None:
        self.is_ours = all(getattr(kind, name) is function for kind, name, function in _FUNCTIONS)
        self.followers: list[weakref.ref[Any]] = []
        self.ahead: list[Ahead] = []  # the next one last
        self.output: torch.Tensor | None = None
        self.version: int | None = None
        self.changes = self.hook = self.tokens = 0
        self.mask = self.cache = self.shared = None

    def is_next(self, x: torch.Tensor, shared: Any, mask: Any, cache: Any) -> bool:
        """Whether a layer is called on just what the one before has given, and with the same."""
        same = x is self.output and mask is self.mask and cache is self.cache and shared is self.shared
        # Of a tensor of inference mode nobody knows whether it was written.
        return same and (self.version is None or x._version == self.version)

    def take(self, layer: Any, x: torch.Tensor, shared: Any, mask: Any, cache: Any) -> torch.Tensor | None:
        """x after a layer that was computed ahead of this call, where nothing at all has changed since."""
        if self.changes != Noticed.changes or self.hook != newest_hook() or not self.is_next(x, shared, mask, cache):
            return None
        output = self._taken(layer)
        return None if output is None else self.give(output)

    def next(self, layer: Any, x: torch.Tensor, shared: Any, mask: Any, cache: Any) -> torch.Tensor | None:
        """x after the layer that is called now, where it has been computed or is, with others, now."""
        if self.is_next(x, shared, mask, cache):
            if self.ahead and (self.changes == Noticed.changes or self.ahead[-1].halves.hold()):
                output = self._taken(layer)
                if output is not None:
                    return output
            self.ahead.clear()
            self.followers.append(weakref.ref(layer))
            return None
        self.ahead.clear()
        self.mask, self.cache, self.shared = mask, cache, shared
        # A forward that ends early, by turns with whole ones, would compute what nobody asks for.
        expected = min(layer.followers, key=len)
        self.followers = []
        layer.__dict__["followers"] = (self.followers, layer.followers[0])
        if not expected or not self.is_ours:
            return None
        with writes_counted():
            return self.lead(layer, expected, x, shared)

    def _taken(self, layer: Any) -> torch.Tensor | None:
        """What the next layer gives, which now has been called; None where this is another, or its cache is."""
        of, _, growth, output, written = self.ahead[-1]
        if of() is not layer or not growth.holds or growth.room.written != written:
            return None
        self.ahead.pop()
        self.followers.append(of)
        growth.room.take(growth.layer, self.tokens)
        return output

    def lead(self, layer: Any, expected: list[weakref.ref[Any]], x: torch.Tensor, shared: Any) -> torch.Tensor | None:
        """x after a layer that is computed with those expected; None where there are not two to compute."""
        plan = layer.plan
        if plan is None or not plan.holds(expected):
            plan = Plan([layer, *(reference() for reference in expected)])
            layer.__dict__["plan"] = plan if plan.is_whole else None
        growths = plan.growths(x, self.mask, self.cache)
        if len(growths) < 2:
            return None
        outputs = plan.outputs(x, growths, shared, self.mask)
        self.changes, self.hook, self.tokens = plan.changes, plan.hook, x.shape[1]
        rows = zip([weakref.ref(layer), *plan.followers], plan.halves, growths, outputs, strict=False)
        self.ahead = [Ahead(of, halves, growth, y, growth.room.written) for of, halves, growth, y in rows]
        self.ahead.reverse()
        first = self.ahead.pop()
        first.growth.take(x)
        return first.output

    def give(self, output: torch.Tensor) -> torch.Tensor:
        """Notes what a layer gives."""
        self.output, self.version = output, None if output.is_inference() else output._version
        return output


def may_step(x: torch.Tensor) -> bool:
    """Whether hidden states [B, T, H] are those of few tokens on a CPU, in eager mode and without autocast."""
    return (
        x.dim() == 3
        and x.device.type == "cpu"
        and not _layout.has_gpu_layout(x.device)
        and not torch.compiler.is_compiling()
        and 1 <= x.shape[1] <= MAX_DECODE_TOKENS
        and x.stride(2) == 1
        and not torch.is_autocast_enabled("cpu")
        # Neither tangents, tracers and transforms, nor tensors of a class of their own, see what block operators do.
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
        and torch._C._get_dispatch_mode(_PROXY) is None
        and _functorch.peek_interpreter_stack() is None
        and type(x) in _PLAIN
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
