"""rms_norm and add_rms_norm: root-mean-square normalisation of the last dimension, alone or after a residual add."""

from __future__ import annotations

import torch
from torch import Tensor

from qops import _native as _native
from qops.ops._checks import Checker, check_rms_norm, check_second, refuse_grad


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, weight_offset: float = 0.0, rounding: str = "hf") -> Tensor:
    """Normalises each row by its root mean square and scales it by a weight.

    ``rstd = 1 / sqrt(sum_h x[t, h]^2 / H + eps)``, then with R() one rounding to nearest even in the dtype of ``x``:

    * ``rounding="hf"``: ``y = R(R(x * rstd) * weight)``, as Hugging Face Transformers' ``LlamaRMSNorm``;
    * ``rounding="fp32"``: ``y = R(x * rstd * (weight + weight_offset))``, products left to right.

    Args:
        x: float32, float16 or bfloat16 ``[..., H]``; any leading dimensions and strides, last dimension dense.
        weight: float32, float16 or bfloat16 ``[H]``, independent of the dtype of ``x``.
        eps: added to the mean of squares; finite in float32, not negative.
        weight_offset: added to the weight in float32 (1.0 for Gemma); finite; needs ``rounding="fp32"`` when not zero.
        rounding: ``"hf"`` or ``"fp32"``.

    Returns:
        ``y [..., H]``, contiguous, in the dtype of ``x``.

    Numerics:
        Statistics in float32: each square is rounded, then added in a fixed tree that depends on H alone; mean, square
        root and reciprocal are IEEE operations. A row has the same bits in every batch, for every thread count and at
        every ISA level. NaN and infinity in a row make that row NaN. No subnormal is flushed.

    Raises:
        ValueError: shapes, strides, ``eps``, ``weight_offset`` or ``rounding`` do not fit.
        RuntimeError: a dtype or device without a kernel; an input requires grad while grad mode is on.

    Source:
        Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

    Example:
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> qops.rms_norm(x, torch.ones(2), eps=0.0)
        tensor([[0.8485, 1.1314]])
    """
    refuse_grad("rms_norm", x=x, weight=weight)
    return torch.ops.qops.rms_norm.default(x, weight, eps, weight_offset, rounding)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, weight_offset: float = 0.0, rounding: str = "hf"
) -> tuple[Tensor, Tensor]:
    """Adds a residual and normalises the sum: ``z = R(x + residual)``, ``y = rms_norm(z, weight, eps)``.

    One pass over memory instead of two. Bit for bit equal to ``z = x + residual`` followed by :func:`rms_norm`.

    Args:
        x: float32, float16 or bfloat16 ``[..., H]``; any leading dimensions and strides, last dimension dense.
        residual: same dtype and shape as ``x``, own strides.
        weight, eps, weight_offset, rounding: as in :func:`rms_norm`.

    Returns:
        ``(y, z)``, both ``[..., H]``, contiguous, in the dtype of ``x``; ``z`` is the next residual.

    Numerics:
        The sum is rounded once to the dtype; statistics and output are taken from the rounded sum. Otherwise as
        :func:`rms_norm`.

    Raises:
        ValueError: shapes, strides, ``eps``, ``weight_offset`` or ``rounding`` do not fit.
        RuntimeError: a dtype or device without a kernel; an input requires grad while grad mode is on.

    Source:
        As :func:`rms_norm`; the fusion follows the residual stream of Llama-family decoder layers.

    Example:
        >>> y, z = qops.add_rms_norm(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]]), torch.ones(2), eps=0.0)
        >>> z
        tensor([[3., 4.]])
    """
    refuse_grad("add_rms_norm", x=x, residual=residual, weight=weight)
    return torch.ops.qops.add_rms_norm.default(x, residual, weight, eps, weight_offset, rounding)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, *, weight_offset: float = 0.0, rounding: str = "hf") -> Tensor:
    """The formula of :func:`rms_norm` in float64, with R() where the contract rounds; float64 ``[..., H]``."""
    z = x.double()
    normed = z / torch.sqrt(z.square().mean(-1, keepdim=True) + eps)
    if rounding == "hf":
        normed = normed.to(x.dtype).double()
    return normed * (weight.double() + weight_offset)


@torch.library.register_fake("qops::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0, rounding: str = "hf") -> Tensor:
    check = Checker("rms_norm")
    check_rms_norm(check, x, weight, eps, weight_offset, rounding)
    return check.new_empty(x, x.shape)


@torch.library.register_fake("qops::add_rms_norm")
def _(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0, rounding: str = "hf"
) -> tuple[Tensor, Tensor]:
    check = Checker("add_rms_norm")
    check_rms_norm(check, x, weight, eps, weight_offset, rounding)
    check_second(check, residual, "residual", x, "x")
    return check.new_empty(x, x.shape), check.new_empty(x, x.shape)
