"""Folders written by `qops.save_model`.

A saved folder holds `config.json`, `generation_config.json` and `qops.safetensors`: the canonical tensors under
Transformers' names. Packing at load is a permutation of bytes, cheaper than reading them, so the folder stores no
packed layout and stays valid when that changes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qops.formats.checkpoint import Facts, QuantizedFacts, Weight
from qops.formats.folders.config import read_config, read_generation_config
from qops.formats.folders.tensors import read_json, read_spec
from qops.nn import QuantizedLinear
from qops.nn.linears import LINEARS
from qops.weights.requirements import dtype_name

QUANT_METHOD = "qops"
FORMAT_VERSION = 3
# Not model.safetensors: Transformers skips a quant_method it does not know and would load the rest as noise. Without
# a file of that name it stops.
TENSORS_FILE = "qops.safetensors"
# A folder without the first is no model: it goes first and comes last.
FILES = ("config.json", "generation_config.json", TENSORS_FILE)


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
            for name in FILES:
                (folder / name).unlink(missing_ok=True)
            for name in reversed(FILES):
                if (Path(aside) / name).exists():
                    os.replace(Path(aside) / name, folder / name)
    except BaseException:
        if created:
            folder.rmdir()
        raise


class Folder:
    """A folder written by `save_model`, as a :class:`qops.formats.Checkpoint`."""

    format = "folder of qops.save_model"

    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        settings = self._read_settings()
        self.config: Any = read_config(folder)
        del self.config.__dict__["quantization_config"]
        self.dtype: torch.dtype = self.config.dtype
        self.fuses: bool = settings["fused"]
        self._cast: dict[str, str] = settings["cast"]
        self._read: set[str] = set()
        self._kinds: dict[str, str] = settings["weights"]
        path = folder / TENSORS_FILE
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
        self._tensors: frozenset[str] = frozenset(self._file.keys())
        for module in self._kinds:
            if f"{module}.weight.qweight" not in self._tensors:
                raise ValueError(f"{path}: tensor {module}.weight.qweight is missing")
        weights = {f"{module}.weight" for module in self._kinds}
        parts = {name for name in self._tensors if name.rpartition(".")[0] in weights}
        self.names: frozenset[str] = frozenset(weights | (self._tensors - parts))
        self.generation_config: Any = read_generation_config(folder)

    def _read_settings(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        config = read_json(path)
        settings = config.get("quantization_config")
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        if not isinstance(settings, dict) or method != QUANT_METHOD:
            raise ValueError(f"{path}: must be of a model saved by qops.save_model, got quant_method '{method}'")
        if settings.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{path}: format_version must be {FORMAT_VERSION}, got {settings.get('format_version')}")
        if not isinstance(settings.get("fused"), bool):
            raise ValueError(f"{path}: fused must be true or false, got {settings.get('fused')!r}")
        cast = settings.get("cast")
        if not isinstance(cast, dict) or not all(hasattr(torch, str(dtype)) for dtype in cast.values()):
            raise ValueError(f"{path}: cast must map names to dtypes, got {cast!r}")
        kinds = settings.get("weights")
        if not isinstance(kinds, dict) or not all(isinstance(kind, str) for kind in kinds.values()):
            raise ValueError(f"{path}: weights must map names to kinds, got {kinds!r}")
        return settings

    def holds(self, name: str) -> bool:
        return name in self.names

    def kind(self, module: str) -> str:
        return self._kinds.get(module, "dense")

    def linear(self, module: str) -> type[QuantizedLinear] | None:
        if module not in self._kinds:
            return None
        found = LINEARS.get(self._kinds[module].partition(" ")[0])
        if found is None:
            raise ValueError(f"{self.folder}: {module}.weight has unknown kind '{self._kinds[module]}'")
        return found

    def describe(self, name: str) -> Facts:
        module = name.removesuffix(".weight")
        linear = self.linear(module) if module != name else None
        parts = [name] if linear is None else [key for key in self._tensors if key.rpartition(".")[0] == name]
        specs = {key: read_spec(self.folder / TENSORS_FILE, self._file, key) for key in parts}
        size = sum(spec.size_bytes for spec in specs.values())
        if linear is None:
            return Facts(dtype_name(specs[name].dtype), specs[name].shape, size)
        try:
            codes, scales = specs[f"{name}.qweight"], specs[f"{name}.scales"]
            rows, columns = codes.shape
            columns *= linear.weight_class._CODES_PER_ELEMENT
            group_size = columns // scales.shape[1]
        except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
            raise ValueError(f"{self.folder}: {name}: must have matrices qweight and scales, got {specs}") from error
        kind = self._kinds[module].partition(" ")[2]
        quantized = QuantizedFacts(group_size, scales.dtype, (kind,), f"{name}.perm" in specs)
        return Facts(self._kinds[module], (rows, columns), size, quantized)

    def weight(self, module: str) -> Weight:
        linear, prefix = self.linear(module), f"{module}.weight"
        if linear is None:
            return self.tensor(prefix)
        tensors = {key: self.tensor(f"{prefix}.{key}") for key in ("qweight", "scales")}
        for key in ("zeros", "offsets", "perm"):
            if f"{prefix}.{key}" in self._tensors:
                tensors[key] = self.tensor(f"{prefix}.{key}")
        try:
            return linear.weight_class._from_state(tensors, self._kinds[module].partition(" ")[2])
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{self.folder}: {prefix}: {error}") from error

    def activations(self, module: str) -> dict[str, torch.Tensor]:
        linear = self.linear(module)
        names = () if linear is None else linear.static_input
        there = [name for name in names if name == "input_scale" or f"{module}.{name}" in self.names]
        return {name: self.tensor(f"{module}.{name}") for name in there}

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise ValueError(f"{self.folder / TENSORS_FILE}: tensor {name} is missing")
        self._read.add(name)
        return self._file.get_tensor(name)

    def finish(self, model: Any) -> None:
        """Casts what was cast when the model was saved, too."""
        left = sorted(self._tensors - self._read)
        if left:
            raise ValueError(
                f"{self.folder / TENSORS_FILE}: every tensor must have a place in {type(model).__name__} as "
                f"config.json describes it, {len(left)} have none: {', '.join(left[:3])}"
            )
        for name, dtype in self._cast.items():
            module_name, _, key = name.rpartition(".")
            module = dict(model.named_modules()).get(module_name)
            if module is None or module._buffers.get(key) is None:
                raise ValueError(f"{self.folder / 'config.json'}: cast names {name}, which is no buffer of the model")
            module._buffers[key] = module._buffers[key].to(getattr(torch, dtype))
