"""quantize_int8, quantize_int8_asym, quantize_int8_static: activations to int8, one scale per token or one for all."""

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
    check_static_scale,
    derivatives_are_asked,
    fake,
    int8_results,
    outputs,
    refuse_grad,
    require_tensor,
)

if TYPE_CHECKING:
    from qops._check_cases import Run


def quantize_int8(x: Tensor, rule: str = "127", *, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Quantises each row (token) to int8 with a scale of its own: ``x[t, k]`` is near ``q[t, k] * scale[t]``.

    With ``a = max_k |x[t, k]|``, rne() one rounding to the nearest integer (ties to even), and R() one rounding to
    nearest even in the dtype of ``x``:

    * ``rule="127"``: ``scale = a / 127``, ``q = rne(x * (127 / a))`` in -127 .. 127. Where ``127 / a`` is not a finite
      float32 (a zero row, or ``a`` below 3.74e-37), ``q = 0`` and ``scale = 0``.
    * ``rule="compressed-tensors"``: ``scale = R(a / 127.5)``, and where that is 0, the distance from 1 to the next
      value of the dtype (2^-23 for float32, 2^-10 for float16, 2^-7 for bfloat16);
      ``q = clamp(rne(R(x / scale)), -128, 127)``.
    * ``rule="torchao"``: ``scale = max(R(a / 127.5), 2^-23)``, ``q = clamp(rne(x * (1 / scale)), -128, 127)``.

    Args:
        x: float32, float16 or bfloat16 ``[..., K]``; any leading dimensions and strides, last dimension dense.
        rule: ``"127"``, ``"compressed-tensors"`` or ``"torchao"``: a checkpoint is used with the rule of its producer.
        out: ``(q, scale)`` to write to, contiguous, sharing no memory with ``x``; default: new tensors.

    Returns:
        ``(q, scale)``: int8 ``[..., K]`` and float32 ``[...]``, contiguous; ``out`` where it is given.

    Numerics:
        Apart from R(), every quotient, product and rounding is one IEEE operation in float32; no subnormal is flushed.
        A row has the same bits in every batch, for every thread count and at every ISA level. The 127.5 rules give the
        bits of their packages on the CPU (compressed-tensors for a 3-dimensional input, its strategy ``token``).
        A row with NaN has ``q = 0`` and ``scale`` NaN. A row with an infinity has ``q = 0``, too; its ``scale`` is NaN
        by rule 127, infinity by the others. Either way every output that is made from it is NaN. An empty row (K = 0)
        is a zero row.

    Raises:
        ValueError: shapes, strides or ``rule`` do not fit; ``out`` overlaps ``x``.
        RuntimeError: a dtype or device without a kernel; an input requires grad while grad mode is on.

    Source:
        127: vLLM's ``dynamic_scaled_int8_quant``. The others: compressed-tensors 0.20
        (``compute_dynamic_scales_and_zp``, ``quantize``) and torchao 0.18 (``Int8Tensor.from_hp``).

    Example:
        >>> q, scale = qops.quantize_int8(torch.tensor([[-254.0, 3.0, 5.0], [0.0, 0.0, 0.0]]))
        >>> q
        tensor([[-127,    2,    2],
                [   0,    0,    0]], dtype=torch.int8)
        >>> scale
        tensor([2., 0.])
    """
    if derivatives_are_asked():
        refuse_grad("quantize_int8", x=x)
    require_tensor("quantize_int8", "x", x)
    if out is None:
        return torch.ops.qops.quantize_int8.default(x, rule)
    q, scale = outputs("quantize_int8", out, "q", "scale")
    torch.ops.qops.quantize_int8.out(x, rule, q=q, scale=scale)
    return out


def quantize_int8_asym(
    x: Tensor, rule: str = "255", *, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises each row (token) to int8 over its own range: ``x[t, k]`` is near ``(q - zero_point[t]) * scale[t]``.

    With ``low = min(min_k x[t, k], 0)``, ``high = max(max_k x[t, k], 0)``, rne() one rounding to the nearest integer
    (ties to even), and R() one rounding to nearest even in the dtype of ``x``:

    * ``rule="255"``: ``scale = (high - low) / 255``, ``zero_point = -128 - rne(low / scale)``,
      ``q = clamp(rne(x * (1 / scale)) + zero_point, -128, 127)``. Where ``1 / scale`` is not a finite float32 (a zero
      row, or a range below 7.5e-37), ``q``, ``scale`` and ``zero_point`` are 0.
    * ``rule="compressed-tensors"``: ``scale = R(R(high - low) / 255)``,
      ``zero_point = rne(clamp(R(-128 - R(low / scale)), -128, 127))``, then a ``scale`` of 0 becomes the distance from
      1 to the next value of the dtype (2^-23 for float32, 2^-10 for float16, 2^-7 for bfloat16), and
      ``q = rne(clamp(R(R(x / scale) + zero_point), -128, 127))``. The zero point of a zero row is 0.

    The range holds 0, and ``zero_point``, its code, lies in -128 .. 127.

    Args:
        x: float32, float16 or bfloat16 ``[..., K]``; any leading dimensions and strides, last dimension dense.
        rule: ``"255"`` or ``"compressed-tensors"``: a checkpoint is used with the rule of its producer.
        out: ``(q, scale, zero_point)`` to write to, contiguous, sharing no memory with ``x``; default: new tensors.

    Returns:
        ``(q, scale, zero_point)``: int8 ``[..., K]``, float32 ``[...]`` and int32 ``[...]``, contiguous; ``out`` where
        it is given.

    Numerics:
        Apart from R(), every difference, sum, quotient, product and rounding is one IEEE operation in float32; no
        subnormal is flushed. A row has the same bits in every batch, for every thread count and at every ISA level. A
        row with NaN or infinity, or whose ``high - low`` passes the largest value (of float32 by rule 255, else of the
        dtype), has ``q = 0`` and ``zero_point = 0``; its ``scale`` is NaN by rule 255 and where there is a NaN, else
        infinity. Either way every output that is made from it is NaN. An empty row (K = 0) is a zero row.

    Raises:
        ValueError: shapes, strides or ``rule`` do not fit; ``out`` overlaps ``x``.
        RuntimeError: a dtype or device without a kernel; an input requires grad while grad mode is on.

    Source:
        255: torchao's asymmetric mapping, whose bits it has for float32 rows with a scale of at least 2^-23; vLLM's
        ``dynamic_scaled_int8_quant`` with a zero point does the same for rows that hold both signs, but for ties.
        compressed-tensors 0.20 (``compute_dynamic_scales_and_zp``, ``quantize``) on the CPU, whose bits it has for a
        3-dimensional input, strategy ``token``, wherever the scale is finite.

    Example:
        >>> qops.quantize_int8_asym(torch.tensor([[0.0, 100.0, 255.0]]))
        (tensor([[-128,  -28,  127]], dtype=torch.int8), tensor([1.]), tensor([-128], dtype=torch.int32))
    """
    if derivatives_are_asked():
        refuse_grad("quantize_int8_asym", x=x)
    require_tensor("quantize_int8_asym", "x", x)
    if out is None:
        return torch.ops.qops.quantize_int8_asym.default(x, rule)
    q, scale, zero_point = outputs("quantize_int8_asym", out, "q", "scale", "zero_point")
    torch.ops.qops.quantize_int8_asym.out(x, rule, q=q, scale=scale, zero_point=zero_point)
    return out


def quantize_int8_static(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, rule: str = "torchao", *, out: Tensor | None = None
) -> Tensor:
    """Quantises to int8 with one scale that is known beforehand: ``x`` is near ``(q - zero_point) * scale``.

    With rne() one rounding to the nearest integer (ties to even), and R() one rounding to nearest even in the dtype of
    ``x``:

    * ``rule="torchao"``: ``q = clamp(rne(x * (1 / scale)) + zero_point, -128, 127)``.
    * ``rule="compressed-tensors"``: ``q = rne(clamp(R(R(x / scale) + zero_point), -128, 127))``.

    Args:
        x: float32, float16 or bfloat16 ``[..., K]``; any leading dimensions and strides, last dimension dense.
        scale: float32, one element, positive and finite.
        zero_point: int32, one element in -128 .. 127; default 0.
        rule: ``"torchao"`` or ``"compressed-tensors"``: a checkpoint is used with the rule of its producer.
        out: int8 ``[..., K]`` to write to, contiguous, sharing no memory with ``x``; default: a new tensor.

    Returns:
        ``q``: int8 ``[..., K]``, contiguous; ``out`` where it is given.

    Numerics:
        Apart from R(), the reciprocal, product, quotient and sums are IEEE operations in float32. An element has the
        same bits at every position, for every thread count and at every ISA level. Infinities saturate. NaN counts as
        0, as int8 cannot show it. With the scale and zero point that :func:`quantize_int8_asym` gives for a row, that
        row gets the same bits by rule "torchao" after "255", and by "compressed-tensors" after itself.

    Raises:
        ValueError: shapes, strides or ``rule`` do not fit; ``out`` overlaps ``x``; ``scale`` or ``zero_point`` is out
            of range (fake tensors have no values to look at).
        RuntimeError: a dtype or device without a kernel; an input requires grad while grad mode is on.

    Source:
        torchao's ``quantize_affine``, whose bits it has for finite x. compressed-tensors 0.20 (``quantize``, strategy
        ``tensor``) on the CPU, whose bits it has for an x without NaN and a scale in the dtype of x, as its runtime has
        it.

    Example:
        >>> qops.quantize_int8_static(torch.tensor([-1.0, 0.25, 0.75, 99.0]), torch.tensor(0.5))
        tensor([ -2,   0,   2, 127], dtype=torch.int8)
    """
    if derivatives_are_asked():
        refuse_grad("quantize_int8_static", x=x, scale=scale)
    if out is None:
        return torch.ops.qops.quantize_int8_static.default(x, scale, zero_point, rule)
    torch.ops.qops.quantize_int8_static.out(x, scale, zero_point, rule, q=out)
    return out


def quantize_int8_ref(x: Tensor, rule: str = "127") -> tuple[Tensor, Tensor]:
    """The contract of :func:`quantize_int8` bit for bit: float64 operations, rounded where the contract rounds."""
    wide = x.double()
    a = wide.abs().amax(-1) if x.shape[-1] > 0 else wide.new_zeros(x.shape[:-1])
    if rule == "127":
        factor = _rounded(127 / a)
        scale = torch.where(torch.isinf(factor), 0.0, _rounded(a / 127))
        scale = torch.where(torch.isfinite(a), scale, torch.nan)
        scaled = torch.where((torch.isfinite(a) & torch.isfinite(factor))[..., None], wide * factor[..., None], 0.0)
    else:
        scale = _rounded(a / 127.5, x.dtype)
        if rule == "compressed-tensors":
            scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
            scaled = _rounded(wide / scale[..., None], x.dtype)
        else:
            scale = torch.where(scale < 2.0**-23, 2.0**-23, scale)
            scaled = wide * _rounded(1 / scale)[..., None]
        scaled = torch.where(torch.isfinite(a)[..., None], scaled, 0.0)
    q = _rounded(scaled).round().clamp(-128, 127)
    return q.to(torch.int8), scale.float()


def _rounded(t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return t.to(torch.float32).to(dtype).double()


def quantize_int8_asym_ref(x: Tensor, rule: str = "255") -> tuple[Tensor, Tensor, Tensor]:
    """The contract of :func:`quantize_int8_asym` bit for bit: float64 operations, rounded where the contract rounds."""
    wide = torch.cat((x.double(), x.new_zeros((*x.shape[:-1], 1), dtype=torch.float64)), dim=-1)
    low, high = wide.amin(-1), wide.amax(-1)
    if rule == "compressed-tensors":
        scale = _rounded(_rounded(high - low, x.dtype) / 255, x.dtype)
        zero_point = _rounded(-128 - _rounded(low / scale, x.dtype), x.dtype)
        zero_point = torch.where(torch.isfinite(scale), zero_point.nan_to_num(0.0, 127.0).clamp(-128, 127).round(), 0.0)
        scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
        q = quantize_int8_static_ref(x, scale[..., None], zero_point[..., None], rule)
        q = torch.where(torch.isfinite(scale)[..., None], q, 0)
        return q.to(torch.int8), scale.float(), zero_point.to(torch.int32)
    width = _rounded(high - low)
    scale = _rounded(width / 255)
    factor = _rounded(1 / scale)
    finite, usable = torch.isfinite(width), torch.isfinite(width) & torch.isfinite(factor)
    zero_point = torch.where(usable, -128 - _rounded(low / scale).round(), 0.0)
    scaled = torch.where(usable[..., None], x.double() * factor[..., None], 0.0)
    q = torch.clamp(_rounded(scaled).round() + zero_point[..., None], -128, 127)
    scale = torch.where(finite, torch.where(usable, scale, 0.0), torch.nan)
    return q.to(torch.int8), scale.float(), zero_point.to(torch.int32)


def quantize_int8_static_ref(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, rule: str = "torchao"
) -> Tensor:
    """The contract of :func:`quantize_int8_static` bit for bit: float64 operations, rounded where it rounds."""
    zero = 0 if zero_point is None else zero_point
    if rule == "compressed-tensors":
        quotient = _rounded(x.double() / scale.double(), x.dtype).nan_to_num(0.0, torch.inf, -torch.inf)
        shifted = _rounded(quotient + zero, x.dtype)
    else:
        scaled = _rounded(x.double() * _rounded(1 / scale.double())).nan_to_num(0.0, torch.inf, -torch.inf)
        shifted = scaled.round() + zero
    return shifted.clamp(-128, 127).round().to(torch.int8)


def cases_of_quantize_int8(run: Run) -> None:
    from qops._check_cases import activations

    for x, rule in activations(run, RULES):
        results = run.rows(partial(quantize_int8, rule=rule), x)
        run.same(results, quantize_int8_ref(x, rule), "the contract's operations")


def cases_of_quantize_int8_asym(run: Run) -> None:
    from qops._check_cases import activations

    for x, rule in activations(run, ("255", "compressed-tensors")):
        results = run.rows(partial(quantize_int8_asym, rule=rule), x)
        run.same(results, quantize_int8_asym_ref(x, rule), "the contract's operations")


def cases_of_quantize_int8_static(run: Run) -> None:
    from qops._check_cases import activations

    scale = torch.tensor(0.037)
    for x, zero_point, rule in activations(run, ("", -7), ("torchao", "compressed-tensors")):
        zero = torch.tensor(zero_point, dtype=torch.int32) if zero_point else None
        static = {"scale": run.there(scale), "zero_point": run.there(zero)}
        results = run.rows(partial(quantize_int8_static, **static, rule=rule), x)
        run.same(results, quantize_int8_static_ref(x, scale, zero, rule), "the contract's operations")


def _check_x(check: Checker, x: Tensor) -> None:
    check.float_dtype(x, "x")
    check.at_least_1d(x, "x")
    check.dense_last_dim(x, "x")
    check.rows(x, "x")


@fake("quantize_int8")
def _(check: Checker, x: Tensor, rule: str = "127", q: Tensor | None = None, scale: Tensor | None = None) -> Results:
    _check_x(check, x)
    check.one_of(rule, "rule", *RULES)
    return check.results(x, *int8_results(x, x.shape[-1], q, scale))


@fake("quantize_int8_asym")
def _(
    check: Checker,
    x: Tensor,
    rule: str = "255",
    q: Tensor | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> Results:
    _check_x(check, x)
    check.one_of(rule, "rule", "255", "compressed-tensors")
    zeros = Result("zero_point", zero_point, "[...]", x.shape[:-1], torch.int32)
    return check.results(x, *int8_results(x, x.shape[-1], q, scale), zeros)


@fake("quantize_int8_static")
def _(
    check: Checker,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    rule: str = "torchao",
    q: Tensor | None = None,
) -> Results:
    _check_x(check, x)
    check.one_of(rule, "rule", "torchao", "compressed-tensors")
    check_static_scale(check, scale=scale, zero_point=zero_point)
    return check.results(x, Result("q", q, "[..., K]", x.shape, torch.int8))
