"""NVIDIA ModelOpt's export for Hugging Face, which TensorRT-LLM reads (`hf_quant_config.json`).

    W4A16_AWQ            `weight` uint8 [N/2, K], signed codes, row 2 i in the low nibble and row 2 i + 1 in the high
                         one; `weight_scale` float32 [N, K/G]
    W8A16                `weight` int8 [N, K], `weight_scale` float32 [N]
    W8A8_SQ_PER_CHANNEL  the same, and `input_scale` float32 [] for the activations

`w = code * weight_scale` everywhere. `pre_quant_scale` [K] multiplies activations, in their dtype, before the product
(AWQ's and SmoothQuant's smoothing, where no norm before the linear took it). It is no part of the weight, since a
factor for each column is not one for each group: linears hold it (:class:`qops.nn.Int4SmoothedLinear`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qops.formats.folders.stored import Options, Stored, require_specs
from qops.formats.folders.tensors import Spec
from qops.nn import (
    Int4Linear,
    Int4SmoothedLinear,
    Int8StaticLinear,
    Int8StaticSmoothedLinear,
    Int8WeightOnlyLinear,
    QuantizedLinear,
)
from qops.weights import Int4Weight, Int8Weight
from qops.weights.requirements import SCALE_DTYPES, require_dtype, require_matrix, require_tensor
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


# In folders ----------------------------------------------------------------------------------------------------------

# Without and with pre_quant_scale.
_LINEARS: dict[str, tuple[type[QuantizedLinear], type[QuantizedLinear] | None]] = {
    "W4A16_AWQ": (Int4Linear, Int4SmoothedLinear),
    "W8A16": (Int8WeightOnlyLinear, None),
    "W8A8_SQ_PER_CHANNEL": (Int8StaticLinear, Int8StaticSmoothedLinear),
}
_NO_CACHE = (None, "NONE", "none")


class ModelOpt:
    """ModelOpt's tensors in a folder (`qops.formats.folders.stored.Method`).

    Args:
        settings: the quantization config, or `hf_quant_config.json`.
        options: of the user.

    Raises:
        ValueError: another `quant_algo`; a quantised cache.
    """

    def __init__(self, settings: Mapping[str, Any], options: Options):
        options.refuse("ModelOpt")
        found = settings.get("quantization", settings)
        self._algorithm = found.get("quant_algo")
        if self._algorithm not in _LINEARS:
            raise ValueError(f"quant_algo must be one of {', '.join(_LINEARS)}, got {self._algorithm!r}")
        for key in ("kv_cache_quant_algo", "kv_cache_scheme"):
            if found.get(key) not in _NO_CACHE:
                raise ValueError(f"{key} is not supported, got {found[key]!r}")

    def stored(self, module: str, specs: Mapping[str, Spec]) -> Stored | None:
        if "weight_scale" not in specs:
            return None
        linear = _LINEARS[self._algorithm]["pre_quant_scale" in specs]
        if linear is None:
            raise ValueError(f"tensor pre_quant_scale is not supported where quant_algo is {self._algorithm}")
        weight, scale = specs.get("weight"), specs["weight_scale"]
        if weight is None or len(weight.shape) != 2:
            raise ValueError(f"tensor weight must be a matrix, got {weight}")
        rows, columns = weight.shape
        wanted: dict[str, Any]
        int4 = issubclass(linear, Int4Linear)
        if int4:
            rows, groups = 2 * rows, scale.shape[-1] if scale.shape else 0
            wanted = {"weight": ((rows // 2, columns), torch.uint8), "weight_scale": ((rows, groups), torch.float32)}
            if not groups or columns % groups:
                raise ValueError(f"weight_scale must have shape [N, K/G] with K = {columns}, got {scale}")
        else:
            groups = 1
            wanted = {"weight": ((rows, columns), torch.int8), "weight_scale": ((rows,), torch.float32)}
        of_input: dict[str, Any] = {
            "input_scale": ((), torch.float32),
            "pre_quant_scale": ((columns,), SCALE_DTYPES),
        }
        inputs = {key: spec for key, spec in of_input.items() if key in linear.static_input}
        require_specs(specs, wanted | inputs)
        build: Any = int4_weight if int4 else int8_weight
        return Stored(
            linear=linear,
            kind=f"ModelOpt {self._algorithm}",
            shape=(rows, columns),
            group_size=columns // groups,
            keys=tuple(wanted),
            build=lambda tensors: build(**tensors, pack=False),
            input_keys=tuple(inputs),
            scale_dtype=torch.float32,
            kinds=("symmetric",),
            act_order=False,
        )
