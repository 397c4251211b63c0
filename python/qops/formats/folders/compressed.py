"""compressed-tensors, written: what `qops.formats.compressed_tensors` reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qops.formats.folders.words import pack
from qops.nn import QuantizedLinear
from qops.weights import Int8Weight
from qops.weights.state import QuantizedWeight

_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
_TENSOR = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}
# By the scheme of the linear. The format does not say how a dynamic scale is rounded: of symmetric ones here are three.
_INPUTS: dict[str, dict[str, Any] | None] = {
    "int4": None,
    "int8_weight_only": None,
    "int8": _TOKEN | {"symmetric": True},
    "int8_compressed_tensors": _TOKEN | {"symmetric": True},
    "int8_torchao": _TOKEN | {"symmetric": True},
    "int8_asymmetric": _TOKEN | {"symmetric": False},
    "int8_asymmetric_compressed_tensors": _TOKEN | {"symmetric": False},
    "int8_static": _TENSOR,
    "int8_static_compressed_tensors": _TENSOR,
}


def compressed(linear: QuantizedLinear) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A quantised linear in this format.

    Returns:
        Its tensors by the last parts of their names, bias excluded; its config group, targets excluded.

    Raises:
        ValueError: the format does not hold it exactly; the message does not name the linear.
    """
    if linear.scheme not in _INPUTS:
        raise ValueError(f"compressed-tensors has no scheme for an {type(linear).__name__}")
    inputs, weight, given = _INPUTS[linear.scheme], linear.weight, linear.activations()
    if inputs is _TENSOR:
        inputs = _TENSOR | {"symmetric": "input_zero_point" not in given}
    parts, bits = weight.widened().canonical(), 8 if isinstance(weight, Int8Weight) else 4
    if "perm" in parts:
        raise ValueError("act-order (weight_g_idx) is read no more by other readers of compressed-tensors")
    codes, scales, zeros = parts["qweight"], parts["scales"], _zero_points(weight, parts)
    if inputs is None:
        # Eight codes of four bits, or four of eight, from the lowest bits of a word on, on a little-endian machine.
        unsigned = codes.view(torch.uint8) ^ 128 if bits == 8 else codes
        tensors = {
            "weight_packed": unsigned.contiguous().view(torch.int32),
            "weight_scale": scales,
            "weight_shape": torch.tensor([weight.out_features, weight.in_features]),
        }
        if zeros is not None:
            tensors["weight_zero_point"] = pack(zeros, bits)
    else:
        tensors = {"weight": codes, "weight_scale": scales, **given}
    grouped = scales.shape[1] > 1
    scheme = {
        "format": "pack-quantized" if inputs is None else "int-quantized",
        "weights": {
            "num_bits": bits,
            "type": "int",
            "symmetric": zeros is None,
            "strategy": "group" if grouped else "channel",
            "group_size": weight.group_size if grouped else None,
            "dynamic": False,
        },
        "input_activations": inputs,
        "output_activations": None,
    }
    return tensors, scheme


def _zero_points(weight: QuantizedWeight, parts: Mapping[str, Tensor]) -> Tensor | None:
    """As they are stored, unsigned [N, K/G]; None where the weight is symmetric."""
    if weight.kind == "symmetric":
        return None
    said = f"compressed-tensors does not hold kind {weight.kind!r}"
    if weight.kind == "zero_point":
        zeros = parts["zeros"]
        if int(zeros.max()) > 15:
            raise ValueError(f"{said} with zero points above 15, got {int(zeros.max())}")
        return zeros
    if not isinstance(weight, Int8Weight):
        raise ValueError(said)
    # An offset is -scale * zero point where another format with zero points was read.
    scales, offsets = parts["scales"].double(), parts["zeros"].double()
    zeros = torch.where(scales == 0, 0, -offsets / scales).round()
    if bool(((zeros < -128) | (zeros > 127)).any()) or not torch.equal(-scales * zeros + 0.0, offsets + 0.0):
        raise ValueError(f"{said}, but where all offsets are -scale * integer")
    return (zeros + 128).to(torch.uint8)


def settings_of(schemes: Mapping[str, Mapping[str, Any]], dense: Iterable[str]) -> dict[str, Any]:
    """The quantization config of a folder.

    Args:
        schemes: of each quantised linear, as :func:`compressed` gives them.
        dense: the names of all other linears.
    """
    groups: list[dict[str, Any]] = []
    for module, scheme in schemes.items():
        group = next((group for group in groups if scheme.items() <= group.items()), None)
        if group is None:
            groups.append(group := {**scheme, "targets": []})
        group["targets"].append(module)
    if len(groups) == 1:
        groups[0]["targets"] = ["Linear"]
    formats = {group["format"] for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
        "ignore": sorted(dense),
    }
