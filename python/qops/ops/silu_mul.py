"""silu_mul: the gate of a SwiGLU block, silu(gate) * up."""

from __future__ import annotations

import torch
from torch import Tensor

from qops import _native as _native
from qops.ops._checks import Checker, check_silu_mul, refuse_grad


def silu_mul(gate: Tensor, up: Tensor | None = None, /, *, rounding: str = "hf", out: Tensor | None = None) -> Tensor:
    """Multiplies the SiLU of a gate with a second projection: ``silu_mul(gate_up)`` or ``silu_mul(gate, up)``.

    ``silu(g) = g / (1 + exp(-g))``, then with R() one rounding to nearest even in the dtype of ``gate``:

    * ``rounding="hf"``: ``y = R(R(silu(gate)) * up)``, as Hugging Face Transformers' ``act_fn(gate) * up``;
    * ``rounding="fp32"``: ``y = R(silu(gate) * up)``.

    Args:
        gate: float32, float16 or bfloat16 ``[..., I]``; without ``up`` it is the merged ``gate_up [..., 2 I]``, gate
            first. Any leading dimensions and strides, last dimension dense.
        up: same dtype and shape as ``gate``, own strides.
        rounding: ``"hf"`` or ``"fp32"``.
        out: the tensor to write to, contiguous, sharing no memory with the inputs, except that it may be ``gate`` or
            ``up`` itself where both are given; default: a new one.

    Returns:
        ``y [..., I]``, contiguous, in the dtype of ``gate``; ``out`` where it is given.

    Numerics:
        In float32: negation, exp, sum, IEEE division, product. exp is one polynomial in fused multiply-adds
        (csrc/exp_poly.h) within 0.91 ulp, silu is within 2.4 ulp of float32 where exp(-g) is finite. An element has the
        same bits at every position, in every batch, for every thread count and at every ISA level (NaN equals NaN).
        No subnormal is flushed. The formula holds as written, as in PyTorch: ``silu(-inf)`` is NaN, and where exp(-g)
        overflows, below g = -88.7228, silu is -0 (its true value there is above -3e-37).

    Raises:
        ValueError: shapes, strides or ``rounding`` do not fit; ``out`` overlaps an input.
        RuntimeError: a dtype or device without a kernel; an input requires grad while grad mode is on.

    Source:
        Shazeer, "GLU Variants Improve Transformer", 2020.

    Example:
        >>> qops.silu_mul(torch.tensor([1.0, -1.0, 2.0, 2.0]))
        tensor([ 1.4621, -0.5379])
    """
    refuse_grad("silu_mul", gate=gate, up=up, out=out)
    op = torch.ops.qops.silu_mul
    if out is None:
        return op.default(gate, rounding) if up is None else op.apart(gate, up, rounding)
    if up is None:
        op.out(gate, rounding, out=out)
    else:
        op.apart_out(gate, up, rounding, out=out)
    return out


def silu_mul_ref(gate: Tensor, up: Tensor, *, rounding: str = "hf") -> Tensor:
    """The formula of :func:`silu_mul` in float64, with R() where the contract rounds; float64 ``[..., I]``."""
    g = gate.double()
    activation = g / (1 + torch.exp(-g))
    if rounding == "hf":
        activation = activation.to(gate.dtype).double()
    return activation * up.double()


@torch.library.register_fake("qops::silu_mul")
def _(gate_up: Tensor, rounding: str = "hf") -> Tensor:
    check = Checker("silu_mul")
    columns = check_silu_mul(check, gate_up, rounding=rounding)
    return check.new_empty(gate_up, (*gate_up.shape[:-1], columns))


@torch.library.register_fake("qops::silu_mul.apart")
def _(gate: Tensor, up: Tensor, rounding: str = "hf") -> Tensor:
    check = Checker("silu_mul")
    check.tensors({"gate": gate, "up": up})
    check_silu_mul(check, gate, up, rounding=rounding)
    return check.new_empty(gate, gate.shape)


# Which memory overlaps, only the kernel can see.
@torch.library.register_fake("qops::silu_mul.out")
def _(gate_up: Tensor, rounding: str = "hf", *, out: Tensor) -> None:
    check = Checker("silu_mul")
    check.tensors({"gate_up": gate_up, "out": out})
    columns = check_silu_mul(check, gate_up, rounding=rounding)
    check.output(out, "out", gate_up.dtype, "[..., I]", (*gate_up.shape[:-1], columns))


@torch.library.register_fake("qops::silu_mul.apart_out")
def _(gate: Tensor, up: Tensor, rounding: str = "hf", *, out: Tensor) -> None:
    check = Checker("silu_mul")
    check.tensors({"gate": gate, "up": up, "out": out})
    check_silu_mul(check, gate, up, rounding=rounding)
    check.output(out, "out", gate.dtype, "[..., I]", gate.shape)
