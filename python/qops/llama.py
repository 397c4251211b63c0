"""Parts of a Transformers Llama model whose linears, norms, rotary and SiLU-mul run on qops operators.

The surrounding `LlamaForCausalLM` and `LlamaModel` stay Transformers' own, and so do caches, masks and `generate`.
Between layers travels a pair (delta, residual) instead of their sum: the addition that ends layer i and the norm that
begins layer i + 1 are one `add_rms_norm`. By the contract of that operator the bits are those of the unfused chain.
Where hidden states are asked for, layers return the sum instead, and Transformers records it as usual.

This module imports Transformers; `qops.nn` holds the parts that do not need it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    eager_attention_forward,
)

from qops.nn import MLP, MergedLinear, MergingModule, RMSNorm
from qops.ops import rotary_

Hidden = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
# A module for each name below a layer, in Transformers' terms ("self_attn.q_proj", "input_layernorm").
Part = Callable[[str], Any]


class Shared(NamedTuple):
    """What all layers of one forward share, found once: reading a Transformers config takes 1 us, times 30 layers.

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
    """

    def __init__(self, rotary: nn.Module, config: LlamaConfig):
        super().__init__()
        self.rotary = rotary
        self.config = config

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Shared:
        # The argument tells Transformers' module nothing but device and dtype.
        cos, sin = self.rotary(x.new_empty(0, dtype=torch.float32), position_ids)
        half = cos.shape[-1] // 2
        cos, sin = cos[..., :half].reshape(-1, half), sin[..., :half].reshape(-1, half)
        positions = None
        if position_ids.shape[0] > 1:
            positions = torch.arange(position_ids.numel(), device=x.device).view(position_ids.shape)
        config: Any = self.config
        return Shared(cos, sin, positions, config._attn_implementation, config.output_hidden_states)


class Attention(MergingModule, LlamaAttention):
    """Attention with q, k and v as one GEMM and rotary in place on its output [B, T, H, D]."""

    def __init__(self, config: LlamaConfig, layer_idx: int, part: Part):
        nn.Module.__init__(self)
        assert config.head_dim is not None and config.num_key_value_heads is not None
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.heads = config.num_attention_heads
        self.key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.heads // self.key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = 0.0
        self.is_causal = True
        self.qkv_proj = MergedLinear({name: part(f"self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj")})
        self.o_proj = part("self_attn.o_proj")

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Shared | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert position_embeddings is not None
        cos, sin, positions, implementation, _ = position_embeddings
        batch, tokens, _ = hidden_states.shape
        qkv = self.qkv_proj(hidden_states).view(batch, tokens, -1, self.head_dim)
        query, key, value = qkv.split([self.heads, self.key_value_heads, self.key_value_heads], dim=2)
        rotary_(query, key, cos, sin, positions)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if tokens == 1 and implementation == "sdpa" and (attention_mask is None or attention_mask.shape[1] == 1):
            # The query heads of one key/value head take the place of tokens, so keys and values are never expanded:
            # 12 us against 42 us (expanded) and 17 us (enable_gqa) at 9/3 heads, 64 positions, bf16, 2 cores.
            packed = query.reshape(batch, self.key_value_heads, self.num_key_value_groups, self.head_dim)
            output = F.scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, scale=self.scaling)
            return self.o_proj(output.reshape(batch, 1, -1)), None

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attend(
            self, query.transpose(1, 2), key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(batch, tokens, -1)), weights


class DecoderLayer(LlamaDecoderLayer):
    """A decoder layer that takes and returns (delta, residual); see the module docstring.

    Args:
        config: the model's.
        layer_idx: the layer's place, which addresses its key/value cache.
        part: gives the layer's linears and norms.
    """

    input_layernorm: RMSNorm
    post_attention_layernorm: RMSNorm

    def __init__(self, config: LlamaConfig, layer_idx: int, part: Part):
        nn.Module.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = Attention(config, layer_idx, part)
        self.mlp = MLP(part("mlp.gate_proj"), part("mlp.up_proj"), part("mlp.down_proj"))
        self.input_layernorm = part("input_layernorm")
        self.post_attention_layernorm = part("post_attention_layernorm")

    def forward(
        self,
        hidden_states: Hidden,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Shared | None = None,
        **kwargs: Any,
    ) -> Hidden:
        assert position_embeddings is not None
        if isinstance(hidden_states, tuple):
            x, residual = self.input_layernorm.add(*hidden_states)
        else:
            x, residual = self.input_layernorm(hidden_states), hidden_states
        x, _ = self.self_attn(
            x, position_embeddings, attention_mask, past_key_values, position_ids=position_ids, **kwargs
        )
        x, residual = self.post_attention_layernorm.add(x, residual)
        x = self.mlp(x)
        if kwargs.get("output_hidden_states", position_embeddings.sums):
            return residual + x
        return x, residual


class FinalNorm(RMSNorm):
    """The norm after the last layer, which closes the pair (delta, residual)."""

    def forward(self, x: Hidden) -> torch.Tensor:
        if isinstance(x, tuple):
            return self.add(*x)[0]
        return super().forward(x)
