"""qk_norm_rotary and qk_norm_rotary_: RMSNorm of every head of q and k, then rotary, in one pass over memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qops import _native as _native
from qops.ops._checks import Checker, Results, check_rotary, derivatives_are_asked, fake, refuse_grad

if TYPE_CHECKING:
    from qops._check_cases import Run


def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
    weight_offset: float = 0.0,
    rounding: str = "hf",
) -> tuple[Tensor, Tensor]:
    """Normalises every head of q and k by its root mean square and rotates it: :func:`rms_norm`, then :func:`rotary`.

    For each head ``x [D]`` of q, and likewise of k with ``k_weight``: ``rstd = 1 / sqrt(sum_d x[d]^2 / D + eps)``, then
    with R() one rounding to nearest even in the dtype of ``q``

    * ``z = R(R(x * rstd) * q_weight)`` with ``rounding="hf"`` (Qwen3), or
      ``z = R(x * rstd * (q_weight + weight_offset))`` with ``"fp32"`` (Gemma 3, offset 1);
    * ``y1 = R(z1 * c - z2 * s)``, ``y2 = R(z2 * c + z1 * s)`` for the pairs of its first R elements; the other D - R
      elements are ``y = z``.

    One pass over memory instead of two, and two tensors fewer.

    Args:
        q: float32, float16 or bfloat16 ``[..., T, Hq, D]``; any strides, with at most 4 leading dimensions that cannot
            be merged.
        k: same dtype, ``[..., T, Hk, D]``; Hk may differ from Hq. May be a view of the same tensor as ``q``, as slices
            of a merged qkv projection are.
        q_weight, k_weight: float32, float16 or bfloat16 ``[D]``, dense; independent of the dtype of ``q`` and of each
            other.
        cos, sin: float32 or the dtype of ``q``, ``[P, R/2]`` with R <= D, as in :func:`qops.rotary`.
        eps: added to the mean of squares.
        positions: int32 or int64 ``[T]`` or ``[..., T]``, rows of cos and sin. Without it token t of every sequence is
            at position t, and P must be at least T.
        interleaved: pairs are ``(2 i, 2 i + 1)`` instead of ``(i, i + R/2)``.
        weight_offset: added to the weights in float32 (1.0 for Gemma); needs ``rounding="fp32"`` when not zero.
        rounding: ``"hf"`` or ``"fp32"``, as in :func:`qops.rms_norm`.

    Returns:
        ``(q, k)`` normalised and rotated, contiguous, in the dtype of ``q``.

    Numerics:
        Bit for bit those of :func:`qops.rms_norm` of the (contiguous) heads followed by :func:`qops.rotary`: the order
        of a head's sum depends on D alone, and the normalised head is rounded to the dtype before it is rotated. A
        token has the same bits in every batch, for every thread count and at every ISA level (NaN equals NaN). A NaN
        makes its head NaN; an infinity makes itself and its pair NaN and the rest of its head zeros. No other head
        notices.

    Raises:
        ValueError: shapes, strides, ``rounding`` or ``weight_offset`` do not fit; a position lies outside [0, P) (on
            the CPU, before anything is written).
        RuntimeError: a dtype or device without a kernel; an input requires grad while grad mode is on.

    Source:
        As :func:`qops.rms_norm` and :func:`qops.rotary`; the normalisation of queries and keys is that of Qwen3
        (2025) and Gemma 3 (2025), after Henry et al., "Query-Key Normalization for Transformers", 2020.

    Example:
        >>> q = torch.tensor([[[2.0, 0.0]]])  # T = 1, H = 1, D = 2
        >>> one = torch.ones(2)
        >>> qops.qk_norm_rotary(q, q + 2, one, one, torch.tensor([[0.6]]), torch.tensor([[0.8]]), eps=0.0)
        (tensor([[[0.8485, 1.1314]]]), tensor([[[0.2530, 1.3914]]]))
    """
    if derivatives_are_asked():
        refuse_grad("qk_norm_rotary", q=q, k=k, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin)
    return torch.ops.qops.qk_norm_rotary.default(
        q, k, q_weight, k_weight, cos, sin, eps, positions, interleaved, weight_offset, rounding
    )


def qk_norm_rotary_(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
    weight_offset: float = 0.0,
    rounding: str = "hf",
) -> None:
    """:func:`qk_norm_rotary` in place: ``q`` and ``k`` hold the result, bit for bit; it allocates no tensor.

    Args:
        q, k: as in :func:`qk_norm_rotary`, any strides. Each must hold every element once (an expanded tensor does
            not), and the two must not overlap each other, nor the other tensors. Slices of one tensor, as q and k of a
            merged qkv projection, are fine.
        q_weight, k_weight, cos, sin, eps, positions, interleaved, weight_offset, rounding: as in
            :func:`qk_norm_rotary`.

    Returns:
        Nothing.

    Numerics:
        As :func:`qk_norm_rotary`. When a position is out of range nothing is written.

    Raises:
        ValueError: as :func:`qk_norm_rotary`; memory that is written overlaps.
        RuntimeError: as :func:`qk_norm_rotary`.

    Source:
        As :func:`qk_norm_rotary`.

    Example:
        >>> q, one = torch.tensor([[[2.0, 0.0]]]), torch.ones(2)
        >>> qops.qk_norm_rotary_(q, q + 2, one, one, torch.tensor([[0.6]]), torch.tensor([[0.8]]), eps=0.0)
        >>> q
        tensor([[[0.8485, 1.1314]]])
    """
    if derivatives_are_asked():
        refuse_grad("qk_norm_rotary_", q=q, k=k, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin)
    torch.ops.qops.qk_norm_rotary_.default(
        q, k, q_weight, k_weight, cos, sin, eps, positions, interleaved, weight_offset, rounding
    )


def qk_norm_rotary_ref(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    positions: Tensor | None = None,
    interleaved: bool = False,
    *,
    weight_offset: float = 0.0,
) -> Tensor:
    """The formula of :func:`qk_norm_rotary` for one of q and k in float64, not rounded; float64, shape of ``x``."""
    z = x.double()
    z = z / torch.sqrt(z.square().mean(-1, keepdim=True) + eps) * (weight.double() + weight_offset)
    if positions is None:
        positions = torch.arange(x.shape[-3])
    c, s = (table.double()[positions.long()].unsqueeze(-2) for table in (cos, sin))
    half = cos.shape[1]
    i = torch.arange(half)
    first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
    y = z.clone()
    y[..., first] = z[..., first] * c - z[..., second] * s
    y[..., second] = z[..., second] * c + z[..., first] * s
    return y


def cases_of_qk_norm_rotary(run: Run, in_place: Callable[..., None] | None = None) -> None:
    from qops._check_cases import EPS, STYLES, heads, turned
    from qops._numerics import FLOAT_DTYPES, rms_norm_exact, rotary_exact

    for index, (qkv, how) in enumerate(heads(run)):
        rounding, offset = STYLES[index // 2 % 2]
        style = {"rounding": rounding, "weight_offset": offset}
        q_weight, k_weight = (
            run.random(qkv.shape[-1], dtype=FLOAT_DTYPES[(index + i) % 3], outliers=False) for i in range(2)
        )
        weights = {"q_weight": q_weight, "k_weight": k_weight, "eps": EPS}
        results = turned(run, qk_norm_rotary, in_place, qkv, **how, **weights, **style)
        parts = (qkv[:, :2], q_weight), (qkv[:, 2:3], k_weight)
        want = tuple(rotary_exact(rms_norm_exact(x, w, EPS, **style), **how) for x, w in parts)
        run.same(results, want, "rms_norm, then rotary")


def cases_of_qk_norm_rotary_(run: Run) -> None:
    cases_of_qk_norm_rotary(run, qk_norm_rotary_)


@fake("qk_norm_rotary", "qk_norm_rotary_")
def _(
    check: Checker,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    positions: Tensor | None = None,
    interleaved: bool = False,
    weight_offset: float = 0.0,
    rounding: str = "hf",
) -> Results:
    results = check_rotary(check, q, k, cos, sin, positions)
    weights = ((q_weight, "q_weight"), (k_weight, "k_weight"))
    for weight, arg in weights:
        check.float_dtype(weight, arg)
    for weight, arg in weights:
        check.shape(weight, arg, "[D]", (q.shape[-1],))
    for weight, arg in weights:
        check.dense_last_dim(weight, arg)
    check.rms_norm_style(eps, weight_offset, rounding)
    return results
