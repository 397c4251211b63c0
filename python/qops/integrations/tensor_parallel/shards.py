"""What each of several ranks holds of a weight, or of a linear: a pure matter of tensors, without torch.distributed.

Shards are cut from canonical tensors and packed anew. Every rank gets the same number of rows, or of columns: what one
linear gives is what the next one reads, and attention has whole heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from qops._layout import SUPER_COLUMNS
from qops.nn import QuantizedLinear, dense_linear
from qops.weights.state import QuantizedWeight

LinearT = TypeVar("LinearT", bound=nn.Module)


class Share(NamedTuple):
    """Which part of how many.

    Attributes:
        rank: 0 ... size - 1.
        size: the number of parts, tp.
    """

    rank: int
    size: int

    def of(self, length: int) -> slice:
        """Its part of a range that `size` divides."""
        part = length // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


# Columns of the output -----------------------------------------------------------------------------------------------


def require_outputs(name: str, linear: Any, size: int, sections: Sequence[int] | None = None) -> None:
    """Raises where a linear cannot give each rank an equal part of its outputs.

    Args:
        name: of the linear, for the message.
        linear: a quantised linear, or nn.Linear.
        size: tp.
        sections: the numbers of outputs of which each rank gets its part; by default all are one, and of a weight that
            mixes gate and up these are two.

    Raises:
        ValueError: N / tp is no multiple of 8, or of 1 for nn.Linear.
    """
    step = 8 if isinstance(linear, QuantizedLinear) else 1
    for n in sections or _sections(linear):
        if n % (step * size):
            raise ValueError(
                f"{name}: N = {n} outputs must be a multiple of {step} * tp = {step * size} to be split for tp = {size}"
            )


def _sections(linear: Any) -> list[int]:
    mixes = isinstance(linear, QuantizedLinear) and linear.weight.mixed_gate_up
    return [linear.out_features // 2] * 2 if mixes else [linear.out_features]


def outputs_of(linear: LinearT, share: Share, sections: Sequence[int] | None = None) -> LinearT:
    """The linear of a part of the outputs: some rows of w, with their scales, zeros and bias.

    Args:
        linear: a quantised linear, or nn.Linear; it stays as it is.
        share: which part.
        sections: as in :func:`require_outputs`.

    Returns:
        A linear of the same class with memory of its own, packed.
    """
    whole: Any = linear
    rows, start = [], 0
    for n in sections or _sections(whole):
        part = share.of(n)
        rows.append(torch.arange(start + part.start, start + part.stop, device=whole.weight.device))
        start += n
    order = torch.cat(rows)
    bias = None if whole.bias is None else whole.bias.detach()[order]
    if not isinstance(whole, QuantizedLinear):
        shard: Any = dense_linear(whole.weight.detach()[order], bias)
        return shard
    weight = whole.weight.with_rows(order).pack()
    around: Any = whole.around(weight.mix_gate_up() if whole.weight.mixed_gate_up else weight, bias)
    return around


# Columns of the input ------------------------------------------------------------------------------------------------


def require_inputs(name: str, linear: Any, size: int) -> None:
    """Raises where a linear cannot read an equal part of its inputs on each rank.

    Args:
        name: of the linear, for the message.
        linear: a quantised linear, or nn.Linear.
        size: tp.

    Raises:
        ValueError: tp does not divide K, K / tp is no multiple of 8, or groups cannot be cut there.
    """
    if isinstance(linear, QuantizedLinear):
        group_of(name, linear.weight, size)
    elif linear.in_features % size:
        raise ValueError(f"{name}: K = {linear.in_features} columns must be a multiple of tp = {size}")


def group_of(name: str, weight: QuantizedWeight, size: int) -> int:
    """The group size of a part of the columns.

    A group over whose columns a cut goes becomes several with the same scale, of the largest size that divides both G
    and K / tp: the same weights in smaller groups. With one group per row that is K / tp.

    Args:
        name: of what has the weight, for the message.
        weight: to be cut.
        size: tp.

    Returns:
        G, or a divisor of it.

    Raises:
        ValueError: tp does not divide K, K / tp is no multiple of 8, or no size that a kernel takes divides both.
    """
    k, g = weight.in_features, weight.group_size
    part = k // size
    finest = math.gcd(g, part)
    if k % size or part % 8:
        raise ValueError(f"{name}: K = {k} columns in groups of G = {g} must be a multiple of 8 * tp, got tp = {size}")
    if finest % 16 and finest != part:
        raise ValueError(
            f"{name}: K = {k} columns in groups of G = {g} cannot be split for tp = {size}: K / tp = {part} and G "
            f"have no common divisor that is a multiple of 16"
        )
    return finest


def weight_inputs(name: str, weight: QuantizedWeight, share: Share) -> Any:
    """The weight of a part of the columns, of an act-order weight a part of the stored ones.

    Args:
        name: of what has the weight, for the message.
        weight: it stays as it is.
        share: which part.

    Returns:
        A packed weight of the same class without ``perm``. Scales of two levels become float32 ones, which are equal,
        where K / tp is no multiple of 256.

    Raises:
        ValueError: as in :func:`group_of`.
    """
    g = group_of(name, weight, share.size)
    columns = share.of(weight.in_features)
    if weight.has_levels and (columns.stop - columns.start) % SUPER_COLUMNS:
        weight = weight.widened()
    per_code = weight._CODES_PER_ELEMENT
    tensors = weight.canonical()
    if weight.has_levels:
        groups: Any = slice(columns.start // SUPER_COLUMNS, columns.stop // SUPER_COLUMNS)
    else:
        groups = torch.arange(columns.start, columns.stop, g, device=weight.device) // weight.group_size
    more: dict[str, Any] = {"in_features": columns.stop - columns.start} if per_code == 2 else {}
    return type(weight).from_canonical(
        tensors["qweight"][:, columns.start // per_code : columns.stop // per_code].contiguous(),
        tensors["scales"][:, groups].contiguous(),
        kind=weight.kind,
        zeros=tensors["zeros"][:, groups].contiguous() if "zeros" in tensors else None,
        **more,
    )


def inputs_of(name: str, linear: LinearT, share: Share) -> LinearT:
    """The linear of a part of the inputs: some columns of w. The bias stays whole, for whoever adds up to add it once.

    Args:
        name: of the linear, for the message.
        linear: a quantised linear, or nn.Linear; it stays as it is.
        share: which part; of an act-order weight of its stored columns, which are those of :func:`columns_read`.

    Returns:
        A linear of the same class with memory of its own, packed, whose weight has no ``perm``.

    Raises:
        ValueError: as in :func:`require_inputs`.
    """
    whole: Any = linear
    require_inputs(name, whole, share.size)
    part = share.of(whole.in_features)
    bias = None if whole.bias is None else whole.bias.detach().clone()
    if not isinstance(whole, QuantizedLinear):
        shard: Any = dense_linear(whole.weight.detach()[:, part].clone(), bias)
        return shard
    read = columns_read(whole, share)
    static = dict(whole.activations())
    if "pre_quant_scale" in static:
        static["pre_quant_scale"] = static["pre_quant_scale"][part if read is None else read]
    weight = weight_inputs(name, whole.weight, share)
    shard: Any = type(whole)(weight, bias, float32_output=whole.float32_output, **static)
    return shard


def columns_read(linear: Any, share: Share) -> torch.Tensor | None:
    """Which columns of x a part of the stored columns multiplies.

    Args:
        linear: a quantised linear, or nn.Linear.
        share: which part.

    Returns:
        int64 [K / tp]; None where they are just that part of x.
    """
    perm = linear.weight.perm if isinstance(linear, QuantizedLinear) else None
    return None if perm is None else perm.long()[share.of(linear.in_features)]
