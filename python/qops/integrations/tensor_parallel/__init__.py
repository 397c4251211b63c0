"""Tensor parallel without an engine: quantised linears, models and operators on several processes.

Everything here is torch's own `torch.distributed`, with gloo on CPUs and NCCL on GPUs by the same code. Each process
runs the same program::

    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    model = parallelize(qops.load_model(path), mesh)

or shards the linears of a model of its own, by torch's `parallelize_module` and the two styles of this module. Once it
is imported, the raw operators take DTensors as well.
"""

from __future__ import annotations

from typing import Any

from qops.integrations.tensor_parallel import dtensor as dtensor
from qops.integrations.tensor_parallel.styles import ColumnParallel, RowParallel

__all__ = ["ColumnParallel", "RowParallel", "parallelize"]


def parallelize(model: Any, mesh: Any, *, prove: bool = True) -> Any:
    """Shares a model out among the ranks of a mesh, in place: each keeps its part of the weights.

    Attention is split by heads and each MLP by its intermediate columns: q, k, v, gate and up are column parallel, o
    and down row parallel, as :class:`RowParallel` adds up. Fused layers stay fused, and a quantised output layer of its
    own gives part of the logits, which are gathered. Embeddings, norms, dense and tied output layers, and blocks that
    neither qops nor the plan of Transformers (`base_model_tp_plan`) knows how to split, stay whole on each rank;
    `logging.getLogger("qops")` says which quantised linears do.

    What it costs: every rank holds the whole model until it is split, block by block. Two sums over all ranks a layer,
    of float32 or int32 hidden states; with dynamic 8-bit activations two maxima a token before them; with act-order o
    its inputs are gathered. The block operators for few tokens do not run.

    Args:
        model: a Transformers model made by :func:`qops.load_model` or :func:`qops.quantize_model`, the same on every
            rank.
        mesh: a `DeviceMesh` of one dimension, on the model's kind of device.
        prove: compare the logits of nine tokens before and after, on every rank.

    Returns:
        The same model, whose forward and `generate` every rank calls with the same inputs, and gets the same outputs;
        where these are sampled, by the same seed.
        It cannot be saved, pickled, or prepared for adapters: keep the model that it was made from.

    Raises:
        ValueError: the model has no qops parts or nothing to split, or is split already; a mesh of another kind; heads,
            outputs or columns that cannot be split among so many ranks, by their names, with K, G and tp: the model is
            then unchanged.
        RuntimeError: the logits are others than before; parts of the model are offloaded.

    Numerics:
        With W8A8 linears o and down have the bits of one rank. What else adds up is rounded as :class:`RowParallel`
        says.

    Source:
        Shoeybi et al., "Megatron-LM", arXiv 1909.08053.
    """
    from qops.integrations.tensor_parallel.model import parallelize as shared_out

    return shared_out(model, mesh, prove=prove)
