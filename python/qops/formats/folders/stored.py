"""What a quantization method has to say about the tensors of a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qops.formats.checkpoint import QuantizedFacts
from qops.formats.folders.tensors import Spec
from qops.nn import QuantizedLinear
from qops.weights.requirements import dtype_name
from qops.weights.state import QuantizedWeight


@dataclass(frozen=True)
class Options:
    """What the user of a folder may say, because the folder does not, or is known to be wrong. None says nothing.

    Attributes:
        zero_add: of GPTQ: "word", "nibble" or "none", see :func:`qops.formats.gptq.int4_weight`.
        symmetric: of AWQ without qzeros: True.
    """

    zero_add: str | None = None
    symmetric: bool | None = None

    def refuse(self, method: str, *but: str) -> None:
        """Raises where something is said that has no meaning for a method."""
        for name, value in vars(self).items():
            if value is not None and name not in but:
                raise ValueError(f"{name} has no meaning for checkpoints of {method}, got {name}={value!r}")


@dataclass(frozen=True)
class Stored:
    """A quantised weight, as the header of its file and the config describe it.

    Attributes:
        linear: what multiplies with it.
        kind: how it is stored, in the words of its format.
        shape: (N, K).
        group_size, scale_dtype, kinds, act_order, zero_dtype: as of
            :class:`qops.formats.checkpoint.QuantizedFacts`.
        keys: the last parts of the names of its tensors.
        build: the weight, not packed yet, from those tensors.
        input_keys: the same of the tensors of `linear.static_input`.
    """

    linear: type[QuantizedLinear]
    kind: str
    shape: tuple[int, int]
    group_size: int
    scale_dtype: torch.dtype
    kinds: tuple[str, ...]
    act_order: bool | None
    keys: tuple[str, ...]
    build: Callable[[Mapping[str, Tensor]], QuantizedWeight]
    input_keys: tuple[str, ...] = ()
    zero_dtype: torch.dtype = torch.float32

    def facts(self) -> QuantizedFacts:
        return QuantizedFacts(self.group_size, self.scale_dtype, self.kinds, self.act_order, self.zero_dtype)


class Method(Protocol):
    """A quantization method, with the settings of one folder."""

    def stored(self, module: str, specs: Mapping[str, Spec]) -> Stored | None:
        """How the weight of a module is stored.

        Args:
            module: its name.
            specs: of all tensors of the module.

        Returns:
            None where none of the tensors is one of this method's: the module is dense.

        Raises:
            ValueError: the tensors are no weight, or none that is supported; the message does not name the module.
        """
        ...


def require_specs(specs: Mapping[str, Spec], shapes: Mapping[str, tuple[tuple[int, ...], Any]]) -> None:
    """Raises where a tensor is missing or has another shape or dtype.

    Args:
        specs: of a module.
        shapes: of each tensor, its shape, and its dtype or the dtypes that it may have.
    """
    for key, (shape, dtypes) in shapes.items():
        dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
        found = specs.get(key)
        if found is None:
            raise ValueError(f"tensor {key} is missing")
        if found.shape != shape or found.dtype not in dtypes:
            wanted = " or ".join(map(dtype_name, dtypes))
            raise ValueError(f"tensor {key} must be {wanted} {list(shape)}, got {found}")
