"""The one door: a path, whatever it holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qops.formats._transformers import require_transformers
from qops.formats.checkpoint import Checkpoint
from qops.formats.folders.stored import Options
from qops.weights.state import QuantizedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qops.formats.folder import Folder
    from qops.formats.folders.pretrained import PretrainedFolder

# What a folder needs to be read, and a conversation: not the pickles that lie beside it.
_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt")


def open_checkpoint(
    path: str | os.PathLike[str], *, zero_add: str | None = None, symmetric: bool | None = None
) -> Checkpoint:
    """The reader of what lies at a path, by what it is.

    Args:
        path: as of :func:`qops.load_model`.
        zero_add: as there.
        symmetric: as there.

    Returns:
        A :class:`qops.formats.Checkpoint`; file or folder have been checked, and no weight is read yet.

    Raises:
        ImportError: Transformers >= 5.17 (or, for GGUF, the gguf package) is missing.
        FileNotFoundError: nothing is at `path`.
        ValueError: the checkpoint is malformed or of a kind that is not supported.
    """
    require_transformers("qops.formats.open_checkpoint")
    options, path = Options(zero_add, symmetric), local_path(path)
    if path.is_file() and path.suffix in (".safetensors", ".json", ".bin"):
        raise ValueError(f"{path}: a part of a checkpoint; its folder {path.parent} is the whole")
    if path.is_file():
        from qops.formats.gguf.file import GGUFFile

        options.refuse("GGUF")
        return GGUFFile(path)
    from qops.formats.folders.pretrained import read_settings

    return open_folder(path, read_settings(path), options)


def open_folder(folder: Path, settings: Mapping[str, Any], options: Options) -> Folder | PretrainedFolder:
    """The reader of a folder.

    Args:
        folder: with safetensors files.
        settings: its quantization config: of a format, or of qops around another one, which it holds as ``source``, and
            what its user has said of it.
        options: what its user says now.

    Raises:
        FileNotFoundError: there are no safetensors files.
        ValueError: the folder is malformed or of a kind that is not supported.
    """
    from qops.formats.folder import QUANT_METHOD, Folder
    from qops.formats.folders.pretrained import PretrainedFolder, require_settings

    if settings["quant_method"] != QUANT_METHOD:
        return PretrainedFolder(folder, options, settings)
    said = {name: settings.get(name) if value is None else value for name, value in vars(options).items()}
    if "source" not in settings:
        Options(**said).refuse("qops")
        return Folder(folder, settings)
    unknown = sorted(settings.keys() - {"quant_method", "source", "prove", *vars(options)})
    if unknown:
        raise ValueError(f"{folder}: quantization_config must hold a source and options alone, got {unknown[0]}")
    return PretrainedFolder(folder, Options(**said), require_settings(folder, settings["source"]))


def read_checkpoint(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    zero_add: str | None = None,
    symmetric: bool | None = None,
) -> dict[str, QuantizedWeight | torch.Tensor]:
    """All weights of a checkpoint, without a model: for code that has modules of its own.

    One weight after the other is read and packed, so that little more memory is needed than they take in the end.

    Args:
        path: as of :func:`qops.load_model`.
        device: where they go.
        zero_add: as there.
        symmetric: as there.

    Returns:
        :class:`qops.Int4Weight` and :class:`qops.Int8Weight`, packed, by the names of their modules
        ("model.layers.0.mlp.down_proj"), and dense tensors in their stored dtype by their own names
        ("model.norm.weight"), which are those of Transformers' model; beside a weight what its input is quantised or
        multiplied with ("<module>.input_scale", "<module>.pre_quant_scale").

    Raises:
        ImportError: Transformers >= 5.17 (or, for GGUF, the gguf package) is missing.
        FileNotFoundError: nothing is at `path`.
        ValueError: the checkpoint is malformed or of a kind that is not supported.
    """
    checkpoint = open_checkpoint(path, zero_add=zero_add, symmetric=symmetric)
    found: dict[str, QuantizedWeight | torch.Tensor] = {}
    for name in sorted(checkpoint.names):
        module = name.removesuffix(".weight")
        if module != name and checkpoint.linear(module) is not None:
            weight: Any = checkpoint.weight(module)
            found[module] = weight.to(device).pack()
            found |= {f"{module}.{key}": tensor.to(device) for key, tensor in checkpoint.activations(module).items()}
        else:
            found[name] = checkpoint.tensor(name).to(device)
    return found


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model that :func:`qops.load_model` reads.

    Args:
        path: a GGUF file, a folder that the tokenizer was saved to, or the name of a repository.

    Returns:
        A Transformers tokenizer.

    Raises:
        ImportError: Transformers >= 5.17 (or, for GGUF, the gguf package) is missing.
        FileNotFoundError: nothing is at `path`.
        OSError: a folder without a tokenizer.
        ValueError: a GGUF file that is malformed or holds no tokenizer.
    """
    require_transformers("qops.formats.load_tokenizer")
    path = local_path(path)
    if path.is_file():
        from qops.formats import gguf

        return gguf.load_tokenizer(path)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # Transformers raises what each kind of tokenizer is missing
        raise OSError(f"{path}: no tokenizer that can be loaded: {str(error).strip().splitlines()[0]}") from error


def local_path(path: str | os.PathLike[str]) -> Path:
    """The path itself, or the folder of a repository of the Hugging Face hub, which is fetched where it is not cached.

    Raises:
        FileNotFoundError: it is neither.
    """
    found = Path(path)
    if found.exists():
        return found
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    said = f"{path}: no such GGUF file or model folder"
    try:
        validate_repo_id(str(path))
    except HFValidationError:
        raise FileNotFoundError(said) from None
    if not isinstance(path, str) or path.count("/") != 1:
        raise FileNotFoundError(said)
    try:
        return Path(snapshot_download(path, allow_patterns=list(_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(f"{said}, and no repository of that name: {error}") from error
