"""Folders written by `qops.save_model` and `save_pretrained`.

A saved folder holds `config.json`, `generation_config.json` and safetensors files as Transformers names them, with the
canonical tensors. Packing at load is a permutation of bytes, cheaper than reading them, so the folder stores no packed
layout and stays valid when that changes.

The codes of a weight stand under the weight's own name, with one dimension more than it. Transformers skips a
quant_method that it does not know, and would initialise at random what it does not find; tensors of another shape it
refuses.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from qops.formats.checkpoint import Facts, QuantizedFacts, Weight
from qops.formats.folders.config import read_config, read_generation_config
from qops.formats.folders.tensors import INDEX, SINGLE, TensorFiles
from qops.nn import QuantizedLinear
from qops.nn.linears import LINEARS
from qops.weights.requirements import dtype_name
from qops.weights.state import QuantizedWeight

QUANT_METHOD = "qops"
FORMAT_VERSION = 4
# A folder without the first is no model: it goes first and comes last.
_FILES = ("config.json", "generation_config.json", SINGLE, INDEX)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def replace_files(folder: Path, write: Callable[[Path], None]) -> None:
    """Replaces a saved model. A reader meets the old one, the new one, or a folder without a config, never a mixture.

    Args:
        write: writes the files of the new one into an empty folder; where it fails nothing has changed.
    """
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".qops-") as aside:
            write(Path(aside))
            for name in [*_FILES, *(path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name))]:
                (folder / name).unlink(missing_ok=True)
            for path in sorted(Path(aside).iterdir(), key=lambda path: path.name == _FILES[0]):
                os.replace(path, folder / path.name)
    except BaseException:
        if created:
            folder.rmdir()
        raise


def write_tensors(tensors: Mapping[str, torch.Tensor], folder: Path, max_shard_size: int | str) -> None:
    """Safetensors files as Transformers writes them: one, or shards and an index."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    pattern = SINGLE.replace(".", "{suffix}.")
    split = split_torch_state_dict_into_shards(dict(tensors), filename_pattern=pattern, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        # Parts of a merged dense linear are views of one storage, which safetensors refuses.
        part = {name: tensors[name].detach().cpu().contiguous().clone() for name in names}
        save_file(part, folder / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")


def tensors_of(name: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """What a folder holds of a weight.

    Args:
        name: of the parameter that it is in Transformers' model.
    """
    parts = {f"{name}.{weight._state_key(key)}": tensor for key, tensor in weight.canonical().items()}
    return {name: parts.pop(f"{name}.qweight").unsqueeze(0), **parts}


class Folder:
    """A folder written by `save_model`, as a :class:`qops.formats.Checkpoint`.

    Args:
        folder: with `config.json` and safetensors files.
        settings: its quantization config.

    Raises:
        FileNotFoundError: there are no safetensors files.
        ValueError: settings, config or files are malformed.
    """

    format = "folder of qops.save_model"

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.path = folder
        self._check(settings)
        self.config: Any = read_config(folder)
        self.config.__dict__.pop("quantization_config", None)
        self.dtype: torch.dtype = self.config.dtype
        self.fuses: bool = settings["fused"]
        self._cast: dict[str, str] = settings["cast"]
        self._changed: str | None = settings.get("changed")
        self._read: set[str] = set()
        self._kinds: dict[str, str] = settings["weights"]
        self._tensors = TensorFiles(folder)
        self.files = self._tensors.names
        weights = {f"{module}.weight" for module in self._kinds}
        for name in sorted(weights):
            spec = self._tensors.specs.get(name)
            if spec is None or len(spec.shape) != 3 or spec.shape[0] != 1:
                raise ValueError(f"{folder}: tensor {name} must be codes of shape [1, N, bytes], got {spec}")
        self.names: frozenset[str] = frozenset(
            name for name in self._tensors.specs if name.rpartition(".")[0] not in weights
        )
        self.generation_config: Any = read_generation_config(folder)

    def _check(self, settings: Mapping[str, Any]) -> None:
        path = self.path / "config.json"
        if settings.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{path}: format_version must be {FORMAT_VERSION}, got {settings.get('format_version')}")
        if not isinstance(settings.get("fused"), bool):
            raise ValueError(f"{path}: fused must be true or false, got {settings.get('fused')!r}")
        cast = settings.get("cast")
        if not isinstance(cast, dict) or not all(hasattr(torch, str(dtype)) for dtype in cast.values()):
            raise ValueError(f"{path}: cast must map names to dtypes, got {cast!r}")
        if not isinstance(settings.get("changed"), str | None):
            raise ValueError(f"{path}: changed must be a reason or be left out, got {settings['changed']!r}")
        kinds = settings.get("weights")
        if not isinstance(kinds, dict) or not all(isinstance(kind, str) for kind in kinds.values()):
            raise ValueError(f"{path}: weights must map names to kinds, got {kinds!r}")

    def holds(self, name: str) -> bool:
        return name in self.names

    def kind(self, module: str) -> str:
        return self._kinds.get(module, "dense")

    def linear(self, module: str) -> type[QuantizedLinear] | None:
        if module not in self._kinds:
            return None
        found = LINEARS.get(self._kinds[module].partition(" ")[0])
        if found is None:
            raise ValueError(f"{self.path}: {module}.weight has unknown kind '{self._kinds[module]}'")
        return found

    def describe(self, name: str) -> Facts:
        module = name.removesuffix(".weight")
        linear = self.linear(module) if module != name else None
        specs = {key: spec for key, spec in self._tensors.specs.items() if name in (key, key.rpartition(".")[0])}
        if name not in specs:
            raise ValueError(f"{self.path}: tensor {name} is missing")
        size = sum(spec.size_bytes for spec in specs.values())
        if linear is None:
            return Facts(dtype_name(specs[name].dtype), specs[name].shape, size)
        try:
            codes, scales = specs[name], specs[f"{name}.scales"]
            _, rows, columns = codes.shape
            columns *= linear.weight_class._CODES_PER_ELEMENT
            _, groups, *levels = scales.shape
            group_size = columns // (groups * (levels[0] - 2) if levels else groups)
        except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
            raise ValueError(f"{self.path}: {name}: must have codes and scales, got {specs}") from error
        kind = self._kinds[module].partition(" ")[2]
        zeros = specs.get(f"{name}.offsets" if kind == "offset" else f"{name}.zeros")
        zero_dtype = torch.float32 if zeros is None or kind == "zero_point" else zeros.dtype
        quantized = QuantizedFacts(group_size, scales.dtype, (kind,), f"{name}.perm" in specs, zero_dtype)
        return Facts(self._kinds[module], (rows, columns), size, quantized)

    def weight(self, module: str) -> Weight:
        linear, prefix = self.linear(module), f"{module}.weight"
        if linear is None:
            return self.tensor(prefix)
        tensors = {"qweight": self.tensor(prefix).squeeze(0), "scales": self.tensor(f"{prefix}.scales")}
        for key in ("zeros", "offsets", "perm"):
            if f"{prefix}.{key}" in self._tensors.specs:
                tensors[key] = self.tensor(f"{prefix}.{key}")
        try:
            return linear.weight_class._from_state(tensors, self._kinds[module].partition(" ")[2])
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{self.path}: {prefix}: {error}") from error

    def activations(self, module: str) -> dict[str, torch.Tensor]:
        linear = self.linear(module)
        names = () if linear is None else linear.static_input
        there = [name for name in names if name != "input_zero_point" or f"{module}.{name}" in self.names]
        return {name: self.tensor(f"{module}.{name}") for name in there}

    def tensor(self, name: str) -> torch.Tensor:
        self._read.add(name)
        return self._tensors.read(name)

    def finish(self, model: Any) -> None:
        """Casts what was cast when the model was saved, too, and says what was said of it."""
        left = sorted(self._tensors.specs.keys() - self._read)
        if left:
            raise ValueError(
                f"{self.path}: every tensor must have a place in {type(model).__name__} as "
                f"config.json describes it, {len(left)} have none: {', '.join(left[:3])}"
            )
        for name, dtype in self._cast.items():
            module_name, _, key = name.rpartition(".")
            module = dict(model.named_modules()).get(module_name)
            if module is None or module._buffers.get(key) is None:
                raise ValueError(f"{self.path / 'config.json'}: cast names {name}, which is no buffer of the model")
            module._buffers[key] = module._buffers[key].to(getattr(torch, dtype))
        if self._changed is not None:
            model.qops_changed = self._changed
