"""An int8 weight [N, K] and a scale for each of its rows, by the names that packages give them.

    bitsandbytes LLM.int8()   `weight` int8, `SCB` float32 [N], the largest weight of each row;  w = weight * SCB / 127
    lmdeploy smooth_quant     `weight` int8, `scale` float32 [N, 1];  w = weight * scale

bitsandbytes 0.50.2 (`int8_vectorwise_dequant`) multiplies with SCB and then with the float32 nearest to 1/127. The
product of those two has up to 35 bits, as SCB is the float16 of a weight, and no scale of 24 gives all the codes the
same bits: here it is rounded to float32, and a weight is at most the next float32 to bitsandbytes' own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qops.weights import Int8Weight
from qops.weights.requirements import require_dtype, require_matrix, require_tensor

__all__ = ["from_bitsandbytes", "from_lmdeploy"]

# Of bitsandbytes: the float32 nearest to 1/127.
_ONE_127TH = 7.874015718698502e-3


def from_bitsandbytes(weight: Tensor, SCB: Tensor, *, pack: bool = True) -> Int8Weight:
    """A weight from the tensors of a `Linear8bitLt` of bitsandbytes.

    Args:
        weight: int8 `[N, K]`, by rows (`weight_format` 0, the only one since release 0.45).
        SCB: float32 `[N]`.
        pack: as in :meth:`qops.Int8Weight.from_canonical`.

    Returns:
        A weight with bitsandbytes' codes and one scale per row.

    Numerics:
        `scale = SCB * (1/127)` in float32. Weights differ from `int8_vectorwise_dequant` by one unit in the last place
        of float32 at most. On a GPU bitsandbytes quantises the activations but for columns of outliers (`threshold`),
        whose weights it dequantises; :class:`qops.nn.Int8WeightOnlyLinear` leaves all activations as they are.

    Raises:
        ValueError: shapes that do not fit; what :meth:`qops.Int8Weight.from_canonical` refuses.
        RuntimeError: dtypes; the uint8 weights of 4-bit layers (nf4, fp4) among them.
    """
    name = "qops.formats.int8_rows.from_bitsandbytes"
    require_tensor(name, "weight", weight)
    if weight.dtype == torch.uint8:
        raise RuntimeError(f"{name}: weight must have dtype int8, got uint8, as of 4-bit layers (nf4, fp4)")
    require_matrix(name, "weight", weight)
    require_tensor(name, "SCB", SCB)
    require_dtype(name, "SCB", SCB, torch.float32)
    if list(SCB.shape) != [weight.shape[0]]:
        raise ValueError(f"{name}: SCB must have shape [N] = [{weight.shape[0]}], got {list(SCB.shape)}")
    return Int8Weight.from_canonical(weight, (SCB * _ONE_127TH).unsqueeze(1), pack=pack)


def from_lmdeploy(weight: Tensor, scale: Tensor, *, pack: bool = True) -> Int8Weight:
    """A weight from the tensors of a `QLinear` of lmdeploy, whose activations are quantised per token by rule "127".

    Args:
        weight: int8 `[N, K]`.
        scale: float32 `[N, 1]`.
        pack: as in :meth:`qops.Int8Weight.from_canonical`.

    Returns:
        A weight with exactly these numbers.

    Raises:
        ValueError: shapes that do not fit; what :meth:`qops.Int8Weight.from_canonical` refuses.
        RuntimeError: dtypes, float8 among them.
    """
    name = "qops.formats.int8_rows.from_lmdeploy"
    require_matrix(name, "weight", weight)
    require_matrix(name, "scale", scale)
    require_dtype(name, "scale", scale, torch.float32)
    if list(scale.shape) != [weight.shape[0], 1]:
        raise ValueError(f"{name}: scale must have shape [N, 1] = {[weight.shape[0], 1]}, got {list(scale.shape)}")
    return Int8Weight.from_canonical(weight, scale, pack=pack)
