"""The one door: a path, whatever it holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from qops.formats._transformers import require_transformers
from qops.formats.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The reader of what lies at a path, by what it is.

    Args:
        path: a GGUF file, or a folder written by :func:`qops.save_model`.

    Returns:
        A :class:`qops.formats.Checkpoint`; file or folder have been checked, and no weight is read yet.

    Raises:
        ImportError: Transformers >= 5.17 (or, for GGUF, the gguf package) is missing.
        FileNotFoundError: nothing is at `path`.
        ValueError: the checkpoint is malformed or of a kind that is not supported.
    """
    require_transformers("qops.formats.open_checkpoint")
    path = Path(path)
    if path.is_file():
        from qops.formats.gguf import GGUFFile

        return GGUFFile(path)
    if path.is_dir():
        from qops.formats.folder import Folder

        return Folder(path)
    raise FileNotFoundError(f"{path}: no such GGUF file or model folder")


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
    require_transformers("qops.formats.load_tokenizer")
    if Path(path).is_file():
        from qops.formats import gguf

        return gguf.load_tokenizer(path)
    if not Path(path).is_dir():  # from_pretrained would take it for the name of a repository, and ask for that
        raise FileNotFoundError(f"{path}: no such GGUF file or folder")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)
