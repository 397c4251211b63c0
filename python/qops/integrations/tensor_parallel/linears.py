"""Linears that hold a part of a weight, and the products and sums by which several ranks give what one would."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import functional as F

from qops._layout import MAX_INT8_K, MAX_INT8_K_WITH_ZERO_POINT
from qops.integrations.tensor_parallel.shards import Share, columns_read, inputs_of, outputs_of, require_outputs
from qops.nn import Int8AsymmetricLinear, Int8Rows, Int8StaticLinear, Int8WeightOnlyLinear, QuantizedLinear
from qops.nn.activations import with_dense_rows
from qops.nn.linears import LINEARS, Int8Input
from qops.nn.smoothed import Int4SmoothedLinear
from qops.ops import int4_gemm, int4_int8_gemm, int8_gemm, int8_weight_only_gemm
from qops.weights.rounding import add_rounding_to_odd

# Columns that carry the largest and smallest element of a token through the quantiser: as many as keep rows aligned.
_ENDS = 16


class Ranks:
    """The ranks of a mesh of one dimension, and what they do together. Copies of a model share it.

    Args:
        caller: to name in messages.
        mesh: of one dimension, with this process in it.

    Raises:
        ValueError: a mesh of another kind.
    """

    def __init__(self, caller: str, mesh: Any):
        if not isinstance(mesh, DeviceMesh):
            raise ValueError(f"{caller}: mesh must be a torch.distributed DeviceMesh, got {type(mesh).__name__}")
        if mesh.ndim != 1:
            names = mesh.mesh_dim_names
            example = f", such as mesh[{names[-1]!r}]" if names else ""
            raise ValueError(
                f"{caller}: mesh must have one dimension{example}, got shape {list(mesh.shape)} with names {names}"
            )
        if mesh.get_coordinate() is None:
            raise ValueError(f"{caller}: mesh must have this process in it, got {mesh.mesh.tolist()}")
        self.mesh = mesh
        self.group = mesh.get_group()
        self.share = Share(mesh.get_local_rank(), mesh.size())

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Of all ranks, in place; integers exactly."""
        dist.all_reduce(x, group=self.group)
        return x

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """Of numbers that are not negative, NaN being larger than all: float32, or one that it holds."""
        # In order of their bits: what a backend makes of NaN is its own matter.
        bits = x.float().view(torch.int32) & 0x7FFFFFFF
        dist.all_reduce(bits, dist.ReduceOp.MAX, group=self.group)
        return bits.view(torch.float32).to(x.dtype)

    def side_by_side(self, x: torch.Tensor) -> torch.Tensor:
        """The last dimensions of all ranks, in their order."""
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.share.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)

    def local(self, x: Any, placement: Any) -> Any:
        """What this rank has of a DTensor in a placement; all else as it is."""
        if not isinstance(x, DTensor):
            return x
        return x.redistribute(self.mesh, [placement]).to_local()

    def __deepcopy__(self, memo: Any) -> Ranks:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("qops: a shard cannot be pickled: it belongs to the processes that hold the other ones")

    def __repr__(self) -> str:
        return f"rank {self.share.rank} of {self.share.size}"


# Columns of the output -----------------------------------------------------------------------------------------------


class ColumnShard(nn.Module):
    """A linear that gives a part of the outputs, or gathers all of them."""

    ranks: Ranks
    gathers: bool
    gives_local: bool

    def forward(self, x: Any, *args: Any) -> Any:
        y = super().forward(self.ranks.local(x, Replicate()), *args)
        if self.gathers:
            y = self.ranks.side_by_side(y)
        if self.gives_local:
            return y
        return DTensor.from_local(y, self.ranks.mesh, [Replicate() if self.gathers else Shard(-1)], run_check=False)


def shard_outputs(caller: str, name: str, linear: Any, ranks: Ranks, gathers: bool, gives_local: bool = True) -> None:
    """Makes a linear a :class:`ColumnShard`, in place.

    Args:
        caller: to name in messages.
        name: of the linear.
        linear: a quantised linear, or nn.Linear.
        ranks: which share one weight.
        gathers: whether the output is whole on each rank.
        gives_local: whether the output is a plain tensor and not a DTensor.
    """
    require_shardable(caller, name, linear)
    require_outputs(f"{caller}: {name}", linear, ranks.share.size)
    if gathers and isinstance(linear, QuantizedLinear) and linear.weight.mixed_gate_up:
        raise ValueError(f"{caller}: {name}: output_layouts must be Shard(-1) where a weight mixes gate and up")
    _become(linear, outputs_of(linear, ranks.share), column_class, ranks)
    linear.gathers, linear.gives_local = gathers, gives_local


# Columns of the input ------------------------------------------------------------------------------------------------


class RowShard(nn.Module):
    """A linear that reads a part of the inputs, and adds up what all ranks make of theirs."""

    in_features: int
    ranks: Ranks
    splits: bool
    gives_local: bool
    read: torch.Tensor | None
    adds_residual = False
    applies_silu_mul = False
    rows_rule = None

    def forward(self, x: Any) -> Any:
        linear: Any = self
        y = row_product(linear, linear.own_columns(x), linear.ranks)
        return y if linear.gives_local else DTensor.from_local(y, linear.ranks.mesh, [Replicate()], run_check=False)

    def own_columns(self, x: Any) -> torch.Tensor:
        """Those that the weight multiplies, of an x that is whole or split."""
        if isinstance(x, Int8Rows):
            raise ValueError(f'{type(self).__name__}: x must be dense, got Int8Rows of rule "{x.rule}"')
        if isinstance(x, DTensor):
            is_split = self.read is None
            x = self.ranks.local(x, Shard(-1) if is_split else Replicate())
        else:
            is_split = not self.splits
            if is_split and self.read is not None:
                x, is_split = self.ranks.side_by_side(x), False
        if not is_split:
            k = self.in_features * self.ranks.share.size
            if x.shape[-1] != k:
                raise ValueError(f"{type(self).__name__}: x must have last dimension K = {k}, got {x.shape[-1]}")
            x = x[..., self.ranks.share.of(x.shape[-1])] if self.read is None else x[..., self.read]
        return x if x.is_contiguous() else with_dense_rows(x)


def shard_inputs(caller: str, name: str, linear: Any, ranks: Ranks, splits: bool, gives_local: bool = True) -> None:
    """Makes a linear a :class:`RowShard`, in place.

    Args:
        caller: to name in messages.
        name: of the linear.
        linear: a quantised linear, or nn.Linear.
        ranks: which share one weight.
        splits: whether plain tensors come whole, for each rank to take its columns, and not split already.
        gives_local: whether the output is a plain tensor and not a DTensor.
    """
    require_shardable(caller, name, linear)
    read = columns_read(linear, ranks.share)
    if isinstance(linear, QuantizedLinear) and linear.operator == "int8_gemm":
        is_shifted = isinstance(linear, Int8AsymmetricLinear) or "input_zero_point" in linear.activations()
        most = MAX_INT8_K_WITH_ZERO_POINT if is_shifted else MAX_INT8_K
        if linear.in_features > most:
            raise ValueError(
                f"{caller}: {name} must have at most {most} columns on all ranks, got {linear.in_features}"
            )
    _become(linear, inputs_of(f"{caller}: {name}", linear, ranks.share), row_class, ranks)
    linear.splits, linear.gives_local = splits, gives_local
    linear.register_buffer("read", read, persistent=False)


def row_product(linear: Any, x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """y = x @ w.T + bias of columns that stand on several ranks, whole on each.

    Numerics:
        W8A8: each token is quantised over all of its columns, sums are int32 and added up exactly, and then scaled: the
        bits are those of one rank.
        W4A8: tokens likewise; each rank's product is rounded to float32.
        Otherwise each rank's product is rounded to the dtype of x; of float16, which may not hold it, to float32.
        These are added up in float32, in an order that is the backend's, the bias is added, and the sum rounded once.

    Args:
        linear: holds the shard of the weight, and the whole bias.
        x: [..., K / tp], with dense rows.
        ranks: that have the other columns.
    """
    out_dtype = torch.float32 if getattr(linear, "float32_output", False) else x.dtype
    bias = linear.bias
    if isinstance(linear, Int8Input):
        q, scale, zero_point = _quantized_alike(linear, x, ranks)
        if linear.operator == "int8_gemm":
            sums = ranks.sum(int8_gemm(q, scale, linear.weight, zero_point=zero_point, out_dtype=torch.int32))
            return scaled_sums(sums, scale, linear.weight.scales, bias, out_dtype)
        total = ranks.sum(int4_int8_gemm(q, scale, linear.weight, out_dtype=torch.float32))
    else:
        if isinstance(linear, Int4SmoothedLinear):
            x = linear._smooth(x)
        if not isinstance(linear, QuantizedLinear):
            part = F.linear(x, linear.weight)
        else:
            # A part may be too large for float16 where the sum is not.
            x = x.to(torch.float32 if x.dtype == torch.float16 else out_dtype)
            multiply: Any = int8_weight_only_gemm if isinstance(linear, Int8WeightOnlyLinear) else int4_gemm
            part = multiply(x, linear.weight)
        total = ranks.sum(part.float())
    return (total if bias is None else total + bias.float()).to(out_dtype)


def _quantized_alike(linear: Any, x: torch.Tensor, ranks: Ranks) -> Any:
    """(q, scale, zero_point) of a part of the columns, as whole tokens would be quantised.

    Every rule asks a token for its largest and smallest element alone: those of all ranks go into more columns, which
    the product does not read.
    """
    if isinstance(linear, Int8StaticLinear):
        return linear._quantized(x)
    low, high = x.aminmax(dim=-1) if x.shape[-1] else (x.new_zeros(x.shape[:-1]),) * 2
    ends = x.new_zeros(*x.shape[:-1], _ENDS)
    ends[..., :2] = ranks.largest(torch.stack((high.clamp_min(0), -low.clamp_max(0)), dim=-1))
    ends[..., 1] *= -1
    q, *rest = linear._quantized(torch.cat((x, ends), dim=-1))
    return q[..., : x.shape[-1]], *rest


def scaled_sums(
    sums: torch.Tensor, scale: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """What :func:`qops.int8_gemm` makes of its int32 sums, bit for bit.

    Args:
        sums: int32 [..., N].
        scale: of the tokens, [...] or [].
        w_scale: of the rows of w, packed, [S, 1, 16].
        bias: [N].
        out_dtype: of the result.
    """
    scaled = sums.float() * w_scale.reshape(-1)[: sums.shape[-1]].float()
    scale = scale.unsqueeze(-1)
    return (scale * scaled if bias is None else _fma(scale, scaled, bias.float())).to(out_dtype)


def _fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c in float32, rounded once."""
    product, c = a.double() * b.double(), c.double()
    total = product + c
    return torch.where(total.isfinite(), add_rounding_to_odd(product, c, may_look=False), total).float()


# Classes -------------------------------------------------------------------------------------------------------------


@functools.cache
def column_class(kind: type) -> Any:
    """A class of linears as a :class:`ColumnShard`."""
    return type(f"ColumnShardOf{kind.__name__}", (ColumnShard, kind), {"adds_residual": False, "__doc__": kind.__doc__})


@functools.cache
def row_class(kind: type) -> Any:
    """A class of linears as a :class:`RowShard`."""
    return type(f"RowShardOf{kind.__name__}", (RowShard, kind), {"__doc__": kind.__doc__})


def __getattr__(name: str) -> Any:
    """The classes that these make, which pickle looks up by name before it meets :class:`Ranks`, which says no."""
    makers: dict[str, Any] = {"ColumnShardOf": column_class, "RowShardOf": row_class}
    for prefix, make in makers.items():
        for kind in (nn.Linear, *LINEARS.values()):
            if name == prefix + kind.__name__:
                return make(kind)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def require_shardable(caller: str, name: str, linear: Any) -> None:
    """Raises where nothing is known of the shards of a module.

    Raises:
        ValueError: it is none of the linears of :mod:`qops.nn` and no nn.Linear, a shard already, or has a forward of
            its owner's.
        RuntimeError: its weight is offloaded.
    """
    if isinstance(linear, (ColumnShard, RowShard)):
        raise ValueError(f"{caller}: {name} must be whole, got a shard, {linear.ranks}")
    if type(linear) not in (nn.Linear, *LINEARS.values()):
        raise ValueError(f"{caller}: {name} must be a linear of qops.nn or an nn.Linear, got {type(linear).__name__}")
    require_own_forward(caller, name, linear)
    if isinstance(linear, QuantizedLinear) and linear.weight.is_offloaded:
        raise RuntimeError(f"{caller}: {name} must be in memory, its weight is offloaded")


def require_own_forward(caller: str, name: str, module: nn.Module) -> None:
    """Raises where somebody has put another function in the place of a module's forward: that would go on as it was."""
    if "forward" in vars(module):
        raise ValueError(f"{caller}: {name} must have no forward of its owner's, nor hooks of accelerate")


def _become(linear: Any, shard: Any, kind: Any, ranks: Ranks) -> None:
    """Gives a module the tensors of a shard, and another class; it stays the object that its owner and hooks know."""
    linear._modules.update(shard._modules)
    linear._parameters.update(shard._parameters)
    linear._buffers.update(shard._buffers)
    linear.in_features, linear.out_features = shard.in_features, shard.out_features
    linear.__class__ = kind(type(linear))
    linear.ranks = ranks
