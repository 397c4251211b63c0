"""Folders of Transformers' kind: a config, safetensors files, and a quantization method that says what is in them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from qops.formats.awq import Awq
from qops.formats.checkpoint import Facts, Weight
from qops.formats.compressed_tensors import CompressedTensors
from qops.formats.folders.config import read_config, read_generation_config
from qops.formats.folders.stored import Method, Options, Stored
from qops.formats.folders.tensors import TensorFiles, read_json, tensors_by_module
from qops.formats.gptq import Gptq
from qops.formats.hqq import Hqq
from qops.formats.int8_rows import Bitsandbytes, SmoothQuant
from qops.formats.modelopt import ModelOpt
from qops.formats.quanto import Quanto
from qops.formats.torchao import Torchao
from qops.nn import QuantizedLinear
from qops.weights.requirements import SCALE_DTYPES, dtype_name


def _by_settings(
    method: Callable[[Mapping[str, Any], Options], Method],
) -> Callable[[Mapping[str, Any], Options, TensorFiles], Method]:
    """For a method that needs to know no more of a folder than its settings."""
    return lambda settings, options, files: method(settings, options)


METHODS: dict[str, Callable[[Mapping[str, Any], Options, TensorFiles], Method]] = {
    "gptq": _by_settings(Gptq),
    "awq": _by_settings(Awq),
    "compressed-tensors": _by_settings(CompressedTensors),
    "bitsandbytes": _by_settings(Bitsandbytes),
    "smooth_quant": _by_settings(SmoothQuant),
    "modelopt": _by_settings(ModelOpt),
    "hqq": Hqq,
    "quanto": Quanto,
    "torchao": Torchao,
}
"""The quantization methods whose folders are read, by the quant_method of the config."""

# Where the settings stand that config.json does not have, and what method they are of where they do not say.
_SETTINGS_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
    "quanto_qmap.json": "quanto",
}
# hqq itself writes no settings at all.
_HQQ_CODES = ".W_q"
# Integers without a scale beside them are codes that something is missing for.
_DENSE_DTYPES = (*SCALE_DTYPES, torch.float64)
# Old folders hold frequencies that every model computes for itself.
_COMPUTED = ".rotary_emb.inv_freq"


def read_settings(folder: Path) -> dict[str, Any]:
    """What a folder says about its quantization, `quant_method` included.

    Raises:
        ValueError: the config is malformed; the folder says nothing.
    """
    path = folder / "config.json"
    if not path.is_file():
        found = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"; {found[0]} is a file that can be loaded by its own path" if found else ""
        raise ValueError(f"{folder}: config.json is missing{hint}")
    config = read_json(path)
    found: Any = config.get("quantization_config", config.get("compression_config"))
    if found is None:
        for name, method in _SETTINGS_FILES.items():
            if (folder / name).is_file():
                path, found = folder / name, {"quant_method": method} | read_json(folder / name)
                break
    if found is None and any(name.endswith(_HQQ_CODES) for name in TensorFiles(folder).specs):
        return {"quant_method": "hqq"}
    if found is None:
        raise ValueError(
            f"{path}: quantization_config is missing: the model is dense. qops.quantize_model converts what "
            "Transformers' from_pretrained loads"
        )
    return require_settings(path, found)


def require_settings(path: Path, found: Any) -> dict[str, Any]:
    """Raises unless it is an object that names a method."""
    if not isinstance(found, dict) or not isinstance(found.get("quant_method"), str):
        raise ValueError(f"{path}: quantization_config must be an object with a quant_method, got {found!r}")
    return found


class PretrainedFolder:
    """A folder of Transformers' kind, as a :class:`qops.formats.Checkpoint`.

    What is quantised is decided by the tensors that are there. All of them have been looked at, by their headers,
    before one is read.

    Args:
        folder: with `config.json` and safetensors files.
        options: what its user says about it.
        settings: its quantization config; default what the folder says.

    Attributes:
        path: the folder.
        files: the names of its safetensors files.
        method: the quant_method.
        format: what it is.
        stored: each quantised weight by the name of its module.
        names: of all parameters and buffers, `<module>.weight` where the weight is quantised.
        config: of Transformers.
        dtype: that of the config; that of most dense tensors where it has none.
        generation_config: of Transformers; None where there is none.

    Raises:
        FileNotFoundError: there are no safetensors files.
        ValueError: config, index or files are malformed; another quantization method; a module's tensors are not those
            of a weight that is supported.
    """

    fuses = True

    def __init__(
        self,
        folder: Path,
        options: Options = Options(),  # noqa: B008 (immutable)
        settings: Mapping[str, Any] | None = None,
    ):
        self.path = folder
        settings = read_settings(folder) if settings is None else settings
        self.method: str = settings["quant_method"]
        if self.method not in METHODS:
            raise ValueError(
                f"{folder / 'config.json'}: quant_method must be one of {', '.join(METHODS)}, got {self.method!r}"
            )
        self.format = f"folder of Transformers, quant_method {self.method}"
        self._files = TensorFiles(folder)
        self.files = self._files.names
        try:
            method = METHODS[self.method](settings, options, self._files)
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{folder}: quantization_config: {error}") from error
        self.stored: dict[str, Stored] = {}
        consumed: set[str] = set()
        for module, specs in tensors_by_module(self._files.specs).items():
            try:
                stored = method.stored(module, specs)
            except (TypeError, AttributeError, KeyError, ValueError, RuntimeError, re.error) as error:
                raise ValueError(f"{folder}: {module}: {error}") from error
            if stored is not None:
                self.stored[module] = stored
                consumed |= {f"{module}.{key}" for key in (*stored.keys, *stored.input_keys)}
        if not self.stored:
            raise ValueError(f"{folder}: must hold weights of {self.method}, as its config says, got dense tensors")
        for name, spec in self._files.specs.items():
            if name not in consumed and name.endswith((".weight", ".bias")) and spec.dtype not in _DENSE_DTYPES:
                raise ValueError(
                    f"{folder}: tensor {name} must be of floating point where nothing scales it, got {spec}"
                )
        self._read: set[str] = set()
        self.names = frozenset({f"{module}.weight" for module in self.stored} | (self._files.specs.keys() - consumed))
        self._consumed = frozenset(consumed)

    @functools.cached_property
    def config(self) -> Any:
        config = read_config(self.path)
        config.__dict__.pop("quantization_config", None)
        config.__dict__.pop("compression_config", None)
        return config

    @property
    def dtype(self) -> torch.dtype:
        found = self.config.dtype
        if found is None:
            sizes: dict[torch.dtype, int] = {}
            for name, spec in self._files.specs.items():
                if name not in self._consumed and spec.dtype.is_floating_point:
                    sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.size_bytes
            found = max(sizes, key=sizes.__getitem__, default=torch.bfloat16)
        return found

    @functools.cached_property
    def generation_config(self) -> Any:
        return read_generation_config(self.path)

    def holds(self, name: str) -> bool:
        return name in self.names

    def linear(self, module: str) -> type[QuantizedLinear] | None:
        return self.stored[module].linear if module in self.stored else None

    def kind(self, module: str) -> str:
        return self.stored[module].kind if module in self.stored else "dense"

    def describe(self, name: str) -> Facts:
        stored = self.stored.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if stored is None:
            spec = self._files.specs[name]
            return Facts(dtype_name(spec.dtype), spec.shape, spec.size_bytes)
        module = name.removesuffix(".weight")
        size = sum(self._files.specs[f"{module}.{key}"].size_bytes for key in stored.keys)
        return Facts(stored.kind, stored.shape, size, stored.facts())

    def weight(self, module: str) -> Weight:
        stored = self.stored.get(module)
        if stored is None:
            return self.tensor(f"{module}.weight")
        tensors = {key: self._take(f"{module}.{key}") for key in stored.keys}
        try:
            return stored.build(tensors)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{self.path}: {module}: {error}") from error

    def activations(self, module: str) -> dict[str, torch.Tensor]:
        stored = self.stored[module]
        return {key: self._take(f"{module}.{key}") for key in stored.input_keys}

    def tensor(self, name: str) -> torch.Tensor:
        if name.removesuffix(".weight") in self.stored and name.endswith(".weight"):
            raise ValueError(f"{self.path}: {name} is quantised, and must be dense where it stands in the model")
        return self._take(name)

    def _take(self, name: str) -> torch.Tensor:
        self._read.add(name)
        return self._files.read(name)

    def finish(self, model: Any) -> None:
        require_places(str(self.path), self._files.specs.keys() - self._read, model)


def require_places(where: str, left: Collection[str], model: Any) -> None:
    """Raises where tensors are left over that the model has no place for.

    Args:
        where: to name in the message.
        left: the names of what was not asked for.
        model: that was built.
    """
    # What Transformers itself knows as left over from older releases.
    known = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    lost = sorted(
        name for name in left if not name.endswith(_COMPUTED) and not any(pattern.search(name) for pattern in known)
    )
    if lost:
        raise ValueError(
            f"{where}: every tensor must have a place in {type(model).__name__} as config.json describes it, "
            f"{len(lost)} have none: {', '.join(lost[:3])}"
        )
