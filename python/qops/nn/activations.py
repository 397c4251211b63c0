"""What goes from module to module."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from qops.ops._checks import MAX_ROW_DIMS


class Int8Rows(NamedTuple):
    """Activations in 8 bits, as a norm or SiLU-mul hands them to an :class:`Int8Linear`.

    Attributes:
        q: int8 [..., K].
        scale: float32 [...], one per token.
        dtype: what they were quantised from, and what the linear returns.
        rule: of :func:`qops.quantize_int8`, by which they were made; a linear of another rule refuses them.
    """

    q: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype
    rule: str


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    """A parameter that follows `.to(dtype)` and never requires grad.

    Args:
        tensor: any; it is detached, not copied.

    Returns:
        A parameter around the same memory.
    """
    return nn.Parameter(tensor.detach(), requires_grad=False)


def with_dense_rows(x: torch.Tensor) -> torch.Tensor:
    """Modules take any strides, as nn.Linear does, operators those of rows. For an x that is not contiguous, which it
    takes a caller 40 ns to ask."""
    return x if x.stride(-1) == 1 and x.dim() <= 1 + MAX_ROW_DIMS else x.contiguous()


def in_dtype_of(x: Any, residual: torch.Tensor) -> Any:
    """Autocast has torch's own operators, attention among them, return its dtype. What they give goes on in the dtype
    of the residual stream, that of the model."""
    if x.dtype is residual.dtype or not torch.is_autocast_enabled(residual.device.type):
        return x
    return x._replace(dtype=residual.dtype) if isinstance(x, Int8Rows) else x.to(residual.dtype)
