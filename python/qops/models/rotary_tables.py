"""What the layers of one forward of a fused model share: tables for rotary embedding, and how attention is computed.

This module imports Transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qops.models.blocks import Run, may_step
from qops.weights.requirements import moved


class Shared(NamedTuple):
    """What the layers of one forward share, found once: reading a Transformers config takes 1 us, times 30 layers.

    Attributes:
        cos, sin: float32 [rows, D/2].
        positions: [B, T], the row of each token; None where row t belongs to token t of every sequence.
        attention: name of the attention implementation.
        is_sdpa: whether that is Transformers' own scaled dot product attention, and not one registered in its place.
        decodes: whether it is, and the tokens are the few of a decoding step on a CPU, which `decode_attention` takes.
        run: of the layers that take such steps.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor | None
    attention: str
    is_sdpa: bool
    decodes: bool
    run: Run


class RotaryTables(nn.Module):
    """Transformers' rotary embedding, which computes every RoPE scaling, in the form that `qops.rotary` takes.

    The tables are float32 without Transformers' duplicated half and without its rounding to the model's dtype. They
    have one row per token or, with different positions in the batch, one per (batch, token).

    Frequencies stay float32 when the model is cast; those of a model that was cast before are computed afresh, unless
    they are its owner's.
    """

    def __init__(self, rotary: Any, config: Any):
        super().__init__()
        self.rotary = _before_a_cast(rotary, config)
        self.config = config

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RotaryTables:
        return super()._apply(lambda tensor: moved(tensor, fn), recurse)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Shared:
        # The argument tells Transformers' module nothing but device and dtype.
        cos, sin = self.rotary(x.new_empty(0, dtype=torch.float32), position_ids, *args, **kwargs)
        half = cos.shape[-1] // 2
        cos, sin = cos[..., :half].reshape(-1, half), sin[..., :half].reshape(-1, half)
        positions = None
        if position_ids.shape[0] > 1:
            positions = torch.arange(position_ids.numel(), device=x.device).view(position_ids.shape)
        attention = self.config._attn_implementation
        is_sdpa = attention == "sdpa" and ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
        return Shared(cos, sin, positions, attention, is_sdpa, is_sdpa and may_step(x), Run())


def _before_a_cast(rotary: Any, config: Any) -> Any:
    """Transformers' rotary embedding with the float32 frequencies that it was cast from; itself where it was not."""
    cast = any(buffer.is_floating_point() and buffer.dtype != torch.float32 for buffer in rotary.buffers())
    if not cast or not type(rotary).__module__.startswith("transformers."):
        return rotary
    afresh = type(rotary)(config=config).to(next(rotary.buffers()).device)
    pairs = zip(rotary.buffers(), afresh.buffers(), strict=True)
    return afresh if all(torch.equal(found, new.to(found.dtype)) for found, new in pairs) else rotary


def shared_of(module: nn.Module, position_embeddings: Any) -> Shared:
    if not isinstance(position_embeddings, Shared):
        raise ValueError(
            f"{type(module).__name__}.forward: position_embeddings must come from the rotary_emb of the fused model, "
            f"got {type(position_embeddings).__name__}"
        )
    return position_embeddings
