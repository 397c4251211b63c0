"""What every reader of checkpoints offers, whatever the architecture."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

import torch

from qops.nn import QuantizedLinear
from qops.weights.state import QuantizedWeight

__all__ = ["Checkpoint", "Weight"]

Weight = QuantizedWeight | torch.Tensor
"""Quantised, not packed yet, or dense."""


class Checkpoint(Protocol):
    """A model on disk, opened and checked: each parameter and buffer by its name in Transformers' model.

    Nothing is read before it is asked for. Whoever builds a model asks layer by layer, for each tensor once, so a
    reader need not keep what it has given.

    Raises:
        ValueError: from each method, where the checkpoint does not hold what it should; path and tensor are named.
    """

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
