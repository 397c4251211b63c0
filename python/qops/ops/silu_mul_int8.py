"""silu_mul_int8: the gate of a SwiGLU block as per-token int8."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from qops import _native as _native
from qops.ops._checks import (
    RULES,
    Checker,
    Results,
    check_silu_mul,
    derivatives_are_asked,
    fake,
    gate_and_up,
    int8_results,
    outputs,
    refuse_grad,
)

if TYPE_CHECKING:
    from qops._check_cases import Run


@overload
def silu_mul_int8(
    gate_up: Tensor, *, rounding: str = "hf", rule: str = "127", out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]: ...
@overload
def silu_mul_int8(
    gate: Tensor, up: Tensor, *, rounding: str = "hf", rule: str = "127", out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]: ...
def silu_mul_int8(  # pyright: ignore[reportInconsistentOverload]: by position or by name
    first: Tensor | None = None,
    second: Tensor | None = None,
    /,
    *,
    gate_up: Tensor | None = None,
    gate: Tensor | None = None,
    up: Tensor | None = None,
    rounding: str = "hf",
    rule: str = "127",
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Multiplies the SiLU of a gate with a second projection and quantises: ``quantize_int8(silu_mul(...), rule)``.

    Takes ``silu_mul_int8(gate_up)`` or ``silu_mul_int8(gate, up)``; one pass over memory instead of two.

    Args:
        first, second: what follows, by position: one is ``gate_up``, two are ``gate`` and ``up``.
        gate_up: both merged, float32, float16 or bfloat16 ``[..., 2 I]``, gate first. Any leading dimensions and
            strides, last dimension dense.
        gate, up: or apart, each ``[..., I]``, of one dtype and shape, with strides of their own, else the same.
        rounding: ``"hf"`` or ``"fp32"``, as in :func:`qops.silu_mul`.
        rule: ``"127"``, ``"compressed-tensors"`` or ``"torchao"``, as in :func:`qops.quantize_int8`.
        out: ``(q, scale)`` to write to, contiguous, sharing no memory with the inputs; default: new tensors.

    Returns:
        ``(q, scale)``: int8 ``[..., I]`` and float32 ``[...]``, contiguous; ``out`` where it is given.

    Numerics:
        Bit for bit those of :func:`qops.silu_mul` followed by :func:`qops.quantize_int8`: the product is rounded to the
        dtype of the inputs before it is quantised.

    Raises:
        TypeError: the tensors are neither ``gate_up`` alone nor ``gate`` and ``up``.
        ValueError: shapes, strides, ``rounding`` or ``rule`` do not fit; ``out`` overlaps an input.
        RuntimeError: a dtype or device without a kernel; an input requires grad while grad mode is on.

    Source:
        As :func:`qops.silu_mul` and :func:`qops.quantize_int8`.

    Example:
        >>> q, scale = qops.silu_mul_int8(torch.tensor([1.0, -1.0, 2.0, 2.0]))
        >>> q
        tensor([127, -47], dtype=torch.int8)
    """
    if first is None or gate_up is not None or gate is not None or up is not None:
        first, second = gate_and_up("silu_mul_int8", first, second, gate_up, gate, up)
    if derivatives_are_asked():
        refuse_grad("silu_mul_int8", gate=first, up=second)
    op = torch.ops.qops.silu_mul_int8
    if out is None:
        return op.default(first, rounding, rule) if second is None else op.apart(first, second, rounding, rule)
    q, scale = outputs("silu_mul_int8", out, "q", "scale")
    if second is None:
        op.out(first, rounding, rule, q=q, scale=scale)
    else:
        op.apart_out(first, second, rounding, rule, q=q, scale=scale)
    return out


def cases_of_silu_mul_int8(run: Run) -> None:
    from qops._check_cases import activations
    from qops.ops.quantize_int8 import quantize_int8_ref
    from qops.ops.silu_mul import silu_mul

    for x, rounding, rule in activations(run, ("hf", "fp32"), RULES):
        call = partial(silu_mul_int8, rounding=rounding, rule=rule)
        gate_up = torch.cat((x, run.random(*x.shape, dtype=x.dtype)), dim=-1)
        results = run.rows(call, gate_up)
        run.same(run.rows(call, *gate_up.chunk(2, dim=-1)), results, "gate and up apart")
        y = silu_mul(run.there(gate_up), rounding=rounding).cpu()
        run.same(results, quantize_int8_ref(y, rule), "silu_mul, then quantize_int8")


@fake("silu_mul_int8")
def _(
    check: Checker,
    gate_up: Tensor | None = None,
    gate: Tensor | None = None,
    up: Tensor | None = None,
    rounding: str = "hf",
    rule: str = "127",
    q: Tensor | None = None,
    scale: Tensor | None = None,
) -> Results:
    like, sizes = check_silu_mul(check, gate_up, gate, up, rounding)
    check.one_of(rule, "rule", *RULES)
    return check.results(like, *int8_results(like, sizes[-1], q, scale))
