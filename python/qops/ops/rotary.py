"""rotary and rotary_: rotary position embedding of q and k in one call, into new tensors or in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qops import _native as _native
from qops.ops._checks import (
    Checker,
    Results,
    check_rotary,
    derivatives_are_asked,
    fake,
    refuse_grad,
)

if TYPE_CHECKING:
    from qops._check_cases import Run


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotates pairs of elements of every head of q and k by the angles of its token's position.

    With c, s = ``cos[p, i]``, ``sin[p, i]`` at the token's position p, and R() one rounding to nearest even in the
    dtype of ``q``: ``y1 = R(x1 * c - x2 * s)``, ``y2 = R(x2 * c + x1 * s)`` for i = 0 ... R/2 - 1, where the pair
    (x1, x2) is

    * elements ``(i, i + R/2)`` by default (GPT-NeoX, Hugging Face Llama);
    * elements ``(2 i, 2 i + 1)`` with ``interleaved=True`` (GPT-J, original Llama).

    Elements R ... D - 1 are copied. Scaled variants (Llama 3, YaRN, ...) are a matter of the values in cos and sin.

    Args:
        q: float32, float16 or bfloat16 ``[..., T, Hq, D]``; any strides, with at most 4 leading dimensions that cannot
            be merged.
        k: same dtype, ``[..., T, Hk, D]``; Hk may differ from Hq. May be a view of the same tensor as ``q``.
        cos: float32 or the dtype of ``q``, ``[P, R/2]`` with R <= D; any strides. Hugging Face's ``[..., D]`` tables
            hold each value twice: pass their first half.
        sin: same dtype and shape as ``cos``.
        positions: int32 or int64 ``[T]`` or ``[..., T]``, rows of cos and sin. Without it token t of every sequence is
            at position t, and P must be at least T.
        interleaved: which elements are pairs, see above.

    Returns:
        ``(q, k)`` rotated, contiguous, in the dtype of ``q``.

    Numerics:
        In float32, with both products and their difference or sum rounded one by one (no fused multiply-add). A token
        has the same bits in every batch, for every thread count and at every ISA level (NaN equals NaN).

    Raises:
        ValueError: shapes do not fit; a position lies outside [0, P) (on the CPU, before anything is written).
        RuntimeError: a dtype or device without a kernel; an input requires grad while grad mode is on.

    Source:
        Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.

    Example:
        >>> q = torch.tensor([[[1.0, 0.0]]])  # T = 1, H = 1, D = 2
        >>> qops.rotary(q, 2 * q, torch.tensor([[0.6]]), torch.tensor([[0.8]]))
        (tensor([[[0.6000, 0.8000]]]), tensor([[[1.2000, 1.6000]]]))
    """
    if derivatives_are_asked():
        refuse_grad("rotary", q=q, k=k, cos=cos, sin=sin)
    return torch.ops.qops.rotary.default(q, k, cos, sin, positions, interleaved)


def rotary_(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None, interleaved: bool = False
) -> None:
    """:func:`rotary` in place: ``q`` and ``k`` hold the result, bit for bit; it allocates no tensor.

    Args:
        q, k: as in :func:`rotary`, any strides. Each must hold every element once (an expanded tensor does not), and
            the two must not overlap each other, nor cos, sin and positions. Slices of one tensor, as q and k of a
            merged qkv projection, are fine.
        cos, sin, positions, interleaved: as in :func:`rotary`.

    Returns:
        Nothing.

    Numerics:
        As :func:`rotary`. When a position is out of range nothing is written.

    Raises:
        ValueError: as :func:`rotary`; memory that is written overlaps.
        RuntimeError: as :func:`rotary`.

    Source:
        As :func:`rotary`.

    Example:
        >>> q = torch.tensor([[[1.0, 0.0]]])
        >>> qops.rotary_(q, k := 2 * q, torch.tensor([[0.6]]), torch.tensor([[0.8]]))
        >>> q
        tensor([[[0.6000, 0.8000]]])
    """
    if derivatives_are_asked():
        refuse_grad("rotary_", q=q, k=k, cos=cos, sin=sin)
    torch.ops.qops.rotary_.default(q, k, cos, sin, positions, interleaved)


def rotary_ref(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False
) -> Tensor:
    """The formula of :func:`rotary` for one of q and k in float64, not rounded; float64, shape of ``x``."""
    if positions is None:
        positions = torch.arange(x.shape[-3])
    c, s = (table.double()[positions.long()].unsqueeze(-2) for table in (cos, sin))
    r = 2 * cos.shape[1]
    x = x.double()
    if interleaved:
        x1, x2 = x[..., 0:r:2], x[..., 1:r:2]
        rotated = torch.stack((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1).flatten(-2)
    else:
        x1, x2 = x[..., : r // 2], x[..., r // 2 : r]
        rotated = torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1)
    return torch.cat((rotated, x[..., r:]), dim=-1)


def cases_of_rotary(run: Run, in_place: Callable[..., None] | None = None) -> None:
    from qops._check_cases import heads, turned
    from qops._numerics import rotary_bound, rotary_exact

    for qkv, how in heads(run):
        results = turned(run, rotary, in_place, qkv, **how)
        for y, x in zip(results, (qkv[:, :2], qkv[:, 2:3]), strict=True):
            run.same(y, rotary_exact(x, **how), "the contract's operations")
            run.within(y, rotary_ref(x, **how), rotary_bound(x, **how))


def cases_of_rotary_(run: Run) -> None:
    cases_of_rotary(run, rotary_)


@fake("rotary", "rotary_")
def _(
    check: Checker,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> Results:
    return check_rotary(check, q, k, cos, sin, positions)
