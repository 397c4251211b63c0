"""Keys and tensors of a GGUF file, each checked when it is asked for; what nothing has asked for is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qops.formats.gguf.blocks import BLOCK_TYPES
from qops.formats.gguf.container import DENSE_TYPES, read_container, unsupported

_MAX_FLOAT = torch.finfo(torch.float32).max
# Keys of an architecture that say nothing about what is computed.
_TELL_NOTHING = frozenset(("tensor_data_layout", "rope.scaling.finetuned", "expert_used_count"))


class Contents:
    """What a file holds.

    Args:
        path: of the file.

    Attributes:
        path: of the file.
        architecture: as GGUF calls it.

    Raises:
        ValueError: here and from each method, naming the file and what was expected.
    """

    def __init__(self, path: Path):
        self.path = path
        reader = read_container(path)
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._asked: set[str] = set()
        self._checked: set[str] = set()
        self.architecture = ""
        self.architecture = self.key("general.architecture", str)

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.path}: {message}")

    # Keys ------------------------------------------------------------------------------------------------------------

    def full_key(self, key: str) -> str:
        """A key that begins with a dot is the architecture's."""
        return self.architecture + key if key.startswith(".") else key

    def value(self, key: str) -> Any:
        """Whatever stands there; None where the key is missing."""
        key = self.full_key(key)
        self._asked.add(key)
        if key not in self._fields:
            return None
        try:
            return self._fields[key].contents()
        except ValueError as error:  # a string that is not UTF-8
            raise self.error(f"key {key}: {error}") from error

    def key(self, key: str, kind: type, default: Any = None) -> Any:
        """A value as `kind`; numbers must be positive, except token ids, where 0 is a token.

        A key that is missing is an error where there is no default.
        """
        value, key = self.value(key), self.full_key(key)
        if key not in self._fields:
            if default is None:
                raise self.error(f"key {key} is missing")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool):
            shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."
            raise self.error(f"key {key} must be one {kind.__name__}, got {shown}")
        if kind is not str and not value > 0 and not key.endswith("_token_id"):
            raise self.error(f"key {key} must be positive, got {value}")
        if kind is float and value > _MAX_FLOAT:
            raise self.error(f"key {key} must be finite in float32, got {value}")
        return value

    def has_key(self, key: str) -> bool:
        return self.full_key(key) in self._fields

    def token_id(self, token: str, vocab_size: int) -> int | None:
        key = f"tokenizer.ggml.{token}_token_id"
        if not self.has_key(key):
            return None
        value = self.key(key, int)
        if not 0 <= value < vocab_size:
            raise self.error(f"key {key} must be below the vocabulary size {vocab_size}, got {value}")
        return value

    # Tensors ---------------------------------------------------------------------------------------------------------

    def holds(self, stored: str) -> bool:
        return stored in self._tensors

    def kind(self, stored: str) -> str:
        """As GGUF calls it, e.g. "Q4_1"."""
        return self._tensors[stored].tensor_type.name

    def shape(self, stored: str) -> list[int]:
        """As torch has it: GGUF counts from the last dimension."""
        return [int(extent) for extent in reversed(self._tensors[stored].shape)]

    def size_bytes(self, stored: str) -> int:
        return int(self._tensors[stored].n_bytes)

    def names(self) -> list[str]:
        return list(self._tensors)

    def rows(self, stored: str) -> torch.Tensor:
        """Blocks of a quantised tensor, values of a dense one."""
        rows = torch.from_numpy(self._tensors[stored].data.copy())
        return rows.view(torch.bfloat16) if self.kind(stored) == "BF16" else rows

    def check_tensor(self, stored: str, shape: list[int]) -> None:
        """It is there, with this shape and a supported type."""
        if not self.holds(stored):
            raise self.error(f"tensor {stored} is missing")
        self._checked.add(stored)
        found = self.shape(stored)
        if found != shape:
            raise self.error(f"tensor {stored} must have shape {shape}, got {found}")
        supported = (*BLOCK_TYPES, *DENSE_TYPES) if len(shape) == 2 else DENSE_TYPES
        if self.kind(stored) not in supported:
            raise self.error(unsupported(stored, self.kind(stored), supported))

    def divisors(self, stored: str, length: int) -> list[float] | None:
        """Of frequencies; None where there is no such tensor."""
        if not self.holds(stored):
            return None
        self.check_tensor(stored, [length])
        found = self.rows(stored).tolist()
        if not all(0 < divisor <= _MAX_FLOAT for divisor in found):
            raise self.error(f"tensor {stored} must hold positive finite numbers, got {found}")
        return found

    # The end ---------------------------------------------------------------------------------------------------------

    def refuse_the_rest(self) -> None:
        """Raises where a tensor was not checked, or a key of the architecture was not asked for."""
        own = f"{self.architecture}."
        keys = {key for key in self._fields if key.startswith(own) and key.removeprefix(own) not in _TELL_NOTHING}
        for what, unknown in (("tensors", set(self._tensors) - self._checked), ("keys", keys - self._asked)):
            if unknown:
                names = sorted(unknown)
                raise self.error(f"unknown {what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}")
