"""What Transformers' own methods do to a model with qops parts in it: the right thing, or one clear error.

Importing this module guards `save_pretrained`, `push_to_hub` and `resize_token_embeddings` of every Transformers model
of the process; models without qops parts do not notice.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from qops.models.replacement import input_table, is_replaced
from qops.weights.state import QuantizedWeight


@dataclass(frozen=True)
class Converted:
    """What a converted model carries. A pickle of it imports this module, and so the guards below, by this name.

    Attributes:
        ties: source of each tied parameter by its name, as Transformers had them before the conversion.
    """

    ties: dict[str, str]


def protect(model: Any) -> Any:
    """Makes Transformers' `tie_weights`, `init_weights` and device maps right for a converted model; returns it."""
    model.__dict__["_qops_converted"] = Converted(dict(model.all_tied_weights_keys))
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    fused = {name for module in model.modules() if (name := type(module).__name__).startswith("Fused")}
    for module in model.modules():
        # Transformers initialises what it has not loaded itself, and takes whatever is called RMSNorm for its own.
        module._is_hf_initialized = True
        if isinstance(module, PreTrainedModel) and is_replaced(module):
            _keep_ties(module)
            _keep_whole(module, fused)
    return model


def _keep_ties(model: Any) -> None:
    """Quantised weights are tied by sharing one object, which `tie_weights` would replace by a parameter."""

    def is_dense(name: str) -> bool:
        module = model.get_submodule(name.rpartition(".")[0])
        return not isinstance(getattr(module, "weight", None), QuantizedWeight)

    ties = model.all_tied_weights_keys.items()
    kept = {target: source for target, source in ties if is_dense(target) and is_dense(source)}
    model.all_tied_weights_keys = model._tied_weights_keys = kept


def _keep_whole(model: Any, fused: set[str]) -> None:
    """A device map splits a fused layer no more than the layer that it replaces."""
    whole = set(model._no_split_modules or ())
    model._no_split_modules = whole | {name for name in fused if name.removeprefix("Fused") in whole}


# On the class, because the quantised parts may sit in a model that contains the one that qops was given.


def _guarded(name: str, guard: Callable[..., Any]) -> None:
    """Has `guard(original, model, ...)` take the calls of a method of Transformers' models."""
    original = getattr(PreTrainedModel, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return guard(functools.partial(original, self), self, *args, **kwargs)

    setattr(PreTrainedModel, name, method)


def _save_pretrained(original: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    # With adapters of PEFT on it only those are written.
    if not is_replaced(model) or getattr(model, "_hf_peft_config_loaded", False):
        return original(*args, **kwargs)
    from qops.models.save import save_model

    # What scripts of older releases say is what is done.
    if kwargs.get("safe_serialization") is True:
        del kwargs["safe_serialization"]
    signature = inspect.signature(original)
    given = signature.bind(*args, **kwargs).arguments
    folder, max_shard_size = given.pop("save_directory"), given.pop("max_shard_size", "50GB")
    given |= given.pop("kwargs", {})
    for name, value in given.items():
        default = signature.parameters[name].default if name in signature.parameters else None
        if value != default:
            raise ValueError(
                f"{type(model).__name__}.save_pretrained: {name} must be {default} where qops quantised, got {value!r}"
            )
    return save_model(model, folder, max_shard_size=max_shard_size)


def _push_to_hub(original: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    if is_replaced(model) and not getattr(model, "_hf_peft_config_loaded", False):
        raise RuntimeError(
            f"{type(model).__name__}.push_to_hub does not write what qops quantised: save it with save_pretrained, and "
            "send the folder with huggingface_hub.upload_folder"
        )
    return original(*args, **kwargs)


def _resize_token_embeddings(
    original: Any,
    model: Any,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    table, output = input_table(model), model.get_output_embeddings()
    weights = [getattr(module, "weight", None) for module in (table, output)]
    quantised = [type(weight).__name__ for weight in weights if isinstance(weight, QuantizedWeight)]
    if quantised and table is not None:
        rows = table.num_embeddings
        wanted = rows if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted == rows:
            return table
        raise RuntimeError(
            f"{type(model).__name__}.resize_token_embeddings: an {quantised[-1]} keeps its {rows} rows, "
            f"got {wanted}; resize before qops.quantize_model, or leave the output layer dense"
        )
    return original(new_num_tokens, pad_to_multiple_of, *args, **kwargs)


_guarded("save_pretrained", _save_pretrained)
_guarded("push_to_hub", _push_to_hub)
_guarded("resize_token_embeddings", _resize_token_embeddings)
