"""The one door: a path, whatever it holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from qops.formats._transformers import require_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model that :func:`qops.load_model` reads.

    Args:
        path: a GGUF file, or a folder that the tokenizer was saved to.

    Returns:
        A Transformers tokenizer.

    Raises:
        ImportError: Transformers >= 5.17 (or, for GGUF, the gguf package) is missing.
        FileNotFoundError: nothing is at `path`.
        OSError: a folder without a tokenizer.
        ValueError: a GGUF file that is malformed or holds no tokenizer.
    """
    require_transformers("qops.models.load_tokenizer")
    if Path(path).is_file():
        from qops.formats import gguf

        return gguf.load_tokenizer(path)
    if not Path(path).is_dir():  # from_pretrained would take it for the name of a repository, and ask for that
        raise FileNotFoundError(f"{path}: no such GGUF file or folder")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)
