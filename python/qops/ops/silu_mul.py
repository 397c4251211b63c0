"""silu_mul: the gate of a SwiGLU block, silu(gate) * up."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from qops import _native as _native
from qops.ops._checks import (
    Checker,
    Result,
    Results,
    check_silu_mul,
    derivatives_are_asked,
    fake,
    gate_and_up,
    refuse_grad,
)

if TYPE_CHECKING:
    from qops._check_cases import Run


@overload
def silu_mul(gate_up: Tensor, *, rounding: str = "hf", out: Tensor | None = None) -> Tensor: ...
@overload
def silu_mul(gate: Tensor, up: Tensor, *, rounding: str = "hf", out: Tensor | None = None) -> Tensor: ...
def silu_mul(  # pyright: ignore[reportInconsistentOverload]: by position or by name
    first: Tensor | None = None,
    second: Tensor | None = None,
    /,
    *,
    gate_up: Tensor | None = None,
    gate: Tensor | None = None,
    up: Tensor | None = None,
    rounding: str = "hf",
    out: Tensor | None = None,
) -> Tensor:
    """Multiplies the SiLU of a gate with a second projection: ``silu_mul(gate_up)`` or ``silu_mul(gate, up)``.

    ``silu(g) = g / (1 + exp(-g))``, then with R() one rounding to nearest even in the dtype of the inputs:

    * ``rounding="hf"``: ``y = R(R(silu(gate)) * up)``, as Hugging Face Transformers' ``act_fn(gate) * up``;
    * ``rounding="fp32"``: ``y = R(silu(gate) * up)``.

    Args:
        first, second: what follows, by position: one is ``gate_up``, two are ``gate`` and ``up``.
        gate_up: both merged, float32, float16 or bfloat16 ``[..., 2 I]``, gate first. Any leading dimensions and
            strides, last dimension dense.
        gate, up: or apart, each ``[..., I]``, of one dtype and shape, with strides of their own, else the same.
        rounding: ``"hf"`` or ``"fp32"``.
        out: the tensor to write to, contiguous, sharing no memory with the inputs, except that it may be ``gate`` or
            ``up`` itself where both are given; default: a new one.

    Returns:
        ``y [..., I]``, contiguous, in the dtype of the inputs; ``out`` where it is given.

    Numerics:
        In float32: negation, exp, sum, IEEE division, product. exp is one polynomial in fused multiply-adds
        (csrc/exp_poly.h) within 0.91 ulp, silu is within 2.4 ulp of float32 where exp(-g) is finite. An element has the
        same bits at every position, in every batch, for every thread count and at every ISA level (NaN equals NaN).
        No subnormal is flushed. The formula holds as written, as in PyTorch: ``silu(-inf)`` is NaN, and where exp(-g)
        overflows, below g = -88.7228, silu is -0 (its true value there is above -3e-37).

    Raises:
        TypeError: the tensors are neither ``gate_up`` alone nor ``gate`` and ``up``.
        ValueError: shapes, strides or ``rounding`` do not fit; ``out`` overlaps an input.
        RuntimeError: a dtype or device without a kernel; an input requires grad while grad mode is on.

    Source:
        Shazeer, "GLU Variants Improve Transformer", 2020.

    Example:
        >>> qops.silu_mul(torch.tensor([1.0, -1.0, 2.0, 2.0]))
        tensor([ 1.4621, -0.5379])
    """
    if first is None or gate_up is not None or gate is not None or up is not None:
        first, second = gate_and_up("silu_mul", first, second, gate_up, gate, up)
    if derivatives_are_asked():
        refuse_grad("silu_mul", gate=first, up=second, out=out)
    op = torch.ops.qops.silu_mul
    if out is None:
        return op.default(first, rounding) if second is None else op.apart(first, second, rounding)
    if second is None:
        op.out(first, rounding, out=out)
    else:
        op.apart_out(first, second, rounding, out=out)
    return out


def silu_mul_ref(gate: Tensor, up: Tensor, *, rounding: str = "hf") -> Tensor:
    """The formula of :func:`silu_mul` in float64, with R() where the contract rounds; float64 ``[..., I]``."""
    g = gate.double()
    activation = g / (1 + torch.exp(-g))
    if rounding == "hf":
        activation = activation.to(gate.dtype).double()
    return activation * up.double()


def cases_of_silu_mul(run: Run) -> None:
    from qops._check_cases import activations
    from qops._numerics import silu_mul_bound

    for x, rounding in activations(run, ("hf", "fp32")):
        gate_up = torch.cat((x, run.random(*x.shape, dtype=x.dtype)), dim=-1)
        gate, up = gate_up.chunk(2, dim=-1)
        (y,) = run.rows(partial(silu_mul, rounding=rounding), gate_up)
        apart = run.rows(partial(silu_mul, rounding=rounding), gate, up)
        run.same(apart, y, "gate and up apart")
        bound = silu_mul_bound(gate, up, x.dtype, rounding=rounding)
        run.within(y, silu_mul_ref(gate, up, rounding="fp32"), bound)
        g, u = run.there(gate).clone(), run.there(up)
        run.same(silu_mul(g, u, rounding=rounding, out=g), y, "in place")


@fake("silu_mul")
def _(
    check: Checker,
    gate_up: Tensor | None = None,
    gate: Tensor | None = None,
    up: Tensor | None = None,
    rounding: str = "hf",
    out: Tensor | None = None,
) -> Results:
    like, sizes = check_silu_mul(check, gate_up, gate, up, rounding)
    return check.results(like, Result("out", out, "[..., I]", sizes, like.dtype))
