"""Folders of quantised models, written as their producers write them, and the dense model that each stands for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.support.formats import encoders
from tests.support.models.families import random_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass
class Written:
    """A model of random codes.

    Attributes:
        model: dense, of the exact weights, float32.
        config: as in config.json.
        tensors: as in the files.
        shards: how many.
        files: further ones, by their names.
        metadata: of the safetensors files.
    """

    model: Any
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    shards: int = 1
    files: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        for name, content in self.files.items():
            (folder / name).write_text(json.dumps(content))
        metadata = {"format": "pt"} | self.metadata
        if self.shards == 1:
            save_file(self.tensors, folder / SINGLE, metadata)
            return folder
        names, index = sorted(self.tensors), {}
        for shard in range(self.shards):
            file = f"model-{shard + 1:05}-of-{self.shards:05}.safetensors"
            part = {name: self.tensors[name] for name in names[shard :: self.shards]}
            save_file(part, folder / file, metadata)
            index |= dict.fromkeys(part, file)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
        return folder


Encode = Callable[[nn.Linear, torch.Generator], tuple[dict[str, Tensor], Tensor]]
"""A linear -> its tensors by their last names, and its exact weight in float32."""


def write_as(
    settings: Mapping[str, Any],
    encode: Encode,
    family: str = "llama",
    but: tuple[str, ...] = ("lm_head",),
    dtype: torch.dtype = torch.float16,
    prepare: Callable[[Any], Any] = lambda model: None,
    **changes: Any,
) -> Written:
    """Every linear of a model of the family, but some, in a format; the others, norms and tables in ``dtype``."""
    model = random_model(family, **changes)
    prepare(model)
    random = torch.Generator().manual_seed(5)
    tensors: dict[str, Tensor] = {}
    # In the order of the model, so that a seed gives the same codes in each process.
    quantised = [name for name, part in model.named_modules() if type(part) is nn.Linear and name not in but]
    for name in quantised:
        linear = model.get_submodule(name)
        stored, exact = encode(linear, random)
        linear.weight.data = exact
        tensors |= {f"{name}.{key}": tensor for key, tensor in stored.items()}
    tied = set(model.all_tied_weights_keys)
    for name, value in model.state_dict().items():
        module, _, key = name.rpartition(".")
        if (module in quantised and key == "weight") or name in tied:
            continue
        value.copy_(value.to(dtype))
        tensors[name] = value.to(dtype).contiguous()
    config = model.config.to_dict()
    config |= {"architectures": [type(model).__name__], "dtype": str(dtype).removeprefix("torch.")}
    config["quantization_config"] = dict(settings)
    return Written(model, config, tensors)


def _random(linear: nn.Linear, random: torch.Generator, bits: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = linear.weight.shape
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=random, dtype=torch.uint8)
    zeros = torch.randint(1, 1 << bits, (rows, groups), generator=random, dtype=torch.uint8)
    scales = (torch.rand(rows, groups, generator=random) + 0.5).half() * (0.4 / (1 << bits))
    return codes, zeros, scales


def _exact(codes: Tensor, zeros: Tensor | int, scales: Tensor, group: Tensor | None = None) -> Tensor:
    group = torch.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1]) if group is None else group
    zeros = zeros.double()[:, group] if isinstance(zeros, Tensor) else zeros
    return (scales.double()[:, group] * (codes.double() - zeros)).float()


def gptq(
    bits: int = 4, version: int = 1, act_order: bool = False, symmetric: bool = False, group_size: int = 32
) -> tuple[dict[str, Any], Encode]:
    def encode(linear: nn.Linear, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        columns = linear.in_features
        size = columns if group_size == -1 else group_size
        codes, zeros, scales = _random(linear, random, bits, columns // size)
        if symmetric:
            zeros.fill_(1 << (bits - 1))
        group = torch.arange(columns) // size
        if act_order:
            group = group[torch.randperm(columns, generator=random)]
        tensors = encoders.gptq(codes, zeros, scales, group, bits=bits, version=version)
        return tensors, _exact(codes, zeros, scales, group)

    settings = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": act_order,
        "sym": symmetric,
        "checkpoint_format": "gptq_v2" if version == 2 else "gptq",
    }
    return settings, encode


def awq(version: str = "gemm", symmetric: bool = False, group_size: int = 32) -> tuple[dict[str, Any], Encode]:
    def encode(linear: nn.Linear, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        codes, zeros, scales = _random(linear, random, 4, linear.in_features // group_size)
        tensors = getattr(encoders, f"awq_{version}")(codes, zeros, scales)
        if symmetric:
            del tensors["qzeros"]
        return tensors, _exact(codes, 8 if symmetric else zeros, scales)

    settings = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "version": version,
        "zero_point": not symmetric,
    }
    return settings, encode


def compressed_tensors(
    bits: int = 4,
    symmetric: bool = True,
    group_size: int = 32,
    packed: bool = True,
    inputs: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Encode]:
    def encode(linear: nn.Linear, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        groups = linear.in_features // group_size if group_size > 0 else 1
        codes, zeros, scales = _random(linear, random, bits, groups)
        middle = 1 << (bits - 1)
        exact = _exact(codes, middle if symmetric else zeros, scales)
        if packed:
            return encoders.compressed_tensors(codes, None if symmetric else zeros, scales, bits=bits), exact
        tensors = {"weight": (codes.int() - middle).to(torch.int8), "weight_scale": scales}
        if not symmetric:
            tensors["weight_zero_point"] = (zeros.int() - middle).to(torch.int8)
        if inputs is not None and not inputs["dynamic"]:
            tensors["input_scale"] = torch.tensor([0.05], dtype=torch.float16)
            if not inputs["symmetric"]:
                tensors["input_zero_point"] = torch.tensor([7], dtype=torch.int8)
        return tensors, exact

    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group_size > 0 else "channel",
        "group_size": group_size if group_size > 0 else None,
        "dynamic": False,
    }
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if packed else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs and dict(inputs)}
        },
        "ignore": ["lm_head"],
    }
    return settings, encode
