"""The tokenizer in a GGUF file."""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qops.formats._transformers import require_transformers
from qops.formats.gguf.container import read_container

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer stored in a GGUF file, chat template included, through Transformers' own reader.

    Args:
        path: of the file.

    Returns:
        A Transformers tokenizer whose special tokens are those of the file.

    Raises:
        ImportError: the `gguf` package or a supported Transformers is missing.
        ValueError: the container is malformed, holds no tokenizer, or one whose special tokens are no tokens.
    """
    require_transformers("qops.formats.gguf")
    from transformers import AutoTokenizer

    path = Path(path)
    reader = read_container(path)
    fields = reader.fields
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / path.name).write_bytes(_tokenizer_alone(reader))
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
        tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = str(path.parent)
    except Exception as error:  # whatever its conversion code stumbles over: the file is at fault, and named
        raise ValueError(f"{path}: Transformers finds no tokenizer in it: {error!r}") from error
    # Transformers 5.17 takes the begin-of-sequence token for the end-of-sequence token, so the file has the last word.
    for stored, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        field = fields.get(f"tokenizer.ggml.{stored}_token_id")
        if field is None:
            continue
        try:
            value = field.contents()
            if value == getattr(tokenizer, f"{name}_token_id"):
                continue
            token = tokenizer.convert_ids_to_tokens(value)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{path}: key {field.name} must be the id of a token: {error}") from error
        if not isinstance(token, str):
            raise ValueError(f"{path}: key {field.name} must be the id of a token, got {value}")
        setattr(tokenizer, f"{name}_token", token)
    return tokenizer


# Architectures whose tokenizers Transformers does not know -> one whose models have the same kind.
_SAME_KIND = {"gemma": "gemma2", "smollm3": "llama"}


def _tokenizer_alone(reader: Any) -> bytes:
    """A file of the architecture and the tokenizer's keys.

    Of a whole file Transformers makes a config first, with a list of its layers: 2^32 where a hostile key says so.
    """
    architecture = str(reader.fields["general.architecture"].contents())
    name = _SAME_KIND.get(architecture, architecture).encode()
    key, string = b"general.architecture", 8
    entries = [struct.pack(f"<Q{len(key)}sIQ{len(name)}s", len(key), key, string, len(name), name)]
    fields = [field for field in reader.fields.values() if not field.name.startswith("GGUF.")]
    ends = [*(field.offset for field in fields[1:]), reader.end_of_fields]
    for field, end in zip(fields, ends, strict=True):
        if field.name.startswith("tokenizer."):
            entries.append(reader.data[field.offset : end].tobytes())
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries)
