"""Decoder layers of Transformers models whose linears, norms, rotary and SiLU-mul run on qops operators.

The surrounding `...ForCausalLM` and `...Model` stay Transformers' own, and so do caches, masks and `generate`.
Inside a layer no residual addition is a pass of its own where quantised linears stand at the end of attention and of
the MLP: they add it before they store. Other linears there, and norms after them, hand a pair (delta, residual) to the
norm that follows, an `add_rms_norm`. By the contracts of the operators the bits are those of the unfused chain.
Layers take and return plain hidden states.

In a layer of `Int8Linear`s the norms emit 8-bit activations with their scales, by the one rule of the linears that read
them (`rows_rule`). Attention and the product of gate and up, which stores the one vector that SiLU-mul makes of both,
leave the quantisation of a token to a pass of its own.

Attention, MLP and the residual stream around both are fused each where it is known (`known_parts`): the others stay
Transformers' own, an MLP of experts in a fused layer, or a fused attention in a layer that scales its residuals.

How Transformers calls layers changes from release to release. What the installed one does is read from the signatures
of what is replaced: a keyword that they name is implemented here, or that part is not fused; every other keyword goes
on to the cache and to the attention function, as theirs do.

This module imports Transformers; `qops.nn` holds the parts that do not need it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qops.models.blocks import Halves, Plan, decodes
from qops.models.rooms import first_position
from qops.models.rotary_tables import Shared, shared_of
from qops.nn import MLP, MergedLinear, MergingModule, RMSNorm
from qops.nn.hooks import is_watched, newest_hook
from qops.nn.linears import into_stream
from qops.nn.mlp import is_silu, rows_rule
from qops.nn.offload import Offloadable
from qops.ops import decode_attention, qk_norm_rotary_, rotary, rotary_
from qops.weights.noticed import Noticed

# A module for each name below a layer, in Transformers' terms ("self_attn.q_proj", "input_layernorm").
Part = Callable[[str], Any]


class Architecture(NamedTuple):
    """A family of models of whose layers this module knows at least a part, by the names of their classes.

    Attributes:
        prefix: of Transformers' class names.
        qkv: the linears that make q, k and v; one that makes all three, side by side.
        gate_up: the linears that make gate and up, likewise.
        has_known_attention: whether attention is that of Llama, but for what follows.
        has_known_stream: whether the layer adds what attention and MLP give to its input, as it is or normed.
        softcap: whether attention caps its logits (`attn_logit_softcapping`).
        heads_first: whether its norms of q and k see [B, H, T, D] instead of [B, T, H, D].
        window_in_config: whether attention reads its sliding window from the config, instead of keeping it.
    """

    prefix: str
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    has_known_attention: bool = True
    has_known_stream: bool = True
    softcap: bool = False
    heads_first: bool = False
    window_in_config: bool = False


# By the name of Transformers' module. SmolLM and SmolLM2 are "llama", Qwen2.5 is "qwen2".
ARCHITECTURES = {
    "gemma": Architecture("Gemma"),
    "gemma2": Architecture("Gemma2", softcap=True),
    "gemma3": Architecture("Gemma3", heads_first=True),
    "granite": Architecture("Granite", has_known_stream=False),
    "llama": Architecture("Llama"),
    "mistral": Architecture("Mistral", window_in_config=True),
    "mixtral": Architecture("Mixtral", window_in_config=True),
    "olmo2": Architecture("Olmo2", has_known_attention=False, has_known_stream=False),
    "phi3": Architecture("Phi3", ("qkv_proj",), ("gate_up_proj",), window_in_config=True),
    "qwen2": Architecture("Qwen2"),
    "qwen3": Architecture("Qwen3"),
    "qwen3_moe": Architecture("Qwen3Moe"),
    "smollm3": Architecture("SmolLM3"),
}

# What is implemented here, beside the cache, of what these layers name in their signatures.
_LAYER_KEYWORDS = frozenset(("hidden_states", "attention_mask", "position_ids", "use_cache", "position_embeddings"))
_ATTENTION_KEYWORDS = frozenset(("hidden_states", "attention_mask", "position_embeddings"))
# Transformers 5.24 renamed the cache. No aliases: before, `cache` was a paged one on its way to the attention function.
_CACHE_KEYWORDS = ("cache", "past_key_values")
# Keywords that scaled dot product attention does not read.
_NOT_READ_BY_SDPA = frozenset(("position_ids", "use_cache", "output_hidden_states"))


class Known(NamedTuple):
    """Which parts of a model's layers are known.

    Attributes:
        architecture: theirs; None where nothing is known.
        attention: of all layers, as they share their tables of positions.
        mlps: of each layer.
        stream: of all layers.
        own: why the other parts are Transformers' own, by "attention", "mlp" and "stream".
    """

    architecture: Architecture | None
    attention: bool
    mlps: tuple[bool, ...]
    stream: bool
    own: dict[str, str]

    @property
    def why_nothing(self) -> str | None:
        """Why no part is known; None where one is."""
        return None if self.attention or self.stream or any(self.mlps) else next(iter(self.own.values()))

    @property
    def mixes_in_place(self) -> bool:
        """Whether a fused MLP mixes the strips of a weight that it was given, and not of one that it has merged."""
        return self.architecture is not None and len(self.architecture.gate_up) == 1

    def names(self, layer: Any, index: int) -> list[str]:
        """The names in a layer of Transformers of what its fused parts ask for."""
        assert self.architecture is not None
        found: list[str] = []
        if self.stream:
            found += [name for name, _ in layer.named_children() if name.endswith("layernorm")]
        if self.attention:
            children = [name for name, _ in layer.self_attn.named_children() if name.endswith(("_proj", "_norm"))]
            found += [f"self_attn.{name}" for name in children]
        if self.mlps[index]:
            found += [f"mlp.{name}" for name, _ in layer.mlp.named_children() if name.endswith("_proj")]
        return found


def known_parts(model: Any) -> Known:
    """What is known of the layers of a dense model, by its class and theirs, and by how these are called."""
    causal, architecture = type(model), None
    for module, row in ARCHITECTURES.items():
        if causal.__module__ == _modeling(module) and causal.__name__ == f"{row.prefix}ForCausalLM":
            architecture = row
    layers = [] if architecture is None else list(model.model.layers)
    if architecture is None or not layers:
        why = "has no layers" if architecture else "is not an architecture whose layers qops knows"
        return Known(None, False, (), False, {"stream": f"{causal.__name__} {why}"})
    prefix = architecture.prefix
    # Children alone: a wrapper may hand attributes on.
    attentions, blocks = ([layer._modules.get(name) for layer in layers] for name in ("self_attn", "mlp"))
    reasons = {
        "attention": _unknown_class(attentions, f"{prefix}Attention", architecture.has_known_attention)
        or _unknown_call(type(attentions[0]), _ATTENTION_KEYWORDS),
        "mlp": _unknown_class(blocks, f"{prefix}MLP"),
        "stream": _unknown_class(layers, f"{prefix}DecoderLayer", architecture.has_known_stream)
        or _unknown_call(type(layers[0]), _LAYER_KEYWORDS)
        or _unknown_child(layers),
    }
    own = {part: reason for part, reason in reasons.items() if reason is not None}
    mlps = tuple(_unknown_class([block], f"{prefix}MLP") is None for block in blocks)
    return Known(architecture, "attention" not in own, mlps, "stream" not in own, own)


def _unknown_class(modules: list[Any], wanted: str, is_known: bool = True) -> str | None:
    for found in map(type, modules):
        if found.__name__ != wanted:
            return f"{found.__name__} is not {wanted}"
        if not found.__module__.startswith("transformers."):
            return f"{found.__module__}.{found.__name__} is not Transformers' own"
    return None if is_known else f"{wanted} works in a way that qops does not know"


def _unknown_child(layers: list[Any]) -> str | None:
    """What a layer has beside attention, MLP and norms, and that may do something."""
    for layer in layers:
        for name, child in layer.named_children():
            idle = isinstance(child, nn.Dropout) and child.p == 0
            if name not in ("self_attn", "mlp") and not name.endswith("layernorm") and not idle:
                return f"{type(layer).__name__} has a part {name} that qops does not know"
    return None


def _unknown_call(original: type, known: frozenset[str]) -> str | None:
    """What stands in the way of being called as `original.forward` is."""
    parameters = inspect.signature(original.forward).parameters  # type: ignore[attr-defined]
    cache = cache_keyword(original)
    if cache is None:
        return f"{original.__name__}.forward takes neither {' nor '.join(_CACHE_KEYWORDS)}"
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return f"{original.__name__}.forward takes no further keywords"
    unknown = [name for name in _named(original) if name not in known and name != cache]
    if unknown:
        return f"{original.__name__}.forward takes {', '.join(unknown)}, which qops does not know"
    return None


@functools.cache
def _named(original: type) -> tuple[str, ...]:
    """The named parameters of its forward in order, without self. Deprecation wrappers are looked through."""
    parameters = list(inspect.signature(original.forward).parameters.values())[1:]  # type: ignore[attr-defined]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind not in variadic)


@functools.cache
def cache_keyword(original: type) -> str | None:
    """The name under which the forward of one of Transformers' classes takes a cache."""
    return next((name for name in _CACHE_KEYWORDS if name in _named(original)), None)


def _modeling(module: str) -> str:
    return f"transformers.models.{module}.modeling_{module}"


def _architecture_of(module: Any) -> Architecture:
    return ARCHITECTURES[type(module).__module__.rpartition("modeling_")[2]]


class Attention(MergingModule):
    """Attention with q, k and v as one GEMM, and head norms and rotary in place on its output [B, T, H, D].

    Args:
        original: Transformers' module; everything but its submodules is taken over.
        part: gives the linears and norms by their names in the layer.
    """

    config: Any
    layer_idx: int
    head_dim: int
    num_key_value_groups: int
    scaling: float
    attention_dropout: float
    is_causal: bool = True

    def __init__(self, original: Any, part: Part):
        nn.Module.__init__(self)
        self._count_entries()
        self.__dict__.update({name: value for name, value in vars(original).items() if not name.startswith("_")})
        self.parameter_names = _named(type(original))
        keyword = cache_keyword(type(original))
        assert keyword is not None, "known_parts was not asked"
        self.cache_keyword = keyword
        self.heads = self.config.num_attention_heads
        self.key_value_heads = self.config.num_key_value_heads
        architecture = _architecture_of(original)
        qkv = {name: part(f"self_attn.{name}") for name in architecture.qkv}
        self.qkv_proj = MergedLinear(qkv) if len(qkv) > 1 else qkv["qkv_proj"]
        self.o_proj = part("self_attn.o_proj")
        if hasattr(original, "q_norm"):
            self.q_norm, self.k_norm = part("self_attn.q_norm"), part("self_attn.k_norm")
        self.modeling = type(original).__module__
        self.extras: dict[str, Any] = {}
        if hasattr(original, "sliding_window"):
            self.extras["sliding_window"] = original.sliding_window
        elif architecture.window_in_config:
            self.extras["sliding_window"] = getattr(self.config, "sliding_window", None)
        if architecture.softcap:
            self.extras["softcap"] = original.attn_logit_softcapping
        self.heads_first = architecture.heads_first
        # SmolLM3 leaves some layers without positions.
        self.rotates = getattr(original, "use_rope", True)
        self._be_hooked()

    def forward(
        self, hidden_states: Any, *args: Any, residual: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, torch.Tensor | None]:
        """Transformers' arguments, and with a residual its sum with the output, or (output, residual)."""
        _by_name(self, args, kwargs)
        shared = shared_of(self, kwargs.pop("position_embeddings", None))
        attention_mask = kwargs.pop("attention_mask", None)
        cache = kwargs.pop(self.cache_keyword, None)
        qkv = self.qkv_proj(hidden_states)
        batch, tokens, _ = qkv.shape
        qkv = qkv.view(batch, tokens, -1, self.head_dim)
        query, key, value = qkv.split([self.heads, self.key_value_heads, self.key_value_heads], dim=2)
        query, key = self._position(query, key, shared)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            if self.cache_keyword == "cache":
                # A paged cache takes what it needs from the keywords, and leaves there what the attention needs.
                key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
            else:
                key, value = cache.update(key, value, self.layer_idx)
        is_plain = shared.is_sdpa and not self.training and _NOT_READ_BY_SDPA.issuperset(kwargs)
        is_plain = is_plain and self.extras.get("softcap") is None
        if is_plain and shared.decodes and decodes(query, key, attention_mask, self.is_causal):
            output = decode_attention(
                query,
                key,
                value,
                self.scaling,
                mask=attention_mask,  # windows are a matter of masks and caches, as for Transformers' SDPA
                first_position=first_position(cache, self.layer_idx, key),
            )
            return into_stream(self.o_proj, output.view(batch, tokens, -1), residual), None
        if is_plain and tokens == 1 and (attention_mask is None or attention_mask.shape[1] == 1):
            # The query heads of one key/value head take the place of tokens, so keys and values are never expanded:
            # 12 us against 42 us (expanded) and 17 us (enable_gqa) at 9/3 heads, 64 positions, bf16, 2 cores.
            packed = query.reshape(batch, self.key_value_heads, self.num_key_value_groups, self.head_dim)
            output = F.scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, scale=self.scaling)
            return into_stream(self.o_proj, output.reshape(batch, 1, -1), residual), None

        # Looked up in each call, as Transformers does: others put theirs in its place.
        eager = sys.modules[self.modeling].eager_attention_forward
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(shared.attention, eager)
        output, weights = attend(
            self,
            query.transpose(1, 2),
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **self.extras,
            **kwargs,
        )
        return into_stream(self.o_proj, output.reshape(batch, tokens, -1), residual), weights

    def _position(self, query: torch.Tensor, key: torch.Tensor, shared: Shared) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k with heads normed where the architecture does so, and rotated: in place unless a norm is watched."""
        q, k = self._modules.get("q_norm"), self._modules.get("k_norm")
        if isinstance(q, RMSNorm) and isinstance(k, RMSNorm) and not (is_watched(q) or is_watched(k)):
            qk_norm_rotary_(
                query,
                key,
                q.weight,
                k.weight,
                shared.cos,
                shared.sin,
                q.eps,
                positions=shared.positions,
                weight_offset=q.weight_offset,
                rounding=q.rounding,
            )
            return query, key
        if q is not None and k is not None:
            # What a hook has seen must not turn under its hands.
            query, key = self._normed(q, query), self._normed(k, key)
            return rotary(query, key, shared.cos, shared.sin, positions=shared.positions)
        if self.rotates:
            rotary_(query, key, shared.cos, shared.sin, positions=shared.positions)
        return query, key

    def _normed(self, norm: nn.Module, heads: torch.Tensor) -> torch.Tensor:
        """By a call of the module, in the shape in which Transformers calls it."""
        return norm(heads.transpose(1, 2)).transpose(1, 2) if self.heads_first else norm(heads)


def fused_attention(original: Any, part: Part) -> Attention:
    """In the place of Transformers' own."""
    return fused_class(Attention, type(original))(original, part)


def fused_mlp(original: Any, part: Part) -> MLP:
    """In the place of Transformers' own."""
    linears = [part(f"mlp.{name}") for name in (*_architecture_of(original).gate_up, "down_proj")]
    act = getattr(original, "act_fn", None) or original.activation_fn
    make: Any = MLP if len(linears) == 3 else MLP.of_merged
    return make(*linears, None if is_silu(act) else act)


_is_compiling = torch.compiler.is_compiling


def fuse(layer: Any, part: Part, known: Known, index: int) -> Any:
    """A layer with the parts fused that are known, and the others as they are.

    Args:
        layer: Transformers' own, in which attention and MLP are replaced.
        part: gives the linears and norms of the fused parts; each is asked for once.
        index: of the layer.
    """
    if known.attention:
        layer.self_attn = fused_attention(layer.self_attn, part)
    if known.mlps[index]:
        layer.mlp = fused_mlp(layer.mlp, part)
    return fused_class(DecoderLayer, type(layer))(layer, part) if known.stream else layer


class DecoderLayer(Offloadable):
    """A decoder layer in as few passes over memory as its parts allow; see the module docstring.

    Two norms (Llama) stand before attention and before the MLP. With four (Gemma 2 and 3) the output of each is normed
    too, before it is added.

    While a part of the layer has hooks, or is offloaded, all parts are called one after the other as Transformers calls
    them, so that a hook sees what it would see there. The bits are the same.

    Args:
        original: Transformers' layer, whose attention and MLP are fused where they can be.
        part: gives the layer's norms; each is asked for once.
    """

    input_layernorm: RMSNorm
    post_attention_layernorm: RMSNorm
    pre_feedforward_layernorm: RMSNorm
    post_feedforward_layernorm: RMSNorm

    def __init__(self, original: Any, part: Part):
        nn.Module.__init__(self)
        self._count_entries()
        self.parameter_names = _named(type(original))
        self.sandwich = hasattr(original, "pre_feedforward_layernorm")
        self.self_attn = original.self_attn
        self.mlp = original.mlp
        for name, _ in original.named_children():
            if name.endswith("layernorm"):
                setattr(self, name, part(name))
        self.before_mlp = "pre_feedforward_layernorm" if self.sandwich else "post_attention_layernorm"
        self.cache_keyword = cache_keyword(type(original)) or ""
        self.step_keywords = _NOT_READ_BY_SDPA | {"position_embeddings", "attention_mask", self.cache_keyword}
        self.halves: Halves | None = None
        # Layers that were called one after the other behind this one, the last time and the time before.
        self.followers: tuple[list[weakref.ref[Any]], list[weakref.ref[Any]]] = ([], [])
        self.plan: Plan | None = None
        # The rules that its norms were given, and what the layer looked at then.
        self.rules: dict[str, tuple[int, str | None]] = {}
        self.looked, self.watched = (-1, -1), False
        self._is_watched_within()
        self._be_hooked()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What was computed ahead of this call, without all that torch does around a forward; else as any module."""
        shared = kwargs.get("position_embeddings")
        if not _is_compiling() and type(shared) is Shared and shared.run.ahead and len(args) == 1:
            own = self.__dict__
            is_seen = own["_forward_hooks"] or own["_forward_pre_hooks"]  # those that record do not count as watching
            if not is_seen and own["step_keywords"].issuperset(kwargs):
                mask, cache = kwargs.get("attention_mask"), kwargs.get(own["cache_keyword"])
                if (output := shared.run.take(self, args[0], shared, mask, cache)) is not None:
                    return output
        return super().__call__(*args, **kwargs)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Transformers' arguments and result."""
        _by_name(self, args, kwargs)
        if self._is_watched_within():
            return self._one_after_the_other(hidden_states, kwargs)
        shared = kwargs.get("position_embeddings")
        if not isinstance(shared, Shared) or not shared.decodes or self.training:
            return self._mlp_half(self._attention_half(hidden_states, kwargs))
        mask, cache = kwargs.get("attention_mask"), kwargs.get(self.cache_keyword)
        is_step = self.step_keywords.issuperset(kwargs)
        if not is_step:  # what follows is called on what no layer of the run has given
            return self._step(hidden_states, shared, kwargs, is_step)
        output = shared.run.next(self, hidden_states, shared, mask, cache)
        if output is None:
            output = self._step(hidden_states, shared, kwargs, is_step)
        return shared.run.give(output)

    def _step(self, hidden_states: torch.Tensor, shared: Shared, kwargs: dict[str, Any], is_step: bool) -> torch.Tensor:
        """By block operators, where they compute a half of the layer."""
        halves, attended = self._known_halves() if shared.run.is_ours else None, None
        if halves is not None and halves.attention is not None and is_step:
            cache = kwargs.get(self.cache_keyword)
            attended = halves.attention.step(hidden_states, shared, kwargs.get("attention_mask"), cache)
        if attended is None:
            attended = self._attention_half(hidden_states, kwargs)
        if halves is not None and halves.mlp is not None:
            x = attended[1] + attended[0] if isinstance(attended, tuple) else attended
            if (output := halves.mlp.step(x)) is not None:
                return output
        return self._mlp_half(attended)

    def known_halves(self) -> Halves | None:
        """What block operators compute of this layer without a call; None where somebody watches."""
        kind: Any = type(self)
        if self._is_watched_within() or self.training or is_watched(self) or kind.forward is not kind.own_forward:
            return None
        return self._known_halves()

    def _known_halves(self) -> Halves:
        """What block operators compute of this layer, looked for anew where something has been replaced."""
        halves = self.halves
        if halves is None or not halves.hold():
            halves = self.__dict__["halves"] = Halves(self)
        return halves

    def _attention_half(self, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        """The sum with hidden_states, or (delta, hidden_states) of it."""
        x = self.input_layernorm(hidden_states)
        if self.sandwich:
            return self.post_attention_layernorm(self.self_attn(x, **kwargs)[0]), hidden_states
        if isinstance(self.self_attn, Attention):
            return self.self_attn(x, residual=hidden_states, **kwargs)[0]
        return self.self_attn(x, **kwargs)[0], hidden_states

    def _mlp_half(self, attended: Any) -> torch.Tensor:
        norm = getattr(self, self.before_mlp)
        x, residual = norm.add(*attended) if isinstance(attended, tuple) else (norm(attended), attended)
        if self.sandwich:
            return residual + self.post_feedforward_layernorm(self.mlp(x))
        output = self.mlp(x, residual) if isinstance(self.mlp, MLP) else (self.mlp(x), residual)
        return output[1] + output[0] if isinstance(output, tuple) else output

    def __getstate__(self) -> dict[str, Any]:
        """Copies look for what they have themselves."""
        mine = {"halves": None, "followers": ([], []), "plan": None, "looked": (-1, -1), "rules": {}}
        return {**self.__dict__, **mine}

    def _one_after_the_other(self, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        if self.sandwich:
            attended = self.post_attention_layernorm(attended)
        hidden_states = hidden_states + attended
        output = self.mlp(getattr(self, self.before_mlp)(hidden_states))
        if self.sandwich:
            output = self.post_feedforward_layernorm(output)
        return hidden_states + output

    def _is_watched_within(self) -> bool:
        """Whether a hook watches a part: then norms emit no 8-bit activations."""
        if _is_compiling():
            return self._look()
        own = self.__dict__
        # Every hook of the process has a number and every change of a module counts, so 20 modules are spared the look;
        # but a hook that goes leaves no trace.
        if own["watched"] or own["looked"] != (newest_hook(), Noticed.changes):
            own["watched"] = self._look()
            own["looked"] = newest_hook(), Noticed.changes
        return own["watched"]

    def _look(self) -> bool:
        watched = any(is_watched(module) for module in self.modules() if module is not self)
        after_input = self.self_attn.qkv_proj if isinstance(self.self_attn, Attention) else None
        after_attention = self.mlp.gate_up_proj if isinstance(self.mlp, MLP) else None
        for name, reader in (("input_layernorm", after_input), (self.before_mlp, after_attention)):
            norm, rule = getattr(self, name), None if watched else rows_rule(reader)
            if not isinstance(norm, RMSNorm):
                continue
            # What somebody has set stays, until something else is to be read or given.
            if _is_compiling() or self.rules.get(name) != (id(norm), rule):
                norm.int8 = rule
            if not _is_compiling():
                self.rules[name] = id(norm), rule
        return watched


def _by_name(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Adds positional arguments after hidden_states to the keywords, under the names that Transformers gives them."""
    if args:
        names = module.parameter_names[1 : 1 + len(args)]
        twice = [name for name in names if name in kwargs]
        if len(names) < len(args) or twice:
            problem = f"got {', '.join(twice)} twice" if twice else f"takes {module.parameter_names}, got more"
            raise TypeError(f"{type(module).__name__}.forward: {problem}")
        kwargs.update(zip(names, args, strict=True))
    if "past_key_values" in kwargs and "cache" in module.parameter_names:
        # As Transformers' own wrappers do.
        warnings.warn(
            f"`past_key_values` is deprecated for `{type(module).__name__}.forward`. Use `cache` instead.",
            FutureWarning,
            stacklevel=3,
        )
        kwargs.setdefault("cache", kwargs.pop("past_key_values"))


@functools.cache
def fused_class(base: type, original: type) -> Any:
    """`base` as a subclass of Transformers' class, by which Transformers finds layers to record and to checkpoint."""
    fused: Any = type(f"Fused{original.__name__}", (base, original), {"__doc__": base.__doc__})
    # Where somebody puts another function in its place, that is called.
    fused.own_forward = fused.forward
    return fused


def __getattr__(name: str) -> Any:
    """The classes that `fused_class` makes, which pickle looks up by name."""
    for module, architecture in ARCHITECTURES.items():
        for base in (DecoderLayer, Attention):
            if name == f"Fused{architecture.prefix}{base.__name__}":
                original = getattr(importlib.import_module(_modeling(module)), name.removeprefix("Fused"))
                return fused_class(base, original)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
