"""What several adapters need of a problem: codes one by one, zero points as integers or as floats, axes that fit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.problems import Axes
from bench.problems.int4_gemm import Int4Gemm

SYMMETRIC_ZERO = 8


def codes(p: Int4Gemm) -> Tensor:
    """uint8 [N, K], 0 ... 15."""
    return torch.stack((p.qweight & 15, p.qweight >> 4), dim=-1).flatten(1)


def added_to_centred(p: Int4Gemm) -> Tensor:
    """float32 b [N, K/G] of ``w = s * (code - 8) + b``: the form of kernels with a zero in floats, for every kind."""
    scales = p.scales.float()
    if p.zeros is None:
        return torch.zeros_like(scales)
    zeros = p.zeros.float()
    return zeros + SYMMETRIC_ZERO * scales if p.kind == "offset" else (SYMMETRIC_ZERO - zeros) * scales


def int32_words(packed: Tensor, rows: int) -> Tensor:
    """uint8 as int32 [rows, ...], the first byte lowest. Not ``view`` alone: a single row may have any stride."""
    return packed.reshape(-1).view(torch.int32).view(rows, -1)


def unsupported(
    *,
    kinds: tuple[str, ...] = ("symmetric", "zero_point"),
    dtypes: tuple[str, ...] = ("bfloat16", "float16"),
    groups: tuple[int, ...] | None = None,
    per_channel: bool = True,
    multiple_of: Callable[[int, int], str | None] | None = None,
) -> Callable[[str, Axes], str | None]:
    """The reason why a weight-only GEMM cannot run, from what its kernel takes.

    Args:
        kinds: of ``Int4Gemm``.
        dtypes: of x.
        groups: group sizes; None for all.
        per_channel: whether one group may span K.
        multiple_of: takes N and K; the reason why they do not fit.
    """

    def reason(device: str, axes: Axes) -> str | None:
        kind, dtype = str(axes.get("kind", "symmetric")), str(axes["dtype"])
        n, k, group = int(axes["N"]), int(axes["K"]), int(axes["G"])
        if kind not in kinds:
            return f"no {kind} weights"
        if dtype not in dtypes:
            return f"no {dtype} activations"
        if group == k and not per_channel:
            return "no scales per channel"
        if groups is not None and group != k and group not in groups:
            return f"group sizes {', '.join(map(str, groups))} only"
        return multiple_of(n, k) if multiple_of is not None else None

    return reason


def multiples(of_n: int, of_k: int) -> Callable[[int, int], str | None]:
    """The reason why N and K do not fit a kernel that needs multiples."""

    def reason(n: int, k: int) -> str | None:
        return None if n % of_n == 0 and k % of_k == 0 else f"N % {of_n} = 0 and K % {of_k} = 0 only"

    return reason
