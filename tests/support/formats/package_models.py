"""Folders that quantization packages save themselves, with the model of the package that is in them.

Each function quantises `model`, saves it to `folder` and returns what computes with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def hqq(model: Any, folder: Path) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    config = BaseQuantizeConfig(nbits=4, group_size=32, axis=1)
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=model.dtype, device="cpu")
    AutoHQQHFModel.save_to_safetensors(model, str(folder))
    return model


def _quanto(model: Any, folder: Path, qtype: str) -> Any:
    from optimum import quanto

    quantized = quanto.QuantizedModelForCausalLM.quantize(model, weights=getattr(quanto, qtype), exclude="lm_head")
    quantized.save_pretrained(folder)
    return quantized


def quanto_qint4(model: Any, folder: Path) -> Any:
    return _quanto(model, folder, "qint4")


def quanto_qint8(model: Any, folder: Path) -> Any:
    return _quanto(model, folder, "qint8")


def _by_transformers(model: Any, folder: Path, config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    dense = folder.parent / "dense"
    model.save_pretrained(dense)
    found = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=model.dtype, device_map="cpu")
    found.save_pretrained(folder)
    return found


def bitsandbytes(model: Any, folder: Path) -> Any:
    from transformers import BitsAndBytesConfig

    return _by_transformers(model, folder, BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0))


def _torchao(model: Any, folder: Path, config: str) -> Any:
    from torchao import quantization
    from transformers import TorchAoConfig

    return _by_transformers(model, folder, TorchAoConfig(getattr(quantization, config)()))


def torchao_dynamic(model: Any, folder: Path) -> Any:
    return _torchao(model, folder, "Int8DynamicActivationInt8WeightConfig")


def torchao_weight_only(model: Any, folder: Path) -> Any:
    return _torchao(model, folder, "Int8WeightOnlyConfig")


def lmdeploy(model: Any, folder: Path) -> Any:
    from lmdeploy.pytorch.kernels.default.w8a8_kernels import per_channel_quant
    from lmdeploy.pytorch.models.q_modules import QLinear

    # `QLinear.from_float` quantises in Triton; its products, too, so the model is left with exact activations.
    for name, linear in [item for item in model.named_modules() if type(item[1]) is nn.Linear and item[0] != "lm_head"]:
        quantized = QLinear.from_float(linear, initialization=False)
        quantized.weight, quantized.scale = per_channel_quant(linear.weight.detach(), torch.int8)
        quantized.forward = lambda x, linear=quantized: nn.functional.linear(
            x, (linear.weight * linear.scale).to(x.dtype)
        )
        model.set_submodule(name, quantized)
    model.config.quantization_config = {"quant_method": "smooth_quant", "quant_dtype": "int8"}
    model.save_pretrained(folder)
    return model


def _modelopt(model: Any, folder: Path, config: str) -> Any:
    from modelopt.torch import quantization
    from modelopt.torch.export import export_hf_checkpoint

    ids = torch.arange(32).view(2, 16)
    quantization.quantize(model, getattr(quantization, config), forward_loop=lambda found: found(ids))
    export_hf_checkpoint(copy.deepcopy(model), export_dir=folder)  # its weights become codes
    return model


def modelopt_int4(model: Any, folder: Path) -> Any:
    return _modelopt(model, folder, "INT4_BLOCKWISE_WEIGHT_ONLY_CFG")


def modelopt_int8(model: Any, folder: Path) -> Any:
    return _modelopt(model, folder, "INT8_WEIGHT_ONLY_CFG")


def modelopt_static(model: Any, folder: Path) -> Any:
    return _modelopt(model, folder, "INT8_DEFAULT_CFG")


def modelopt_awq(model: Any, folder: Path) -> Any:
    return _modelopt(model, folder, "INT4_AWQ_CFG")


def modelopt_smoothquant(model: Any, folder: Path) -> Any:
    return _modelopt(model, folder, "INT8_SMOOTHQUANT_CFG")


SAVERS: dict[Callable[[Any, Path], Any], str] = {
    hqq: "hqq",
    quanto_qint4: "optimum.quanto",
    quanto_qint8: "optimum.quanto",
    bitsandbytes: "bitsandbytes",
    torchao_dynamic: "torchao",
    torchao_weight_only: "torchao",
    lmdeploy: "lmdeploy",
    modelopt_int4: "modelopt",
    modelopt_int8: "modelopt",
    modelopt_static: "modelopt",
    modelopt_awq: "modelopt",
    modelopt_smoothquant: "modelopt",
}
"""With the module that each needs."""
