"""torch's parallel styles for linears: what `torch.distributed.tensor.parallel.parallelize_module` takes."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from qops.integrations.tensor_parallel.linears import Ranks, shard_inputs, shard_outputs


class ColumnParallel(ParallelStyle):
    """Each rank has some rows of w, and gives those columns of the output: ``ColwiseParallel`` of torch.

    For quantised linears of :mod:`qops.nn` and for nn.Linear, whose weight becomes that of the rank, in place. A
    quantised linear gives the bits that one rank gives: on a CPU always, on a GPU where its bits do not depend on N
    (`int8_gemm`, `int4_int8_gemm`).

    The input is whole: a plain tensor that is the same on all ranks, or a DTensor of any placement. A linear that holds
    several side by side, as Phi-3's `gate_up_proj`, gives each rank a part of the whole, and so not of each.

    Args:
        output_layouts: `Shard(-1)`, or `Replicate()`, for which the outputs are gathered.
        use_local_output: return a plain tensor, else a DTensor.

    Raises:
        ValueError: another layout; when it is applied: a module of another kind, a mesh of more dimensions, an N that
            is no multiple of 8 tp.
    """

    def __init__(self, *, output_layouts: Placement | None = None, use_local_output: bool = True):
        super().__init__()
        layout = Shard(-1) if output_layouts is None else output_layouts
        if layout not in (Shard(-1), Replicate()):
            raise ValueError(f"{_name(self)}: output_layouts must be Shard(-1) or Replicate(), got {layout}")
        self.gathers = layout == Replicate()
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        name = _name(self)
        ranks = Ranks(name, device_mesh)
        shard_outputs(name, type(module).__name__, module, ranks, self.gathers, self.use_local_output)
        return module


class RowParallel(ParallelStyle):
    """Each rank has some columns of w, and the products of all ranks are added up: ``RowwiseParallel`` of torch.

    For quantised linears of :mod:`qops.nn` and for nn.Linear, whose weight becomes that of the rank, in place. The bias
    is whole on each rank, and added once.

    * Groups over whose columns a cut goes become smaller ones with the same scale. With G columns to a group and
      gcd(G, K / tp) no multiple of 16 the weight is refused; scales of whole rows are the same on each rank.
    * Act-order: the rank has stored columns, whose inputs lie anywhere, so that a split x is gathered first.

    Args:
        input_layouts: of plain tensors: `Shard(-1)`, or `Replicate()`, of which each rank takes its columns. A DTensor
            may have any placement.
        use_local_output: return a plain tensor, else a DTensor. It is whole on each rank.

    Numerics:
        With 8-bit activations (W8A8) a token is quantised by the largest element of all ranks, and int32 sums are added
        up before they are scaled: the bits are those of one rank. W4A8 quantises likewise, and adds up float32
        products. Others add up products that were rounded to bfloat16 where x is that, in float32 too. With u = 2^-8
        for those of bfloat16 (and 2^-11 for an nn.Linear of float16) and 2^-24 for all others, |y - exact| is at most
        ``u * sum_r |part_r| + 2^-24 * (tp + 1) * (sum_r |part_r| + |bias|)``, the error of the parts themselves, and
        the rounding of y. The order of the sum, and so its last bits, are the backend's.

    Raises:
        ValueError: another layout; when it is applied: a module of another kind, a mesh of more dimensions, a K that
            cannot be cut.
    """

    def __init__(self, *, input_layouts: Placement | None = None, use_local_output: bool = True):
        super().__init__()
        layout = Shard(-1) if input_layouts is None else input_layouts
        if layout not in (Shard(-1), Replicate()):
            raise ValueError(f"{_name(self)}: input_layouts must be Shard(-1) or Replicate(), got {layout}")
        self.splits = layout == Replicate()
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        name = _name(self)
        ranks = Ranks(name, device_mesh)
        shard_inputs(name, type(module).__name__, module, ranks, self.splits, self.use_local_output)
        return module


def _name(style: ParallelStyle) -> str:
    return f"qops.integrations.tensor_parallel.{type(style).__name__}"
