"""The tensors of a folder: `model.safetensors`, or the shards that an index lists, opened but not read.

The PyPI package `safetensors` parses the files and checks that their headers fit their sizes. The index is a table of
file names from outside, so it is held to the folder, and to what the shards hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor, as the header of its file tells them."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"

    @property
    def size_bytes(self) -> int:
        count = self.dtype.itemsize
        for extent in self.shape:
            count *= extent
        return count


def read_json(path: Path) -> dict[str, Any]:
    """An object of JSON; a ValueError that names the path where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must be a JSON object, got {type(found).__name__}")
    return found


def read_spec(path: Path, file: Any, name: str) -> Spec:
    """Of a tensor in an open safetensors file.

    Raises:
        ValueError: its dtype is none that is supported.
    """
    entry = file.get_slice(name)
    dtype = _DTYPES.get(entry.get_dtype())
    if dtype is None:
        raise ValueError(f"{path}: tensor {name} has dtype {entry.get_dtype()}, which is not supported")
    return Spec(tuple(entry.get_shape()), dtype)


class TensorFiles:
    """The tensors of a folder by their names.

    Args:
        folder: with `model.safetensors`, or `model.safetensors.index.json` and its shards.

    Experts that are named as Mixtral's first release named them (`block_sparse_moe.experts.0.w1`), and their router,
    have the names of all other families here (`mlp.experts.0.gate_proj`).

    Attributes:
        names: of the files.
        specs: shape and dtype of each.
        metadata: what the files say about themselves.

    Raises:
        FileNotFoundError: there are no safetensors files.
        ValueError: a file is malformed; the index names a file outside the folder, one that is missing, or tensors
            that are not in it; a file holds tensors that the index does not name.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, tuple[Any, str]] = {}
        self.names: set[str] = set()
        self.specs: dict[str, Spec] = {}
        self.metadata: dict[str, str] = {}
        if (folder / INDEX).is_file():
            for shard, names in self._shards().items():
                self._open(folder / shard, names)
        elif (folder / SINGLE).is_file():
            self._open(folder / SINGLE, None)
        else:
            raise FileNotFoundError(f"{folder}: neither {SINGLE} nor {INDEX} is there; pickled weights are not read")

    def _shards(self) -> dict[str, set[str]]:
        """The names that the index gives each file."""
        path = self.folder / INDEX
        listed = read_json(path).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise ValueError(f"{path}: weight_map must map tensors to files, got {type(listed).__name__}")
        shards: dict[str, set[str]] = {}
        for name, shard in listed.items():
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ValueError(
                    f"{path}: weight_map must name safetensors files of this folder, got {shard!r} for {name}"
                )
            shards.setdefault(shard, set()).add(name)
        return shards

    def _open(self, path: Path, wanted: set[str] | None) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
        self.names.add(path.name)
        names = set(file.keys())
        if wanted is not None and names != wanted:
            missing, extra = sorted(wanted - names), sorted(names - wanted)
            said = f"tensor {missing[0]} is missing" if missing else f"tensor {extra[0]} is not in {INDEX}"
            raise ValueError(f"{path}: {said}")
        for name in sorted(names):
            here = _renamed(name)
            if here in self.specs:
                raise ValueError(f"{path}: tensor {name} is there twice, as {here} too")
            self.specs[here] = read_spec(path, file, name)
            self._files[here] = file, name
        self.metadata |= file.metadata() or {}

    def read(self, name: str) -> torch.Tensor:
        """A tensor of one's own.

        Args:
            name: one of ``specs``.

        Raises:
            ValueError: there is none of that name; the file cannot be read.
        """
        from safetensors import SafetensorError

        if name not in self.specs:
            raise ValueError(f"{self.folder}: tensor {name} is missing")
        try:
            file, stored = self._files[name]
            return file.get_tensor(stored)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.folder}: tensor {name}: {error}") from error


_EXPERT = re.compile(r"\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.")
_LINEARS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def _renamed(name: str) -> str:
    name = _EXPERT.sub(lambda found: f".mlp.experts.{found[1]}.{_LINEARS[found[2]]}.", name)
    return name.replace(".block_sparse_moe.gate.", ".mlp.gate.")


def tensors_by_module(specs: Mapping[str, Spec]) -> dict[str, dict[str, Spec]]:
    """The tensors of each module, by the last part of their names; parts of `weight` are all one key."""
    modules: dict[str, dict[str, Spec]] = {}
    for name, spec in specs.items():
        module, part, key = name.rpartition(".weight.")
        if part:
            key = f"weight.{key}"
        else:
            module, _, key = name.rpartition(".")
        modules.setdefault(module, {})[key] = spec
    return modules
