"""NVIDIA ModelOpt's export for Hugging Face, which TensorRT-LLM reads (`hf_quant_config.json`).

    W4A16_AWQ            `weight` uint8 [N/2, K], signed codes, row 2 i in the low nibble and row 2 i + 1 in the high
                         one; `weight_scale` float32 [N, K/G]
    W8A16                `weight` int8 [N, K], `weight_scale` float32 [N]
    W8A8_SQ_PER_CHANNEL  the same, and `input_scale` float32 [] for the activations

`w = code * weight_scale` everywhere. `pre_quant_scale` [K] multiplies activations, in their dtype, before the product
(AWQ's and SmoothQuant's smoothing, where no norm stands before the linear that could have taken it). No weight of
groups holds it: a factor for each column is not one for each group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qops.weights import Int4Weight, Int8Weight
from qops.weights.requirements import require_dtype, require_matrix, require_tensor
from qops.weights.rounding import store_nibbles

__all__ = ["int4_weight", "int8_weight"]


def int4_weight(weight: Tensor, weight_scale: Tensor, *, pack: bool = True) -> Int4Weight:
    """A weight from the tensors of a linear of W4A16_AWQ.

    Args:
        weight: uint8 `[N/2, K]`.
        weight_scale: float32 `[N, K/G]`.
        pack: as in :meth:`qops.Int4Weight.from_canonical`.

    Returns:
        A symmetric weight with exactly these numbers, without `pre_quant_scale`.

    Raises:
        ValueError: shapes that do not fit; what :meth:`qops.Int4Weight.from_canonical` refuses.
        RuntimeError: dtypes.
    """
    name = "qops.formats.modelopt.int4_weight"
    require_matrix(name, "weight", weight)
    require_dtype(name, "weight", weight, torch.uint8)
    require_matrix(name, "weight_scale", weight_scale)
    n, k = 2 * weight.shape[0], weight.shape[1]
    if weight_scale.shape[0] != n:
        raise ValueError(f"{name}: weight_scale must have shape [N, K/G] with N = {n}, got {list(weight_scale.shape)}")
    # Signed codes plus 8, as ours, are the same nibbles with the sign bit turned.
    codes = torch.stack([weight & 15, weight >> 4], dim=1).view(n, k) ^ 8
    return Int4Weight.from_canonical(store_nibbles(codes), weight_scale, kind="symmetric", in_features=k, pack=pack)


def int8_weight(weight: Tensor, weight_scale: Tensor, *, pack: bool = True) -> Int8Weight:
    """A weight from the tensors of a linear of W8A16 or W8A8_SQ_PER_CHANNEL.

    Args:
        weight: int8 `[N, K]`.
        weight_scale: float32 `[N]`.
        pack: as in :meth:`qops.Int8Weight.from_canonical`.

    Returns:
        A weight with exactly these numbers, without `pre_quant_scale`.

    Raises:
        ValueError: shapes that do not fit; what :meth:`qops.Int8Weight.from_canonical` refuses.
        RuntimeError: dtypes.
    """
    name = "qops.formats.modelopt.int8_weight"
    require_matrix(name, "weight", weight)
    require_tensor(name, "weight_scale", weight_scale)
    if list(weight_scale.shape) != [weight.shape[0]]:
        raise ValueError(
            f"{name}: weight_scale must have shape [N] = [{weight.shape[0]}], got {list(weight_scale.shape)}"
        )
    return Int8Weight.from_canonical(weight, weight_scale.unsqueeze(1), pack=pack)
