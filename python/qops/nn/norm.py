"""RMSNorm."""

from __future__ import annotations

from typing import Any

import torch

from qops.nn.activations import Int8Rows, frozen, in_dtype_of, with_dense_rows
from qops.ops import (
    add_rms_norm,
    add_rms_norm_int8,
    rms_norm,
    rms_norm_int8,
)
from qops.weights.noticed import Noticed


class RMSNorm(Noticed):
    """:func:`qops.rms_norm`, or with a residual :func:`qops.add_rms_norm`, as a module.

    With `int8` they are :func:`qops.rms_norm_int8` and :func:`qops.add_rms_norm_int8`.

    Args:
        weight: [H].
        eps: added to the mean of squares.
        weight_offset: added to the weight; 1 in Gemma.
        rounding: "hf" or "fp32", see :func:`qops.rms_norm`.
        int8: return :class:`Int8Rows` of this rule instead of a tensor, for linears that follow (their `rows_rule`).
    """

    def __init__(
        self,
        weight: torch.Tensor,
        eps: float,
        *,
        weight_offset: float = 0.0,
        rounding: str = "hf",
        int8: str | None = None,
    ):
        super().__init__()
        self.weight = frozen(weight.contiguous())
        self.eps = eps
        self.weight_offset = weight_offset
        self.rounding = rounding
        self.int8 = int8

    def forward(self, x: torch.Tensor) -> Any:
        """The norm of x.

        Args:
            x: float32, float16 or bfloat16 [..., H], any strides.

        Returns:
            [..., H] in the dtype of x, or :class:`Int8Rows`.
        """
        style: Any = {"weight_offset": self.weight_offset, "rounding": self.rounding}
        if not x.is_contiguous():
            x = with_dense_rows(x)
        if self.int8 is not None:
            return Int8Rows(*rms_norm_int8(x, self.weight, self.eps, rule=self.int8, **style), x.dtype, self.int8)
        return rms_norm(x, self.weight, self.eps, **style)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """The norm of a sum, and the sum.

        Args:
            x: float32, float16 or bfloat16 [..., H], any strides.
            residual: same dtype and shape; under autocast x is cast to its dtype.

        Returns:
            (norm of x + residual, x + residual); the norm is an :class:`Int8Rows` with `int8`.
        """
        style: Any = {"weight_offset": self.weight_offset, "rounding": self.rounding}
        x = in_dtype_of(x, residual)
        if not x.is_contiguous():
            x = with_dense_rows(x)
        if not residual.is_contiguous():
            residual = with_dense_rows(residual)
        if self.int8 is not None:
            q, scale, total = add_rms_norm_int8(x, residual, self.weight, self.eps, rule=self.int8, **style)
            return Int8Rows(q, scale, x.dtype, self.int8), total
        return add_rms_norm(x, residual, self.weight, self.eps, **style)

    def extra_repr(self) -> str:
        offset = f", weight_offset={self.weight_offset}" if self.weight_offset else ""
        return f"{list(self.weight.shape)}, eps={self.eps}{offset}, rounding={self.rounding}, int8={self.int8}"
