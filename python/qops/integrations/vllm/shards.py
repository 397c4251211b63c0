"""The part of a quantised weight that one process of a tensor-parallel group multiplies with; nothing here is vLLM's.

Weights are cut in their canonical form, and no number changes: a shard is exactly those rows and columns of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qops.nn import Int4Int8Linear, Int4Linear, QuantizedLinear
from qops.nn.activations import with_dense_rows
from qops.nn.linears import Int8Input
from qops.ops import int4_gemm, int4_int8_gemm, int8_gemm, int8_weight_only_gemm
from qops.weights import Int4Weight
from qops.weights.rounding import store_nibbles
from qops.weights.state import QuantizedWeight

# The smallest group of columns that kernels take.
_SMALLEST_GROUP = 16


def take_rows(weight: QuantizedWeight, rows: Tensor) -> QuantizedWeight:
    """Some rows of a weight.

    Args:
        weight: of any form.
        rows: int64 [n], which ones.

    Returns:
        A canonical weight [n, K].
    """
    return _weight_of(weight, {key: t if key == "perm" else t[rows] for key, t in weight.canonical().items()})


def take_columns(weight: QuantizedWeight, start: int, stop: int) -> tuple[QuantizedWeight, int]:
    """Columns start ... stop - 1 of a weight.

    Where a cut goes through a group, the shard's groups are smaller, and several have one scale. In act-order a shard
    has any number of a group's columns, so that each group is padded to a multiple of 16 with columns that have to meet
    zeros.

    Args:
        weight: of any form.
        start, stop: multiples of 8.

    Returns:
        A canonical weight [N, stop - start + p], and p, how many zeros have to follow the x that it multiplies.

    Raises:
        ValueError: a cut leaves groups of fewer than 16 columns.
    """
    if start == 0 and stop == weight.in_features:
        return weight, 0
    parts = weight.canonical()
    codes, perm, group_size = _codes(weight, parts["qweight"]), parts.get("perm"), weight.group_size
    if perm is None:
        size = math.gcd(group_size, start, stop - start)
        if size % _SMALLEST_GROUP and size != stop - start:
            raise ValueError(
                f"columns {start} ... {stop - 1} of K = {weight.in_features} must be whole groups, or be cut at a "
                f"multiple of {_SMALLEST_GROUP}, got groups of {group_size}"
            )
        stored = torch.arange(start, stop, device=codes.device)
        groups = stored[::size] // group_size
        cut = {"qweight": codes[:, stored]}
    else:
        size = _SMALLEST_GROUP
        stored = ((perm >= start) & (perm < stop)).nonzero().flatten()
        group_of = stored // group_size
        counts = torch.bincount(group_of, minlength=weight.in_features // group_size)
        blocks = -(-counts // size)
        groups = torch.repeat_interleave(torch.arange(len(counts), device=codes.device), blocks)
        # Stored columns are in the order of their groups: a column moves by what the groups before it were padded.
        moved = torch.cumsum(blocks * size - counts, 0) - (blocks * size - counts)
        places = torch.arange(len(stored), device=codes.device) + moved[group_of]
        total = int(blocks.sum()) * size
        padded = codes.new_zeros(codes.shape[0], total)
        padded[:, places] = codes[:, stored]
        order = perm.new_full((total,), -1)
        order[places] = perm[stored] - start
        missing = order < 0
        order[missing] = torch.arange(stop - start, total, dtype=order.dtype, device=order.device)
        cut = {"qweight": padded, "perm": order}
    cut |= {key: parts[key][:, groups] for key in ("scales", "zeros") if key in parts}
    columns = cut["qweight"].shape[1]
    if isinstance(weight, Int4Weight):
        cut["qweight"] = store_nibbles(cut["qweight"])
    return _weight_of(weight, cut, columns), columns - (stop - start)


def _codes(weight: QuantizedWeight, qweight: Tensor) -> Tensor:
    """One in a byte."""
    if not isinstance(weight, Int4Weight):
        return qweight
    return torch.stack((qweight & 15, qweight >> 4), -1).flatten(1)


def _weight_of(like: QuantizedWeight, tensors: dict[str, Tensor], columns: int | None = None) -> QuantizedWeight:
    more: dict[str, Any] = {}
    if isinstance(like, Int4Weight):
        more["in_features"] = like.in_features if columns is None else columns
    return type(like).from_canonical(
        tensors["qweight"].contiguous(),
        tensors["scales"].contiguous(),
        kind=like.kind,
        zeros=tensors["zeros"].contiguous() if "zeros" in tensors else None,
        perm=tensors.get("perm"),
        pack=False,
        **more,
    )


def _with_zero_points(weight: QuantizedWeight) -> QuantizedWeight:
    """A symmetric weight of 4 bits as one whose zero points are 8: so parts of a merged weight may have others."""
    if not isinstance(weight, Int4Weight) or weight.kind != "symmetric":
        return weight
    parts = weight.canonical()
    zeros = torch.full(parts["scales"].shape, 8, dtype=torch.uint8, device=weight.device)
    return Int4Weight.from_canonical(
        parts["qweight"],
        parts["scales"],
        kind="zero_point",
        zeros=zeros,
        perm=parts.get("perm"),
        in_features=weight.in_features,
        pack=False,
    )


class Product(nn.Module):
    """What stands in the place of one linear of an engine: one or several quantised linears of one input, side by side.

    Args:
        linears: of one input, in the order of their outputs; those that can be are merged into one.
        padding: how many zeros the weights expect behind x.
    """

    def __init__(self, linears: Sequence[QuantizedLinear], padding: int = 0):
        super().__init__()
        kinds = {linear.weight.kind for linear in linears}
        if kinds == {"symmetric", "zero_point"}:
            linears = [linear.around(_with_zero_points(linear.weight), None) for linear in linears]
        merged: list[list[QuantizedLinear]] = []
        for linear in linears:
            if merged and merged[-1][0].is_like(linear):
                merged[-1].append(linear)
            else:
                merged.append([linear])
        self.linears = nn.ModuleList(
            same[0].around(same[0].weight_class.cat([linear.weight for linear in same]), None) for same in merged
        )
        self.sizes = [linear.out_features for linear in self.linears]
        self.padding = padding

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x @ w.T + bias.

        Args:
            x: [..., K], dense.
            bias: [N].

        Returns:
            [..., N] in the dtype of x.
        """
        if self.padding:
            x = nn.functional.pad(x, (0, self.padding))
        elif not x.is_contiguous():
            x = with_dense_rows(x)
        if len(self.sizes) == 1:
            return _multiply(self.linears[0], x, bias)
        biases = [None] * len(self.sizes) if bias is None else bias.split(self.sizes)
        products = zip(self.linears, biases, strict=True)
        return torch.cat([_multiply(linear, x, part) for linear, part in products], -1)


def _multiply(linear: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """What the linear computes, with the caller's bias: of several processes one adds it."""
    weight = linear.weight
    if isinstance(linear, Int8Input):
        q, scale, zero_point = linear._in_int8(x)
        if isinstance(linear, Int4Int8Linear):
            return int4_int8_gemm(q, scale, weight, bias, out_dtype=x.dtype)
        return int8_gemm(q, scale, weight, bias, zero_point=zero_point, out_dtype=x.dtype)
    if isinstance(linear, Int4Linear):
        return int4_gemm(x, weight, bias)
    return int8_weight_only_gemm(x, weight, bias)
