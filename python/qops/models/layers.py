"""The list of a model's layers."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from qops.weights.noticed import Noticed, tell_of_change


class _Whole:
    """A copy of a list of layers, until any module changes."""

    def __init__(self, layers: Any) -> None:
        self.copy: nn.ModuleList | None = nn.ModuleList(layers)
        tell_of_change(self)

    def let_go(self) -> None:
        self.copy = None


class Layers(Noticed, nn.ModuleList):
    """The layers of a model, of which Transformers makes a copy in each forward: `layers[:num_hidden_layers]`.

    A list of modules is a module, and to make one of 30 takes 85 us, as long as three layers of a small model need.
    """

    def __getitem__(self, index: Any) -> Any:
        """A copy of all of them is made once, and given again where nobody holds it and it is as it was."""
        if torch.compiler.is_compiling() or not isinstance(index, slice) or range(len(self))[index] != range(len(self)):
            return super().__getitem__(index)
        own = self.__dict__
        whole = own.get("whole")
        copy = None if whole is None else whole.copy
        # Three hold it here: what keeps it, this call and the one that counts.
        if copy is None or sys.getrefcount(copy) > 3 or [*copy] != [*self]:
            whole = own["whole"] = _Whole(self)
            copy = whole.copy
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "whole"}
