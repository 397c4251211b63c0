"""What a folder says about its model besides the weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any


def transformers_class(name: object) -> Any:
    import transformers

    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(f"architectures must name a model class of transformers, got {name!r}")
    return found


def _takes(model_class: Any, config: Any) -> bool:
    """Whether a class of Transformers is for a config: by its own type, or as one that borrows the class."""
    from transformers.models.auto import modeling_auto

    if isinstance(config, model_class.config_class):
        return True
    mappings = [mapping for name, mapping in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")]
    found = [mapping.get(config.model_type, ()) for mapping in mappings]
    return any(model_class.__name__ in ((names,) if isinstance(names, str) else names) for names in found)


def read_config(folder: Path) -> Any:
    """Transformers' config of a folder, whose class of models is one of Transformers' own and takes it.

    Raises:
        ValueError: `config.json` is malformed, or names a class that is not.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model_class = transformers_class((config.architectures or [None])[0])
    except Exception as error:  # it comes from outside, and every class of Transformers takes another offence at it
        raise ValueError(f"{path}: {error}") from error
    if not _takes(model_class, config):
        wanted = model_class.config_class.model_type
        raise ValueError(f"{path}: model_type must be '{wanted}' for {model_class.__name__}, got '{config.model_type}'")
    return config


def read_generation_config(folder: Path) -> Any:
    """Transformers' generation config of a folder; None where there is none.

    Raises:
        ValueError: it is malformed.
    """
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # as above
        raise ValueError(f"{path}: {error}") from error


def model_without_storage(path: Path, config: Any, tensors: int) -> Any:
    """The model that a config describes, on the meta device: whatever the config says, it takes no memory.

    Args:
        path: of the checkpoint.
        config: whose class is one of Transformers'.
        tensors: how many the checkpoint has.

    Raises:
        ValueError: it describes more layers than there are tensors, or no model that can be made.
    """
    import torch

    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > tensors:
        raise ValueError(f"{path}: config has {layers} layers, the files {tensors} tensors")
    model_class = transformers_class((config.architectures or [None])[0])
    try:
        with torch.device("meta"):
            return model_class(copy.deepcopy(config))
    except Exception as error:  # it comes from outside, and every class of Transformers takes another offence at it
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: no {model_class.__name__} can be made of its config: {said}") from error


def linear_shapes(folder: Path, tensors: int) -> dict[str, tuple[int, int]]:
    """(N, K) of each linear of a folder's model, by its name: what formats that store groups as rows do not say.

    Args:
        folder: of the checkpoint.
        tensors: how many it has.

    Raises:
        ValueError: as :func:`read_config` and :func:`model_without_storage`.
    """
    from torch import nn

    from qops.nn.experts import expand_experts

    model = model_without_storage(folder, read_config(folder), tensors)
    expand_experts(model, prove=False)
    linears = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {name: (module.out_features, module.in_features) for name, module in linears}
