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
from qops.models.rooms import writes_counted
from qops.nn.hooks import is_watched
from qops.weights.requirements import moved

# Rows of tables that are computed at a time where tokens come one by one.
_ROWS = 256
_LAST = 1 << 40
# Whose frequencies are the same at every position.
_STEADY = frozenset(("default", "linear", "llama3", "yarn"))


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


class _Rows(NamedTuple):
    """The tables of positions first, first + 1, ..., and what they were computed from."""

    first: int
    cos: torch.Tensor
    sin: torch.Tensor
    source: tuple[Any, ...]

    @property
    def written(self) -> int:
        """Counts writes: callers get views."""
        return self.cos._version + self.sin._version


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
        self.rows: _Rows | None = None
        self.written = 0

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RotaryTables:
        return super()._apply(lambda tensor: moved(tensor, fn), recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "rows": None}

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Shared:
        attention = self.config._attn_implementation
        is_sdpa = attention == "sdpa" and ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
        decodes = is_sdpa and may_step(x)
        tables = self._known(position_ids) if decodes and not args and not kwargs else None
        cos, sin = tables or self._computed(x, position_ids, *args, **kwargs)
        positions = None
        if position_ids.shape[0] > 1:
            positions = torch.arange(position_ids.numel(), device=x.device).view(position_ids.shape)
        return Shared(cos, sin, positions, attention, is_sdpa, decodes, Run())

    def _computed(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        # The argument tells Transformers' module nothing but device and dtype.
        cos, sin = self.rotary(x.new_empty(0, dtype=torch.float32), *args, **kwargs)
        half = cos.shape[-1] // 2
        return cos[..., :half].reshape(-1, half), sin[..., :half].reshape(-1, half)

    def _known(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Of one token, from rows that were computed for tokens before; None where they may not be the same.

        Transformers' module takes 65 us a token, as long as two layers of a small model.
        """
        rotary = self.rotary
        if position_ids.shape != (1, 1) or position_ids.device.type != "cpu" or position_ids.dtype is not torch.long:
            return None
        if getattr(rotary, "rope_type", None) not in _STEADY or is_watched(rotary):
            return None
        frequencies, rows = rotary.inv_freq, self.rows
        is_theirs = type(rotary).__module__.startswith("transformers.")
        if not is_theirs or frequencies.device.type != "cpu" or frequencies.requires_grad:
            return None
        position = position_ids.tolist()[0][0]
        # Their values, as tensors of inference mode count no writes.
        source = frequencies.tolist(), rotary.attention_scaling, type(rotary).forward
        if position > _LAST:
            return None
        is_there = rows is not None and rows.source == source and rows.first <= position < rows.first + _ROWS
        if rows is None or not is_there or rows.written != self.written:
            first = position - position % _ROWS
            with writes_counted():
                ids = torch.arange(first, first + _ROWS, device=position_ids.device)[None]
                rows = _Rows(first, *self._computed(frequencies, ids), source)
            self.__dict__.update(rows=rows, written=rows.written)
        at = position - rows.first
        return rows.cos[at : at + 1], rows.sin[at : at + 1]


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
