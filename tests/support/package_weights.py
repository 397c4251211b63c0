"""Weights that other packages quantised, as those store them, and what their own dequantisation makes of them.

    python -m tests.support.package_weights

makes `tests/data/package_weights.safetensors` anew: a small weight of each kind, with the releases that made it. It
needs all the packages, which nothing here asks for: hqq, optimum-quanto, bitsandbytes, torchao, lmdeploy and
nvidia-modelopt, all on a CPU.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "data" / "package_weights.safetensors"
SHAPE = (8, 128)


def random_weight(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal weights with a few large columns, and a row of zeros."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    weight[:, ::37] *= 8
    weight[1] = 0
    return weight.to(dtype)


def _linear(weight: Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    return linear


def _hqq(weight: Tensor, bits: int) -> dict[str, Tensor]:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    layer: Any = HQQLinear(_linear(weight), config, compute_dtype=weight.dtype, device="cpu")
    meta = layer.meta
    codes = Quantizer.unpack[meta["packing"]](layer.W_q).view(weight.shape)
    tensors = {"W_q": layer.W_q.data, "scale": meta["scale"], "zero": meta["zero"], "codes": codes}
    return {**tensors, "dequantized": layer.dequantize()}


def hqq_int4(weight: Tensor) -> dict[str, Tensor]:
    return _hqq(weight, 4)


def hqq_int8(weight: Tensor) -> dict[str, Tensor]:
    return _hqq(weight, 8)


def _quanto(weight: Tensor, qtype: str) -> tuple[dict[str, Tensor], Tensor]:
    from optimum import quanto

    model = torch.nn.Sequential(_linear(weight))
    quanto.quantize(model, weights=getattr(quanto, qtype))
    quanto.freeze(model)
    state = {key.removeprefix("0.weight."): tensor for key, tensor in model.state_dict().items()}
    return state, model[0].weight


def quanto_int4(weight: Tensor) -> dict[str, Tensor]:
    state, live = _quanto(weight, "qint4")
    if type(live).__name__ != "WeightQBitsTensor":  # in the order of a kernel; the state has the plain one
        live = live.weight_qbits_tensor()
    tensors = {"data": state["_data._data"], "scale": state["_scale"], "shift": state["_shift"]}
    return {**tensors, "codes": live._data.unpack().view(weight.shape), "dequantized": live.dequantize()}


def quanto_int8(weight: Tensor) -> dict[str, Tensor]:
    state, live = _quanto(weight, "qint8")
    return {"data": state["_data"], "scale": state["_scale"], "dequantized": live.dequantize()}


def bitsandbytes_int8(weight: Tensor) -> dict[str, Tensor]:
    from bitsandbytes import functional

    codes, absmax, _ = functional.int8_vectorwise_quant(weight.half())
    return {"weight": codes, "SCB": absmax, "dequantized": functional.int8_vectorwise_dequant(codes, absmax)}


def _torchao(weight: Tensor, config: str, **options: Any) -> Any:
    from torchao import quantization

    linear = _linear(weight)
    quantization.quantize_(linear, getattr(quantization, config)(**options))
    return linear.weight


def _torchao_tensors(live: Any) -> dict[str, Tensor]:
    tensors = {key: getattr(live, key) for key in ("qdata", "scale", "zero_point")}
    return {**tensors, "dequantized": live.dequantize()}


def torchao_int8(weight: Tensor) -> dict[str, Tensor]:
    return _torchao_tensors(_torchao(weight, "Int8DynamicActivationInt8WeightConfig"))


def torchao_intx(weight: Tensor) -> dict[str, Tensor]:
    from torchao.quantization import MappingType
    from torchao.quantization.granularity import PerGroup

    options = {"weight_dtype": torch.int4, "granularity": PerGroup(32), "mapping_type": MappingType.ASYMMETRIC}
    return _torchao_tensors(_torchao(weight, "IntxWeightOnlyConfig", **options))


def lmdeploy_int8(weight: Tensor) -> dict[str, Tensor]:
    from lmdeploy.pytorch.kernels.default.w8a8_kernels import per_channel_quant

    codes, scale = per_channel_quant(weight, torch.int8)
    # Its runtime never dequantises: the product of codes and scales is the definition.
    return {"weight": codes, "scale": scale, "dequantized": codes * scale}


def _modelopt(weight: Tensor, config: str) -> Tensor:
    """The scales that it exports."""
    from modelopt.torch import quantization
    from modelopt.torch.export import quant_utils

    model = torch.nn.Sequential(_linear(weight))
    x = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(1)).to(weight.dtype)
    quantization.quantize(model, getattr(quantization, config), forward_loop=lambda found: found(x))
    return quant_utils.get_weight_scaling_factor(model[0])


def modelopt_int4(weight: Tensor) -> dict[str, Tensor]:
    from modelopt.torch.export import quant_utils

    scale = _modelopt(weight, "INT4_BLOCKWISE_WEIGHT_ONLY_CFG")
    # None of its functions reads this export, so it exports weights that its codes hold exactly.
    each = scale.repeat_interleave(128, dim=1)
    exact = (weight / each).round().clamp(-8, 7) * each
    return {
        "weight": quant_utils.to_quantized_weight(exact, scale, "int4_awq", block_size=128),
        "weight_scale": scale,
        "dequantized": exact,
    }


def modelopt_int8(weight: Tensor) -> dict[str, Tensor]:
    from modelopt.torch.export import quant_utils

    scale = _modelopt(weight, "INT8_WEIGHT_ONLY_CFG")
    codes = quant_utils.to_quantized_weight(weight, scale, "int8_wo")
    dequantized = quant_utils.from_quantized_weight(codes, scale, "int8_wo", torch.float32)
    return {"weight": codes, "weight_scale": scale, "dequantized": dequantized}


PRODUCERS: dict[str, tuple[str, Callable[[Tensor], dict[str, Tensor]]]] = {
    "hqq_int4": ("hqq", hqq_int4),
    "hqq_int8": ("hqq", hqq_int8),
    "quanto_int4": ("optimum-quanto", quanto_int4),
    "quanto_int8": ("optimum-quanto", quanto_int8),
    "bitsandbytes_int8": ("bitsandbytes", bitsandbytes_int8),
    "torchao_int8": ("torchao", torchao_int8),
    "torchao_intx": ("torchao", torchao_intx),
    "lmdeploy_int8": ("lmdeploy", lmdeploy_int8),
    "modelopt_int4": ("nvidia-modelopt", modelopt_int4),
    "modelopt_int8": ("nvidia-modelopt", modelopt_int8),
}
"""By kind: the package as PyPI names it, and what makes tensors of a weight with it."""


def main() -> None:
    packages = sorted({package for package, _ in PRODUCERS.values()})
    versions = {package: importlib.metadata.version(package) for package in ("torch", *packages)}
    found = {
        f"{kind}.{key}": tensor.clone(memory_format=torch.contiguous_format)
        for kind, (_, produce) in PRODUCERS.items()
        for key, tensor in produce(random_weight(SHAPE, torch.float16, seed=0)).items()
    }
    save_file(found, GOLDEN, metadata={"versions": json.dumps(versions)})


if __name__ == "__main__":
    main()
