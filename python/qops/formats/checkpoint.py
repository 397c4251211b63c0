"""What every reader of checkpoints offers, whatever the architecture."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from qops.nn import QuantizedLinear
from qops.weights.state import QuantizedWeight

__all__ = ["Checkpoint", "Facts", "QuantizedFacts", "Weight"]

Weight = QuantizedWeight | torch.Tensor
"""Quantised, not packed yet, or dense."""


@dataclass(frozen=True)
class QuantizedFacts:
    """What is known of a quantised weight before its numbers are read.

    Attributes:
        group_size: columns of K that share a scale.
        scale_dtype: float16, bfloat16 or float32.
        kinds: those of its class that it may have. More than one where its numbers decide: zero points that are all 8
            make a symmetric weight.
        act_order: whether its columns are in another order than those of w; None where its numbers decide.
        zero_dtype: of float zeros and offsets.
    """

    group_size: int
    scale_dtype: torch.dtype
    kinds: tuple[str, ...]
    act_order: bool | None
    zero_dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Facts:
    """What is known of a parameter or buffer before it is read.

    Attributes:
        stored_as: in the words of its format; of a dense one its dtype.
        shape: of the parameter: [N, K] of a weight.
        size_bytes: of all that stands for it in the files.
        quantized: the rest about a quantised weight; None where it comes dense.
        why_dense: why it comes dense though it is stored quantised; None for all others.
    """

    stored_as: str
    shape: tuple[int, ...]
    size_bytes: int
    quantized: QuantizedFacts | None = None
    why_dense: str | None = None


class Checkpoint(Protocol):
    """A model on disk, opened and checked: each parameter and buffer by its name in Transformers' model.

    Nothing is read before it is asked for. Whoever builds a model asks layer by layer, for each tensor once, so a
    reader need not keep what it has given.

    Raises:
        ValueError: from each method, where the checkpoint does not hold what it should; path and tensor are named.
    """

    @property
    def format(self) -> str:
        """What it is, in a few words."""
        ...

    @property
    def path(self) -> Path:
        """Where it lies."""
        ...

    @property
    def config(self) -> Any:
        """Transformers' config, of any kind; its `architectures` names the class of the model."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """In which the model is built where its user says nothing."""
        ...

    @property
    def fuses(self) -> bool:
        """Whether its layers are to be fused where they can be."""
        ...

    @property
    def generation_config(self) -> Any:
        """Transformers' generation config; None where there is none."""
        ...

    @property
    def names(self) -> Collection[str]:
        """All parameters and buffers; `<module>.weight` also where the weight is quantised."""
        ...

    def holds(self, name: str) -> bool:
        """Whether there is a parameter or buffer of that name.

        Args:
            name: in Transformers' model; `<module>.weight` also where the weight is quantised.

        Returns:
            False also for names that the architecture does not have.
        """
        ...

    def linear(self, module: str) -> type[QuantizedLinear] | None:
        """What multiplies with the weight of a module, without reading it.

        Args:
            module: its name in Transformers' model.

        Returns:
            A class of `qops.nn`; None where the weight is dense.
        """
        ...

    def kind(self, module: str) -> str:
        """How the weight of a module is stored, without reading it.

        Args:
            module: its name in Transformers' model.

        Returns:
            Equal for weights that become linears of one kind.
        """
        ...

    def describe(self, name: str) -> Facts:
        """What is known of a parameter or buffer, without reading it.

        Args:
            name: one of `names`.

        Returns:
            Of what :meth:`weight` and :meth:`tensor` give. What a linear quantises its input with is no part of it.
        """
        ...

    def weight(self, module: str) -> Weight:
        """The weight of a module.

        Args:
            module: its name in Transformers' model.

        Returns:
            [N, K], not packed yet where it is quantised, in the stored dtype where it is dense.
        """
        ...

    def activations(self, module: str) -> dict[str, torch.Tensor]:
        """What the linear of a module quantises or multiplies its input with besides its weight.

        Args:
            module: its name in Transformers' model; its weight is quantised.

        Returns:
            Keyword arguments for the class that :meth:`linear` names, those of its `static_input` that there are: {}
            for all but static activations and smoothed ones.
        """
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """A dense parameter or a buffer.

        Args:
            name: in Transformers' model.

        Returns:
            In the stored dtype.
        """
        ...

    def finish(self, model: Any) -> None:
        """Ends the loading: raises where something is left that the model had no place for.

        Args:
            model: that was built.
        """
        ...
