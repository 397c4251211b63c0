"""Folders as quantization packages write them, by each format's definition, so that no package is needed."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.formats.folders import Written, write_as

GROUP = 32


def _codes(linear: nn.Linear, random: torch.Generator, low: int, high: int) -> Tensor:
    return torch.randint(low, high, linear.weight.shape, generator=random)


def _scales(random: torch.Generator, *shape: int, most: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return ((torch.rand(shape, generator=random) + 0.5) * (0.4 / most)).to(dtype)


def _rows(codes: Tensor, *per_group: Tensor) -> list[Tensor]:
    """[R, 1] of groups that are rows -> float64 for each code."""
    groups = codes.numel() // GROUP
    return [tensor.view(groups, 1).double().expand(-1, GROUP).reshape(codes.shape) for tensor in per_group]


def hqq(bits: int) -> Written:
    said = {"axis": 1, "nbits": bits, "group_size": GROUP, "quant_scale": 0, "quant_zero": 0, "view_as_float": 0}

    def encode(linear: nn.Linear, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        codes = _codes(linear, random, 0, 1 << bits)
        groups = codes.numel() // GROUP
        scale = _scales(random, groups, 1, most=1 << bits, dtype=torch.float16)
        zero = ((1 << bits) * (0.25 + torch.rand(groups, 1, generator=random) / 2)).half()
        each_scale, each_zero = _rows(codes, scale, zero)
        grouped = codes.view(groups, GROUP).to(torch.uint8)
        half = groups // 2
        meta = {key: torch.tensor(value, dtype=torch.int32) for key, value in said.items()}
        tensors = {
            "W_q": grouped if bits == 8 else grouped[:half] << 4 | grouped[half:],
            "scale": scale,
            "zero": zero,
            "shape": torch.tensor(codes.shape),
            "packing": torch.tensor(list(f"{bits}bit_u8".encode()), dtype=torch.uint8),
            **meta,
        }
        return tensors, ((codes - each_zero) * each_scale).float()

    written = write_as({}, encode)
    del written.config["quantization_config"]
    return written


def quanto(qtype: str) -> Written:
    def int4(linear: nn.Linear, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        codes = _codes(linear, random, 0, 16)
        groups = codes.numel() // GROUP
        scale = _scales(random, groups, 1, most=16, dtype=torch.float16)
        shift = (scale * (6 + 4 * torch.rand(groups, 1, generator=random))).half()
        each_scale, each_shift = _rows(codes, scale, shift)
        grouped = codes.view(groups, GROUP).to(torch.uint8)
        data = grouped[: groups // 2] | grouped[groups // 2 :] << 4
        tensors = {"weight._data._data": data, "weight._scale": scale, "weight._shift": shift}
        return tensors, (codes * each_scale - each_shift).float()

    def int8(linear: nn.Linear, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        codes = _codes(linear, random, -128, 128).to(torch.int8)
        scale = _scales(random, linear.out_features, 1, most=256, dtype=torch.float16)
        return {"weight._data": codes, "weight._scale": scale}, codes * scale.float()

    def encode(linear: nn.Linear, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        tensors, exact = (int4 if qtype == "qint4" else int8)(linear, random)
        return {**tensors, "input_scale": torch.ones(()), "output_scale": torch.ones(())}, exact

    written = write_as({}, encode)
    del written.config["quantization_config"]
    modules = {name.partition(".weight._")[0] for name in written.tensors if ".weight._" in name}
    written.files["quanto_qmap.json"] = {name: {"weights": qtype, "activations": "none"} for name in modules}
    return written


def bitsandbytes() -> Written:
    def encode(linear: nn.Linear, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        codes = _codes(linear, random, -127, 128).to(torch.int8)
        absmax = _scales(random, linear.out_features, most=1, dtype=torch.float16).float()
        scale = absmax * torch.tensor(7.874015718698502e-3)
        tensors = {"weight": codes, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return tensors, codes * scale.unsqueeze(1)

    return write_as({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, encode)


def smooth_quant() -> Written:
    def encode(linear: nn.Linear, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        codes = _codes(linear, random, -127, 128).to(torch.int8)
        scale = _scales(random, linear.out_features, 1, most=128)
        return {"weight": codes, "scale": scale}, codes * scale

    return write_as({"quant_method": "smooth_quant", "quant_dtype": "int8"}, encode)


def modelopt(algorithm: str, smoothed: bool = False) -> Written:
    def with_smoothing(linear: nn.Linear, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        tensors, exact = (int4 if algorithm.startswith("W4") else int8)(linear, random)
        if smoothed:
            tensors["pre_quant_scale"] = (torch.rand(linear.in_features, generator=random) + 0.5).half()
        return tensors, exact

    def int4(linear: nn.Linear, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        codes = _codes(linear, random, -8, 8)
        scale = _scales(random, linear.out_features, linear.in_features // GROUP, most=16)
        low, high = codes[0::2] & 15, codes[1::2] & 15
        exact = codes * scale.double().repeat_interleave(GROUP, dim=1)
        return {"weight": (low | high << 4).to(torch.uint8), "weight_scale": scale}, exact.float()

    def int8(linear: nn.Linear, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        codes = _codes(linear, random, -128, 128).to(torch.int8)
        scale = _scales(random, linear.out_features, most=256)
        tensors = {"weight": codes, "weight_scale": scale}
        if algorithm.startswith("W8A8"):
            tensors["input_scale"] = torch.tensor(0.03)
        return tensors, codes * scale.unsqueeze(1)

    settings = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}
    return write_as(settings, with_smoothing)


DYNAMIC = {
    "_type": "QuantizeTensorToInt8Kwargs",
    "_data": {
        "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
        "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
        "reduce_range": False,
    },
}


def torchao(subclass: str, dynamic: bool = False) -> Written:
    def encode(linear: nn.Linear, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        n, groups = linear.out_features, linear.in_features // GROUP
        if subclass == "Int8Tensor":
            codes = _codes(linear, random, -128, 128).to(torch.int8)
            scale, zero = _scales(random, n, 1, most=256), torch.zeros(n, 1, dtype=torch.int8)
            exact = codes * scale
        else:
            codes = _codes(linear, random, -8, 8).to(torch.int8)
            scale = _scales(random, n, groups, most=16, dtype=torch.bfloat16)
            zero = torch.randint(-8, 8, (n, groups), generator=random).to(torch.int8)
            if subclass == "Int4Tensor":
                zero = (scale * zero).bfloat16()
            each_scale, each_zero = (tensor.double().repeat_interleave(GROUP, dim=1) for tensor in (scale, zero))
            if subclass == "Int4Tensor":
                exact = (codes * each_scale + each_zero).float()
                codes = codes[:, 0::2] & 15 | codes[:, 1::2] << 4
                scale, zero = scale.t().contiguous(), zero.t().contiguous()
            else:
                exact = ((codes - each_zero) * each_scale).float()
        return {"_weight_qdata": codes, "_weight_scale": scale, "_weight_zero_point": zero}, exact

    attributes: dict[str, Any] = {"block_size": [1, GROUP]}
    if subclass == "Int8Tensor":
        attributes |= {"act_quant_kwargs": DYNAMIC if dynamic else None, "reduce_range": False}
    elif subclass == "IntxUnpackedToInt8Tensor":
        attributes["target_dtype"] = {"_type": "torch.dtype", "_data": "int4"}
        attributes["activation_quantization"] = None
    written = write_as({"quant_method": "torchao"}, encode)
    said = json.dumps({"_type": subclass, "_data": attributes, "_tensor_data_names": ["qdata", "scale", "zero_point"]})
    modules = {name.removesuffix("._weight_qdata") for name in written.tensors if name.endswith("._weight_qdata")}
    written.metadata = {f"{name}.weight": said for name in modules}
    return written
