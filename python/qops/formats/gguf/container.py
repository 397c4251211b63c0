"""The container: `gguf` parses it, and every read is kept inside the file.

That package trusts its input. Here a truncated or hostile file is a ValueError, never a hang or a short tensor.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qops.formats.gguf.blocks import BLOCK_TYPES

if TYPE_CHECKING:
    from gguf import GGUFReader

DENSE_TYPES = ("F32", "F16", "BF16")
# Types of ik_llama.cpp, which the package does not know, by their numbers in the file.
_OTHER_TYPES = {133: "Q6_0", 137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K", 141: "IQ6_K"}
_OTHER_TYPES |= {144: "IQ4_KS", 145: "IQ2_KS", 146: "IQ4_KSS", 152: "IQ5_KS", 156: "IQ3_KS", 157: "IQ2_KL"}

# Arrays that are longer hold a vocabulary, which nothing here reads.
_LONGEST_ARRAY = 64


class UnsupportedType(ValueError):
    """Of a tensor in a file that is well formed."""


def unsupported(tensor: str, kind: str, supported: Iterable[str] = (*BLOCK_TYPES, *DENSE_TYPES)) -> str:
    return f"tensor {tensor} has type {kind}, supported are {', '.join(supported)}"


def read_container(path: Path) -> GGUFReader:
    """Parses the container with `gguf`, whose every read is kept inside the file, without long arrays."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError("reading GGUF files needs the gguf package: pip install 'qops[demo]'") from error
    import numpy

    kinds = gguf.GGUFValueType

    class BoundedReader(gguf.GGUFReader):
        def _get(self, offset: Any, dtype: Any, count: Any = 1, *rest: Any, **named: Any) -> Any:
            # numpy cuts a slice at the file's end without a word, so gguf would spin through a huge array of
            # nothing; refusing the read ends the loop at the file's last byte.
            self._check_end(int(offset) + int(count) * numpy.dtype(dtype).itemsize)
            return super()._get(offset, dtype, count, *rest, **named)

        def _check_end(self, end: int) -> None:
            if end > len(self.data):
                raise ValueError(f"truncated: {end} bytes expected, the file has {len(self.data)}")

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            # gguf keeps an object for each token and merge: 2.2 s for a vocabulary of 49152, 0.1 s without.
            if raw_type != kinds.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            item = kinds(int(self._get(orig_offs, numpy.uint32)[0]))
            length = int(self._get(orig_offs + 4, numpy.uint64)[0])
            if length <= _LONGEST_ARRAY or item == kinds.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            end = orig_offs + 12
            if item == kinds.STRING:
                read_size = struct.Struct("<Q" if self.byte_order == "I" else ">Q").unpack_from
                for _ in range(length):
                    end += 8 + read_size(self.data, end)[0]  # pyright: ignore[reportArgumentType]
            else:
                end += length * numpy.dtype(self.gguf_scalar_to_np[item]).itemsize
            self._check_end(end)
            return end - orig_offs, [], [], [kinds.ARRAY, item]

        def _build_fields(self, offs: int, count: int) -> int:
            self.end_of_fields = super()._build_fields(offs, count)
            return self.end_of_fields

        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            if self.byte_order != "I":
                raise ValueError("byte order differs from this machine's")
            found: dict[str, Any] = {}
            for field in fields:
                # gguf adds in uint64, which would wrap into the file again.
                if int(field.parts[-1][0]) > len(self.data):
                    raise ValueError(f"tensor {field.name}: offset {int(field.parts[-1][0])} is past the file's end")
                if int(field.parts[-2][0]) in _OTHER_TYPES:
                    raise UnsupportedType(unsupported(field.name, _OTHER_TYPES[int(field.parts[-2][0])]))
                try:
                    super()._build_tensors(start_offs, [field])
                except ValueError as error:
                    raise ValueError(f"tensor {field.name}: {error}") from error
                if field.name in found:
                    raise ValueError(f"tensor {field.name} is stored twice")
                found[field.name] = self.tensors[0]
            self.tensors = list(found.values())

    try:
        return BoundedReader(path)
    except OSError:
        raise
    except UnsupportedType as error:
        raise ValueError(f"{path}: {error}") from None
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError, struct.error) as error:
        raise ValueError(f"{path}: not a readable GGUF file: {error}") from error
