"""What a reader of checkpoints offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from qops.weights import Int4Weight, Int8Weight

if TYPE_CHECKING:
    from transformers import LlamaConfig

Weight = Int4Weight | Int8Weight | torch.Tensor


class Checkpoint(Protocol):
    """What a reader offers: a config, and by Transformers' names the weight and bias of each module.

    A quantised weight need not be packed yet.
    """

    config: LlamaConfig

    def weight(self, name: str) -> Weight: ...

    def bias(self, name: str) -> torch.Tensor | None: ...

    def kind(self, name: str) -> str:
        """How the weight is stored; equal for weights that become linears of one kind."""
        ...
