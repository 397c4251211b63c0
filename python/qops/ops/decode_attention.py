"""decode_attention: a few new tokens of each sequence attend to its cache of keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qops import _native as _native
from qops.ops._checks import (
    Checker,
    Result,
    Results,
    check_attention,
    default_scale,
    derivatives_are_asked,
    fake,
    refuse_grad,
)

if TYPE_CHECKING:
    from qops._check_cases import Run


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    *,
    mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    first_position: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of at most 8 new tokens, whose keys and values are the last rows of the cache.

    Of T new tokens and S rows, token t attends to rows 0 ... S - T + t, with a window to the last ``window`` of these
    alone; with a mask, instead, to the rows where that is True. Query head h reads key/value head ``h // (Hq / Hkv)``.

    Args:
        q: float32, float16 or bfloat16 ``[B, T, Hq, D]`` with T <= 8; any strides, last dimension dense.
        k: same dtype, ``[B, Hkv, S, D]`` with S >= T, Hq a multiple of Hkv; any strides, last dimension dense: a
            view of a cache that has room for more rows is taken as it is.
        v: same dtype and shape as ``k``.
        scale: of ``q k``; default ``1 / sqrt(D)``.
        mask: bool ``[B or 1, 1, T or 1, S]``, True where a token attends; any strides.
        window: how many positions a token attends to at most, its own included; None or 0: all. Without a mask.
        softcap: c > 0 makes of a score s ``c * tanh(s / c)``; None or 0: as it is.
        first_position: of row 0 of ``k`` and ``v``, where a sliding cache has dropped what came before.
        out: the tensor to write to, contiguous, sharing no memory with the inputs; default: a new one.

    Returns:
        ``[B, T, Hq, D]``, contiguous, in the dtype of ``q``; ``out`` where it is given. A token that attends to nothing
        gets 0.

    Numerics:
        In float32, with one rounding at the end. Positions are taken in chunks of 128, row i being at position
        ``first_position + i``, chunk c the positions 128 c ... 128 c + 127. What is masked takes no part, not even
        where it is NaN.

        * ``s = scale * sum_d q[d] k[d]`` by fma in 16 lanes, d in lane d mod 16, ascending; then lanes at strides 4, 2,
          1 in each half, then the halves. The softcap is ``c * ((1 - e) / (1 + e))``, ``e = exp(-2 x)``, with
          ``x = s / c`` at most 20 in magnitude.
        * In a chunk ``m`` is the largest s (not below -3.4028e38), ``p = w(s - m)``, l the sum of p in 16 lanes,
          position i in lane i mod 16, ascending, then lanes at strides 8, 4, 2, 1; ``o[d]`` adds ``p v[d]`` by fma,
          positions ascending.
        * With M the largest m, ``L`` adds ``w(m - M) l`` and ``O[d]`` adds ``w(m - M) o[d]`` by fma, chunks
          ascending. ``y = R(O / L)``.

        w is exp, by the polynomial of :func:`qops.silu_mul` within 0.91 ulp, and 0 below -87. The error before R() is
        that of the scores times their weights and some 2^-18 of the largest ``|v|`` at scores of common size. Sums
        beyond float32 are infinite; scores of infinity and NaN give NaN, as in float64. A token has the same bits in
        every batch, alone and with others, in a cache of any strides that holds the positions it attends to, for every
        thread count and at every ISA level.

    Raises:
        ValueError: shapes or strides do not fit, more than 8 tokens, a number is negative or not finite; ``out``
            overlaps an input.
        TypeError: ``q`` is no tensor.
        RuntimeError: a dtype or device without a kernel; an input requires grad while grad mode is on.

    Source:
        Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; the chunks of Flash-Decoding.

    Example:
        >>> q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4)
        >>> v = torch.tensor([0.0, 1.0, 5.0])[:, None].repeat(1, 1, 1, 4)
        >>> qops.decode_attention(q, k, v)[0, 0, 1]
        tensor([2., 2., 2., 2.])
        >>> qops.decode_attention(q, k, v, window=2)[0, 0, 1]
        tensor([3., 3., 3., 3.])
    """
    if derivatives_are_asked():
        refuse_grad("decode_attention", q=q, k=k, v=v, out=out)
    if scale is None:
        scale = default_scale("decode_attention", "q", q)
    args = (q, k, v, scale, mask, window or 0, softcap or 0.0, first_position)
    if out is None:
        return torch.ops.qops.decode_attention.default(*args)
    torch.ops.qops.decode_attention.out(*args, out=out)
    return out


def attended(t: int, s: int, mask: Tensor | None = None, window: int | None = None, batch: int = 1) -> Tensor:
    """Which rows the tokens of :func:`decode_attention` attend to: bool ``[B, T, S]``."""
    if mask is not None:
        return mask[:, 0].cpu().expand(batch, t, s)
    behind = torch.arange(s - t, s)[:, None] - torch.arange(s)
    return ((behind >= 0) & ((behind < window) if window else torch.ones((), dtype=torch.bool))).expand(batch, t, s)


def decode_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    *,
    mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The formula of :func:`decode_attention` in float64, not rounded; float64 ``[B, T, Hq, D]``."""
    batch, tokens, q_heads, d = q.shape
    kv_heads, s = k.shape[1:3]
    factor: float = d**-0.5 if scale is None else scale
    y = torch.zeros(q.shape, dtype=torch.float64)
    allowed = attended(tokens, s, mask, window, batch)
    for b in range(batch):
        for t in range(tokens):
            rows = allowed[b, t]
            if not rows.any() or kv_heads == 0:
                continue
            keys, values = k[b, :, rows].double(), v[b, :, rows].double()
            heads = q[b, t].double().view(kv_heads, q_heads // kv_heads, d)
            scores = factor * (heads @ keys.transpose(1, 2))
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            y[b, t] = (torch.softmax(scores, dim=-1) @ values).view(q_heads, d)
    return y


def cases_of_decode_attention(run: Run) -> None:
    from qops._check_cases import caches
    from qops._numerics import decode_attention_bound

    for q, k, v, how in caches(run):
        there = {name: run.there(value) if isinstance(value, Tensor) else value for name, value in how.items()}
        first = 1000
        y = decode_attention(*map(run.there, (q, k, v)), **there, first_position=first).cpu()
        run.keep(y)
        room = torch.nn.functional.pad(torch.stack((k, v)), (0, 0, 0, 5), value=float("nan"))[..., : k.shape[2], :]
        given = torch.full_like(run.there(y), 77)
        decode_attention(run.there(q), *run.there(room), **there, first_position=first, out=given)
        run.same(given, y, "out=, a cache with room")
        run.within(y, decode_attention_ref(q, k, v, **how), decode_attention_bound(q, k, v, **how))
        tokens, rows = q.shape[1], k.shape[2]
        for t in range(tokens):
            end = rows if "mask" in there else rows - tokens + t + 1
            alone = there | ({"mask": there["mask"][:, :, t : t + 1]} if "mask" in there else {})
            got = decode_attention(
                *(run.there(x) for x in (q[:, t : t + 1], k[:, :, :end], v[:, :, :end])), **alone, first_position=first
            )
            run.same(got, y[:, t : t + 1], f"token {t} alone")


@fake("decode_attention")
def _(
    check: Checker,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    first_position: int = 0,
    out: Tensor | None = None,
) -> Results:
    check.float_dtype(q, "q")
    check.same_dtype(k, "k", q, "q")
    check.same_dtype(v, "v", q, "q")
    check.require(q.dim() == 4, "q", "have 4 dimensions [B, T, Hq, D]", lambda: str(q.dim()))
    check.require(k.dim() == 4, "k", "have 4 dimensions [B, Hkv, S, D]", lambda: str(k.dim()))
    check.dense_last_dim(q, "q")
    check_attention(check, tuple(q.shape), ("q", "q"), {"k": k, "v": v}, scale, mask, window, softcap, first_position)
    return check.results(q, Result("out", out, "[B, T, Hq, D]", q.shape, q.dtype))
