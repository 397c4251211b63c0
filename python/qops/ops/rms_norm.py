"""rms_norm and add_rms_norm: root-mean-square normalisation of the last dimension, alone or after a residual add."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qops import _native as _native
from qops.ops._checks import (
    Checker,
    Result,
    Results,
    check_rms_norm,
    check_second,
    derivatives_are_asked,
    fake,
    outputs,
    refuse_grad,
)

if TYPE_CHECKING:
    from qops._check_cases import Run


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    weight_offset: float = 0.0,
    rounding: str = "hf",
    out: Tensor | None = None,
) -> Tensor:
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
        out: the tensor to write to, contiguous, sharing no memory with the inputs, except that it may be ``x`` itself;
            default: a new one.

    Returns:
        ``y [..., H]``, contiguous, in the dtype of ``x``; ``out`` where it is given.

    Numerics:
        Statistics in float32: each square is rounded, then added in a fixed tree that depends on H alone; mean, square
        root and reciprocal are IEEE operations. A row has the same bits in every batch, for every thread count and at
        every ISA level. A NaN makes its row NaN; an infinity becomes NaN and makes the rest of its row zeros. No
        subnormal is flushed.

    Raises:
        ValueError: shapes, strides, ``eps``, ``weight_offset`` or ``rounding`` do not fit; ``out`` overlaps an input.
        RuntimeError: a dtype or device without a kernel; an input requires grad while grad mode is on.

    Source:
        Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

    Example:
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> qops.rms_norm(x, torch.ones(2), eps=0.0)
        tensor([[0.8485, 1.1314]])
    """
    if derivatives_are_asked():
        refuse_grad("rms_norm", x=x, weight=weight, out=out)
    if out is None:
        return torch.ops.qops.rms_norm.default(x, weight, eps, weight_offset, rounding)
    torch.ops.qops.rms_norm.out(x, weight, eps, weight_offset, rounding, out=out)
    return out


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    weight_offset: float = 0.0,
    rounding: str = "hf",
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds a residual and normalises the sum: ``z = R(x + residual)``, ``y = rms_norm(z, weight, eps)``.

    One pass over memory instead of two. Bit for bit equal to ``z = x + residual`` followed by :func:`rms_norm`.

    Args:
        x: float32, float16 or bfloat16 ``[..., H]``; any leading dimensions and strides, last dimension dense.
        residual: same dtype and shape as ``x``, own strides.
        weight, eps, weight_offset, rounding: as in :func:`rms_norm`.
        out: ``(y, z)`` to write to, contiguous, sharing no memory with each other nor with the inputs, except that
            ``y`` may be ``x`` itself and ``z`` may be ``residual`` itself; default: new tensors.

    Returns:
        ``(y, z)``, both ``[..., H]``, contiguous, in the dtype of ``x``; ``z`` is the next residual. ``out`` where it
        is given.

    Numerics:
        The sum is rounded once to the dtype; statistics and output are taken from the rounded sum. Otherwise as
        :func:`rms_norm`.

    Raises:
        ValueError: shapes, strides, ``eps``, ``weight_offset`` or ``rounding`` do not fit; ``out`` overlaps an input.
        RuntimeError: a dtype or device without a kernel; an input requires grad while grad mode is on.

    Source:
        As :func:`rms_norm`; the fusion follows the residual stream of Llama-family decoder layers.

    Example:
        >>> y, z = qops.add_rms_norm(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]]), torch.ones(2), eps=0.0)
        >>> z
        tensor([[3., 4.]])
    """
    if out is None:
        if derivatives_are_asked():
            refuse_grad("add_rms_norm", x=x, residual=residual, weight=weight)
        return torch.ops.qops.add_rms_norm.default(x, residual, weight, eps, weight_offset, rounding)
    y, z = outputs("add_rms_norm", out, "y", "residual_out")
    if derivatives_are_asked():
        refuse_grad("add_rms_norm", x=x, residual=residual, weight=weight, y=y, residual_out=z)
    torch.ops.qops.add_rms_norm.out(x, residual, weight, eps, weight_offset, rounding, y=y, residual_out=z)
    return out


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, *, weight_offset: float = 0.0, rounding: str = "hf") -> Tensor:
    """The formula of :func:`rms_norm` in float64, with R() where the contract rounds; float64 ``[..., H]``."""
    z = x.double()
    normed = z / torch.sqrt(z.square().mean(-1, keepdim=True) + eps)
    if rounding == "hf":
        normed = normed.to(x.dtype).double()
    return normed * (weight.double() + weight_offset)


def cases_of_rms_norm(run: Run) -> None:
    from qops._check_cases import EPS, norms
    from qops._numerics import rms_norm_bound, rms_norm_exact

    for x, weight, style in norms(run):
        w = run.there(weight)
        (y,) = run.rows(partial(rms_norm, weight=w, eps=EPS, **style), x)
        run.same(y, rms_norm_exact(x, weight, EPS, **style), "the contract's operations")
        offset, bound = style["weight_offset"], rms_norm_bound(x, weight, EPS, **style)
        run.within(y, rms_norm_ref(x, weight, EPS, weight_offset=offset, rounding="fp32"), bound)
        z = run.there(x).clone()
        run.same(rms_norm(z, w, EPS, **style, out=z), y, "in place")


def cases_of_add_rms_norm(run: Run) -> None:
    from qops._check_cases import EPS, norms
    from qops._numerics import rms_norm_exact

    for x, weight, style in norms(run):
        w, residual = run.there(weight), run.random(*x.shape, dtype=x.dtype)
        z = x + residual
        results = run.rows(partial(add_rms_norm, weight=w, eps=EPS, **style), x, residual)
        run.same(results, (rms_norm_exact(z, weight, EPS, **style), z), "x + residual, and rms_norm of it")
        a, b = run.there(x).clone(), run.there(residual).clone()
        run.same(add_rms_norm(a, b, w, EPS, **style, out=(a, b)), results, "in place")


@fake("rms_norm")
def _(
    check: Checker,
    x: Tensor,
    weight: Tensor,
    eps: float,
    weight_offset: float = 0.0,
    rounding: str = "hf",
    out: Tensor | None = None,
) -> Results:
    check_rms_norm(check, x, weight, eps, weight_offset, rounding)
    return check.results(x, Result("out", out, "[..., H]", x.shape, x.dtype))


@fake("add_rms_norm")
def _(
    check: Checker,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    weight_offset: float = 0.0,
    rounding: str = "hf",
    y: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Results:
    check_rms_norm(check, x, weight, eps, weight_offset, rounding)
    check_second(check, residual, "residual", x, "x")
    rows = "[..., H]", x.shape, x.dtype
    return check.results(x, Result("y", y, *rows), Result("residual_out", residual_out, *rows))
