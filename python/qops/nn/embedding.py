"""A quantised embedding."""

from __future__ import annotations

from typing import Any

import torch

from qops.nn.linears import Int8WeightOnlyLinear
from qops.nn.offload import Offloadable
from qops.weights import Int8Weight


class Int8Embedding(Offloadable):
    """Rows of an int8 weight, dequantised when looked up.

    The exact row is rounded once to the module's dtype, which follows `.to(dtype)`. A tied output linear holds the
    very same :class:`qops.Int8Weight` object, so the table exists once.

    Args:
        weight: [vocabulary, hidden].
        dtype: of the looked-up rows.

    Raises:
        TypeError: a weight of another class.
    """

    scheme = Int8WeightOnlyLinear.scheme
    """Its rows are exact, as that linear's products are."""
    dtype_marker: torch.Tensor

    def __init__(self, weight: Int8Weight, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        if not isinstance(weight, Int8Weight):
            raise TypeError(f"Int8Embedding: weight must be an Int8Weight, got {type(weight).__name__}")
        self.num_embeddings = weight.out_features
        self.embedding_dim = weight.in_features
        self.weight = weight
        # Weights never change dtype, so nothing else here could follow `.to(dtype)`.
        self.register_buffer("dtype_marker", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """See :meth:`qops.Int8Weight.rows`.

        Args:
            ids: int32 or int64 [...].

        Returns:
            [..., hidden].
        """
        # Module.__getattr__ would take 0.6 us for each of them.
        weight: Any = self._modules["weight"]
        marker: Any = self._buffers["dtype_marker"]
        return weight.rows(ids, marker.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, dtype={self.dtype_marker.dtype}"
