"""An int8 weight [N, K] and a scale for each of its rows, by the names that packages give them.

    bitsandbytes LLM.int8()   `weight` int8, `SCB` float32 [N], the largest weight of each row;  w = weight * SCB / 127
    lmdeploy smooth_quant     `weight` int8, `scale` float32 [N, 1];  w = weight * scale

bitsandbytes 0.50.2 (`int8_vectorwise_dequant`) multiplies with SCB and then with the float32 nearest to 1/127. The
product of those two has up to 35 bits, as SCB is the float16 of a weight, and no scale of 24 gives all the codes the
same bits: here it is rounded to float32, and a weight is at most the next float32 to bitsandbytes' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qops.formats.folders.stored import Options, Stored, require_specs
from qops.formats.folders.tensors import Spec
from qops.nn import Int8Linear, Int8WeightOnlyLinear, QuantizedLinear
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
        of float32 at most. bitsandbytes rounds activations to float16 and, by rule "127", to int8, but for columns of
        outliers (`threshold`), whose weights it dequantises. :class:`qops.nn.Int8Linear` does so for a threshold of 0,
        :class:`qops.nn.Int8WeightOnlyLinear` leaves all activations as they are.

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


# In folders ----------------------------------------------------------------------------------------------------------


_FACTS: dict[str, Any] = {"scale_dtype": torch.float32, "kinds": ("symmetric",), "act_order": False}


class Bitsandbytes:
    """bitsandbytes' 8-bit tensors in a folder (`qops.formats.folders.stored.Method`).

    No linear here tells outliers from other columns: where the config has a threshold for them, all activations stay as
    they are, and are rounded as bitsandbytes does where it has none.

    Args:
        settings: the quantization config.
        options: of the user.

    Raises:
        ValueError: 4-bit layers; a threshold that is no number.
    """

    def __init__(self, settings: Mapping[str, Any], options: Options):
        options.refuse("bitsandbytes")
        if settings.get("load_in_4bit") or not settings.get("load_in_8bit"):
            kind = settings.get("bnb_4bit_quant_type")
            raise ValueError(f"load_in_8bit must be true: 4-bit layers (nf4, fp4) are not supported, got {kind!r}")
        threshold = settings.get("llm_int8_threshold", 6.0)
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold >= 0:
            raise ValueError(f"llm_int8_threshold must be a number from 0 on, got {threshold!r}")
        self._linear: type[QuantizedLinear] = Int8WeightOnlyLinear if threshold > 0 else Int8Linear

    def stored(self, module: str, specs: Mapping[str, Spec]) -> Stored | None:
        if "SCB" not in specs:
            if "weight_format" in specs:
                raise ValueError("tensor SCB is missing")
            return None
        rows, columns = _shape(specs)
        wanted: dict[str, Any] = {"weight": ((rows, columns), torch.int8), "SCB": ((rows,), torch.float32)}
        if "weight_format" in specs:  # releases before 0.37 have no such tensor, and one format
            wanted["weight_format"] = ((), torch.uint8)
        require_specs(specs, wanted)
        return Stored(
            linear=self._linear,
            kind="LLM.int8()",
            shape=(rows, columns),
            group_size=columns,
            keys=tuple(wanted),
            build=_build_bitsandbytes,
            **_FACTS,
        )


class SmoothQuant:
    """lmdeploy's 8-bit tensors in a folder (`qops.formats.folders.stored.Method`).

    Args:
        settings: the quantization config.
        options: of the user.

    Raises:
        ValueError: another `quant_dtype` than int8.
    """

    def __init__(self, settings: Mapping[str, Any], options: Options):
        options.refuse("smooth_quant")
        if settings.get("quant_dtype", "int8") != "int8":
            raise ValueError(f"quant_dtype must be int8, got {settings['quant_dtype']!r}")

    def stored(self, module: str, specs: Mapping[str, Spec]) -> Stored | None:
        if "scale" not in specs:
            return None
        rows, columns = _shape(specs)
        wanted: dict[str, Any] = {"weight": ((rows, columns), torch.int8), "scale": ((rows, 1), torch.float32)}
        require_specs(specs, wanted)
        return Stored(
            linear=Int8Linear,
            kind="smooth_quant int8",
            shape=(rows, columns),
            group_size=columns,
            keys=tuple(wanted),
            build=lambda tensors: from_lmdeploy(**tensors, pack=False),
            **_FACTS,
        )


def _shape(specs: Mapping[str, Spec]) -> tuple[int, int]:
    weight = specs.get("weight")
    if weight is None or len(weight.shape) != 2:
        raise ValueError(f"tensor weight must be a matrix, got {weight}")
    return weight.shape[0], weight.shape[1]


def _build_bitsandbytes(tensors: Mapping[str, Tensor]) -> Int8Weight:
    given = dict(tensors)
    layout = given.pop("weight_format", None)
    if layout is not None and int(layout) != 0:
        raise ValueError(
            f"weight_format must be 0, rows, got {int(layout)}, an order of an older release for its kernels"
        )
    return from_bitsandbytes(**given, pack=False)
