"""silu_mul_int8: the gate of a SwiGLU block as per-token int8."""

from __future__ import annotations

import torch
from torch import Tensor

from qops import _native as _native
from qops.ops._checks import Checker, check_int8_rows, check_silu_mul, new_int8_rows, outputs, refuse_grad


def silu_mul_int8(
    gate: Tensor,
    up: Tensor | None = None,
    /,
    *,
    rounding: str = "hf",
    rule: str = "127",
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Multiplies the SiLU of a gate with a second projection and quantises: ``quantize_int8(silu_mul(...), rule)``.

    Takes ``silu_mul_int8(gate_up)`` or ``silu_mul_int8(gate, up)``; one pass over memory instead of two.

    Args:
        gate: float32, float16 or bfloat16 ``[..., I]``; without ``up`` it is the merged ``gate_up [..., 2 I]``, gate
            first. Any leading dimensions and strides, last dimension dense.
        up: same dtype and shape as ``gate``, own strides.
        rounding: ``"hf"`` or ``"fp32"``, as in :func:`qops.silu_mul`.
        rule: ``"127"``, ``"compressed-tensors"`` or ``"torchao"``, as in :func:`qops.quantize_int8`.
        out: ``(q, scale)`` to write to, contiguous, sharing no memory with the inputs; default: new tensors.

    Returns:
        ``(q, scale)``: int8 ``[..., I]`` and float32 ``[...]``, contiguous; ``out`` where it is given.

    Numerics:
        Bit for bit those of :func:`qops.silu_mul` followed by :func:`qops.quantize_int8`: the product is rounded to the
        dtype of ``gate`` before it is quantised.

    Raises:
        ValueError: shapes, strides, ``rounding`` or ``rule`` do not fit; ``out`` overlaps an input.
        RuntimeError: a dtype or device without a kernel; an input requires grad while grad mode is on.

    Source:
        As :func:`qops.silu_mul` and :func:`qops.quantize_int8`.

    Example:
        >>> q, scale = qops.silu_mul_int8(torch.tensor([1.0, -1.0, 2.0, 2.0]))
        >>> q
        tensor([127, -47], dtype=torch.int8)
    """
    refuse_grad("silu_mul_int8", gate=gate, up=up)
    op = torch.ops.qops.silu_mul_int8
    if out is None:
        return op.default(gate, rounding, rule) if up is None else op.apart(gate, up, rounding, rule)
    q, scale = outputs("silu_mul_int8", out, "q", "scale")
    if up is None:
        op.out(gate, rounding, rule, q=q, scale=scale)
    else:
        op.apart_out(gate, up, rounding, rule, q=q, scale=scale)
    return out


def _check(gate: dict[str, Tensor], rounding: str, rule: str) -> tuple[Checker, int]:
    """gate_up alone, or gate and up."""
    check = Checker("silu_mul_int8")
    check.tensors(gate)
    columns = check_silu_mul(check, *gate.values(), rounding=rounding)
    check.quantize_rule(rule)
    return check, columns


# Which memory overlaps, only the kernel can see.
@torch.library.register_fake("qops::silu_mul_int8")
def _(gate_up: Tensor, rounding: str = "hf", rule: str = "127") -> tuple[Tensor, Tensor]:
    check, columns = _check({"gate_up": gate_up}, rounding, rule)
    return new_int8_rows(check, gate_up, columns)


@torch.library.register_fake("qops::silu_mul_int8.apart")
def _(gate: Tensor, up: Tensor, rounding: str = "hf", rule: str = "127") -> tuple[Tensor, Tensor]:
    check, columns = _check({"gate": gate, "up": up}, rounding, rule)
    return new_int8_rows(check, gate, columns)


@torch.library.register_fake("qops::silu_mul_int8.out")
def _(gate_up: Tensor, rounding: str = "hf", rule: str = "127", *, q: Tensor, scale: Tensor) -> None:
    check, columns = _check({"gate_up": gate_up}, rounding, rule)
    check_int8_rows(check, q, scale, gate_up, columns)


@torch.library.register_fake("qops::silu_mul_int8.apart_out")
def _(gate: Tensor, up: Tensor, rounding: str = "hf", rule: str = "127", *, q: Tensor, scale: Tensor) -> None:
    check, columns = _check({"gate": gate, "up": up}, rounding, rule)
    check_int8_rows(check, q, scale, gate, columns)
