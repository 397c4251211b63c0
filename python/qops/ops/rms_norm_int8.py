"""rms_norm_int8 and add_rms_norm_int8: root-mean-square normalisation that emits per-token int8."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qops import _native as _native
from qops.ops._checks import (
    RULES,
    Checker,
    Result,
    Results,
    check_rms_norm,
    check_second,
    derivatives_are_asked,
    fake,
    int8_results,
    outputs,
    refuse_grad,
)

if TYPE_CHECKING:
    from qops._check_cases import Run


def rms_norm_int8(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    weight_offset: float = 0.0,
    rounding: str = "hf",
    rule: str = "127",
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalises each row and quantises it: ``quantize_int8(rms_norm(x, weight, eps), rule)`` in one pass over memory.

    Args:
        x: float32, float16 or bfloat16 ``[..., H]``; any leading dimensions and strides, last dimension dense.
        weight, eps, weight_offset, rounding: as in :func:`qops.rms_norm`.
        rule: ``"127"``, ``"compressed-tensors"`` or ``"torchao"``, as in :func:`qops.quantize_int8`.
        out: ``(q, scale)`` to write to, contiguous, sharing no memory with the inputs; default: new tensors.

    Returns:
        ``(q, scale)``: int8 ``[..., H]`` and float32 ``[...]``, contiguous; ``out`` where it is given.

    Numerics:
        Bit for bit those of :func:`qops.rms_norm` followed by :func:`qops.quantize_int8`: the normalised row is rounded
        to the dtype of ``x`` before it is quantised.

    Raises:
        ValueError: shapes, strides, ``eps``, ``weight_offset``, ``rounding`` or ``rule`` do not fit; ``out`` overlaps
            an input.
        RuntimeError: a dtype or device without a kernel; an input requires grad while grad mode is on.

    Source:
        As :func:`qops.rms_norm` and :func:`qops.quantize_int8`; the fusion is that of vLLM's
        ``rms_norm_dynamic_per_token_quant``, which does not round the normalised row.

    Example:
        >>> q, scale = qops.rms_norm_int8(torch.tensor([[3.0, 4.0]]), torch.ones(2), eps=0.0)
        >>> q
        tensor([[ 95, 127]], dtype=torch.int8)
    """
    if derivatives_are_asked():
        refuse_grad("rms_norm_int8", x=x, weight=weight)
    if out is None:
        return torch.ops.qops.rms_norm_int8.default(x, weight, eps, weight_offset, rounding, rule)
    q, scale = outputs("rms_norm_int8", out, "q", "scale")
    torch.ops.qops.rms_norm_int8.out(x, weight, eps, weight_offset, rounding, rule, q=q, scale=scale)
    return out


def add_rms_norm_int8(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    weight_offset: float = 0.0,
    rounding: str = "hf",
    rule: str = "127",
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds a residual, normalises the sum and quantises it: ``z = R(x + residual)``, then :func:`rms_norm_int8` of z.

    One pass over memory instead of three.

    Args:
        x: float32, float16 or bfloat16 ``[..., H]``; any leading dimensions and strides, last dimension dense.
        residual: same dtype and shape as ``x``, own strides.
        weight, eps, weight_offset, rounding: as in :func:`qops.rms_norm`.
        rule: ``"127"``, ``"compressed-tensors"`` or ``"torchao"``, as in :func:`qops.quantize_int8`.
        out: ``(q, scale, z)`` to write to, contiguous, sharing no memory with each other nor with the inputs, except
            that ``z`` may be ``residual`` itself; default: new tensors.

    Returns:
        ``(q, scale, z)``: int8 ``[..., H]``, float32 ``[...]``, and the next residual ``[..., H]`` in the dtype of
        ``x``, contiguous; ``out`` where it is given.

    Numerics:
        Bit for bit those of ``z = x + residual``, :func:`qops.rms_norm` and :func:`qops.quantize_int8` one after
        another.

    Raises:
        ValueError: shapes, strides, ``eps``, ``weight_offset``, ``rounding`` or ``rule`` do not fit; ``out`` overlaps
            an input.
        RuntimeError: a dtype or device without a kernel; an input requires grad while grad mode is on.

    Source:
        As :func:`rms_norm_int8`; the fusion follows the residual stream of Llama-family decoder layers.

    Example:
        >>> x, residual = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]])
        >>> q, scale, z = qops.add_rms_norm_int8(x, residual, torch.ones(2), eps=0.0)
        >>> q, z
        (tensor([[ 95, 127]], dtype=torch.int8), tensor([[3., 4.]]))
    """
    if derivatives_are_asked():
        refuse_grad("add_rms_norm_int8", x=x, residual=residual, weight=weight)
    if out is None:
        return torch.ops.qops.add_rms_norm_int8.default(x, residual, weight, eps, weight_offset, rounding, rule)
    q, scale, z = outputs("add_rms_norm_int8", out, "q", "scale", "z")
    torch.ops.qops.add_rms_norm_int8.out(
        x, residual, weight, eps, weight_offset, rounding, rule, q=q, scale=scale, residual_out=z
    )
    return out


def cases_of_rms_norm_int8(run: Run) -> None:
    from qops._check_cases import EPS, norms
    from qops._numerics import rms_norm_exact
    from qops.ops.quantize_int8 import quantize_int8_ref

    for index, (x, weight, style) in enumerate(norms(run)):
        w, rule = run.there(weight), RULES[index % 3]
        results = run.rows(partial(rms_norm_int8, weight=w, eps=EPS, rule=rule, **style), x)
        want = quantize_int8_ref(rms_norm_exact(x, weight, EPS, **style), rule)
        run.same(results, want, f"rms_norm, then quantize_int8 by {rule}")


def cases_of_add_rms_norm_int8(run: Run) -> None:
    from qops._check_cases import EPS, norms
    from qops._numerics import rms_norm_exact
    from qops.ops.quantize_int8 import quantize_int8_ref

    for index, (x, weight, style) in enumerate(norms(run)):
        w, rule, residual = run.there(weight), RULES[index % 3], run.random(*x.shape, dtype=x.dtype)
        z = x + residual
        results = run.rows(partial(add_rms_norm_int8, weight=w, eps=EPS, rule=rule, **style), x, residual)
        want = (*quantize_int8_ref(rms_norm_exact(z, weight, EPS, **style), rule), z)
        run.same(results, want, f"x + residual, rms_norm, then quantize_int8 by {rule}")


@fake("rms_norm_int8")
def _(
    check: Checker,
    x: Tensor,
    weight: Tensor,
    eps: float,
    weight_offset: float = 0.0,
    rounding: str = "hf",
    rule: str = "127",
    q: Tensor | None = None,
    scale: Tensor | None = None,
) -> Results:
    check_rms_norm(check, x, weight, eps, weight_offset, rounding)
    check.one_of(rule, "rule", *RULES)
    return check.results(x, *int8_results(x, x.shape[-1], q, scale))


@fake("add_rms_norm_int8")
def _(
    check: Checker,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    weight_offset: float = 0.0,
    rounding: str = "hf",
    rule: str = "127",
    q: Tensor | None = None,
    scale: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Results:
    check_rms_norm(check, x, weight, eps, weight_offset, rounding)
    check.one_of(rule, "rule", *RULES)
    check_second(check, residual, "residual", x, "x")
    z = Result("residual_out", residual_out, "[..., H]", x.shape, x.dtype)
    return check.results(x, *int8_results(x, x.shape[-1], q, scale), z)
