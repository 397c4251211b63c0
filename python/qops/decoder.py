"""Decoder layers of Transformers models whose linears, norms, rotary and SiLU-mul run on qops operators.

The surrounding `...ForCausalLM` and `...Model` stay Transformers' own, and so do caches, masks and `generate`.
No residual addition is a pass of its own. Quantised linears at the end of attention and of the MLP add it before they
store. Where others stand there, or norms after them, a pair (delta, residual) goes on instead of the sum, and the norm
that takes it, that of layer i + 1 perhaps, is an `add_rms_norm`. By the contracts of the operators the bits are those
of the unfused chain.
Where hidden states are asked for, layers return the sum instead, and Transformers records it as usual.

In a layer of `Int8Linear`s the norms emit 8-bit activations with their scales. Attention and the product of gate and
up, which stores the one vector that SiLU-mul makes of both, leave the quantisation of a token to a pass of its own.

This module imports Transformers; `qops.nn` holds the parts that do not need it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qops._offload import Offloadable
from qops._weight_state import moved
from qops.nn import MLP, MergedLinear, MergingModule, RMSNorm, Stream, into_stream
from qops.ops import qk_norm_rotary_, rotary_

# A module for each name below a layer, in Transformers' terms ("self_attn.q_proj", "input_layernorm").
Part = Callable[[str], Any]


class Architecture(NamedTuple):
    """A family of models whose layers this module knows.

    Attributes:
        prefix: of Transformers' class names.
        softcap: whether attention caps its logits (`attn_logit_softcapping`).
    """

    prefix: str
    softcap: bool = False


# By the name of Transformers' module. SmolLM and SmolLM2 are "llama", Qwen2.5 is "qwen2".
ARCHITECTURES = {
    "gemma": Architecture("Gemma"),
    "gemma2": Architecture("Gemma2", softcap=True),
    "gemma3": Architecture("Gemma3"),
    "llama": Architecture("Llama"),
    "mistral": Architecture("Mistral"),
    "qwen2": Architecture("Qwen2"),
    "qwen3": Architecture("Qwen3"),
    "smollm3": Architecture("SmolLM3"),
}


def unknown_architecture(model: Any) -> str | None:
    """Why the layers of a dense model cannot be fused; None if they can."""
    causal, name = type(model), None
    for module, architecture in ARCHITECTURES.items():
        if causal.__module__ == _modeling(module) and causal.__name__ == f"{architecture.prefix}ForCausalLM":
            name = module
    if name is None:
        return f"{causal.__name__} is not an architecture whose layers qops knows"
    prefix = ARCHITECTURES[name].prefix
    for layer in model.model.layers:
        found = [type(part).__name__ for part in (layer, layer.self_attn, layer.mlp)]
        wanted = [f"{prefix}{part}" for part in ("DecoderLayer", "Attention", "MLP")]
        if found != wanted:
            return f"its layers are made of {', '.join(found)}, not of {', '.join(wanted)}"
    return None


def _modeling(module: str) -> str:
    return f"transformers.models.{module}.modeling_{module}"


class Shared(NamedTuple):
    """What the layers of one forward share, found once: reading a Transformers config takes 1 us, times 30 layers.

    Attributes:
        cos, sin: float32 [rows, D/2].
        positions: [B, T], the row of each token; None where row t belongs to token t of every sequence.
        attention: name of the attention implementation.
        sums: whether layers hand on sums, because hidden states are recorded.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor | None
    attention: str
    sums: bool


class RotaryTables(nn.Module):
    """Transformers' rotary embedding, which computes every RoPE scaling, in the form that `qops.rotary` takes.

    The tables are float32 without Transformers' duplicated half and without its rounding to the model's dtype. They
    have one row per token or, with different positions in the batch, one per (batch, token).

    Frequencies stay float32 when the model is cast; those of a model that was cast before are computed afresh.
    """

    def __init__(self, rotary: Any, config: Any):
        super().__init__()
        cast = any(buffer.is_floating_point() and buffer.dtype != torch.float32 for buffer in rotary.buffers())
        self.rotary = type(rotary)(config=config).to(next(rotary.buffers()).device) if cast else rotary
        self.config = config

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RotaryTables:
        return super()._apply(lambda tensor: moved(tensor, fn), recurse)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *layer_type: str) -> Shared:
        # The argument tells Transformers' module nothing but device and dtype.
        cos, sin = self.rotary(x.new_empty(0, dtype=torch.float32), position_ids, *layer_type)
        half = cos.shape[-1] // 2
        cos, sin = cos[..., :half].reshape(-1, half), sin[..., :half].reshape(-1, half)
        positions = None
        if position_ids.shape[0] > 1:
            positions = torch.arange(position_ids.numel(), device=x.device).view(position_ids.shape)
        return Shared(cos, sin, positions, self.config._attn_implementation, self.config.output_hidden_states)


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

    def __init__(self, original: Any, part: Part):
        nn.Module.__init__(self)
        self.__dict__.update({name: value for name, value in vars(original).items() if not name.startswith("_")})
        self.heads = self.config.num_attention_heads
        self.key_value_heads = self.config.num_key_value_heads
        self.qkv_proj = MergedLinear({name: part(f"self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj")})
        self.o_proj = part("self_attn.o_proj")
        if hasattr(original, "q_norm"):
            self.q_norm, self.k_norm = part("self_attn.q_norm"), part("self_attn.k_norm")
        module = importlib.import_module(type(original).__module__)
        self.eager_attention = module.eager_attention_forward
        # Mistral alone keeps the window in its config.
        window = getattr(original, "sliding_window", getattr(self.config, "sliding_window", None))
        self.extras: dict[str, Any] = {} if window is None else {"sliding_window": window}
        if ARCHITECTURES[type(original).__module__.rpartition("modeling_")[2]].softcap:
            self.extras["softcap"] = original.attn_logit_softcapping
        # SmolLM3 leaves some layers without positions.
        self.rotates = getattr(original, "use_rope", True)

    def forward(
        self,
        hidden_states: Any,
        position_embeddings: Shared | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        residual: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, torch.Tensor | None]:
        assert position_embeddings is not None
        implementation = position_embeddings.attention
        qkv = self.qkv_proj(hidden_states)
        batch, tokens, _ = qkv.shape
        qkv = qkv.view(batch, tokens, -1, self.head_dim)
        query, key, value = qkv.split([self.heads, self.key_value_heads, self.key_value_heads], dim=2)
        self._position(query, key, position_embeddings)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if tokens == 1 and implementation == "sdpa" and (attention_mask is None or attention_mask.shape[1] == 1):
            # The query heads of one key/value head take the place of tokens, so keys and values are never expanded:
            # 12 us against 42 us (expanded) and 17 us (enable_gqa) at 9/3 heads, 64 positions, bf16, 2 cores.
            packed = query.reshape(batch, self.key_value_heads, self.num_key_value_groups, self.head_dim)
            output = F.scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, scale=self.scaling)
            return into_stream(self.o_proj, output.reshape(batch, 1, -1), residual), None

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, self.eager_attention)
        output, weights = attend(
            self,
            query.transpose(1, 2),
            key,
            value,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            **self.extras,
            **kwargs,
        )
        return into_stream(self.o_proj, output.reshape(batch, tokens, -1), residual), weights

    def _position(self, query: torch.Tensor, key: torch.Tensor, shared: Shared) -> None:
        """Norms the heads where the architecture does, and rotates them; in place."""
        cos, sin, positions, _, _ = shared
        if "q_norm" in self._modules:
            q, k = self.q_norm, self.k_norm
            qk_norm_rotary_(
                query,
                key,
                q.weight,
                k.weight,
                cos,
                sin,
                q.eps,
                positions,
                weight_offset=q.weight_offset,
                rounding=q.rounding,
            )
        elif self.rotates:
            rotary_(query, key, cos, sin, positions)


class DecoderLayer(Offloadable):
    """A decoder layer that takes and returns a sum or (delta, residual); see the module docstring.

    Two norms (Llama) stand before attention and before the MLP. With four (Gemma 2 and 3) the output of each is normed
    too, before it is added.

    Args:
        original: Transformers' layer.
        part: gives the layer's linears and norms; each is asked for once.
    """

    input_layernorm: RMSNorm
    post_attention_layernorm: RMSNorm
    pre_feedforward_layernorm: RMSNorm
    post_feedforward_layernorm: RMSNorm

    def __init__(self, original: Any, part: Part):
        nn.Module.__init__(self)
        self.sandwich = hasattr(original, "pre_feedforward_layernorm")
        self.self_attn = fused_class(Attention, type(original.self_attn))(original.self_attn, part)
        act = original.mlp.act_fn
        self.mlp = MLP(
            part("mlp.gate_proj"),
            part("mlp.up_proj"),
            part("mlp.down_proj"),
            None if _is_silu(act) else act,
        )
        for name, _ in original.named_children():
            if name.endswith("layernorm"):
                setattr(self, name, part(name))
        before_mlp = self.pre_feedforward_layernorm if self.sandwich else self.post_attention_layernorm
        self.input_layernorm.int8 = self.self_attn.qkv_proj.takes_int8
        before_mlp.int8 = self.mlp.gate_up_proj.takes_int8
        self._be_hooked()

    def forward(
        self,
        hidden_states: Stream,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Shared | None = None,
        **kwargs: Any,
    ) -> Stream:
        assert position_embeddings is not None
        x, residual = _normed(self.input_layernorm, hidden_states)
        attended, _ = self.self_attn(
            x,
            position_embeddings,
            attention_mask,
            past_key_values,
            None if self.sandwich else residual,
            position_ids=position_ids,
            **kwargs,
        )
        stream: Stream
        if self.sandwich:
            x, residual = self.pre_feedforward_layernorm.add(self.post_attention_layernorm(attended), residual)
            stream = self.post_feedforward_layernorm(self.mlp(x)), residual
        else:
            stream = self.mlp(*_normed(self.post_attention_layernorm, attended))
        if isinstance(stream, tuple) and kwargs.get("output_hidden_states", position_embeddings.sums):
            return stream[1] + stream[0]
        return stream


def _normed(norm: RMSNorm, stream: Stream) -> tuple[Any, torch.Tensor]:
    """The norm of the sum, and the sum."""
    return norm.add(*stream) if isinstance(stream, tuple) else (norm(stream), stream)


def _is_silu(act: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """By what it computes: Transformers and its kernel hubs have several classes for it."""
    x = torch.linspace(-8, 8, 65)
    return torch.equal(act(x), F.silu(x))


class FinalNorm(RMSNorm):
    """The norm after the last layer, which closes a pair (delta, residual)."""

    def forward(self, x: Stream) -> torch.Tensor:
        return self.add(*x)[0] if isinstance(x, tuple) else super().forward(x)


@functools.cache
def fused_class(base: type, original: type) -> Any:
    """`base` as a subclass of Transformers' class, by which Transformers finds layers to record and to checkpoint."""
    return type(f"Fused{original.__name__}", (base, original), {"__module__": __name__, "__doc__": base.__doc__})


def __getattr__(name: str) -> Any:
    """The classes that `fused_class` makes, which pickle looks up by name."""
    for module, architecture in ARCHITECTURES.items():
        for base in (DecoderLayer, Attention):
            if name == f"Fused{architecture.prefix}{base.__name__}":
                original = getattr(importlib.import_module(_modeling(module)), name.removeprefix("Fused"))
                return fused_class(base, original)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
