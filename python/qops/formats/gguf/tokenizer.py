"""The tokenizer in a GGUF file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

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
    fields = read_container(path).fields
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
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
