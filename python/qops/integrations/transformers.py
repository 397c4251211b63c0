"""Transformers' own `from_pretrained`, with qops' weights and kernels behind it.

Importing this module registers the quantization method ``"qops"``. A dense checkpoint is quantised on load, and one
that is quantised already, by whomever, is read to the bit::

    from qops.integrations.transformers import QopsConfig, config_for

    AutoModelForCausalLM.from_pretrained(dense, quantization_config=QopsConfig("int4"))
    AutoModelForCausalLM.from_pretrained(folder, config=config_for(folder))

With ``tp_plan="auto"``, and `torchrun`, each process keeps its part of either
(:func:`qops.integrations.tensor_parallel.parallelize`).

The second gives the model of :func:`qops.load_model`: class, config, dtype, device and generation config come from
Transformers, the files are read by qops. Transformers' loader would rename, cast and initialise tensors by rules that
change from release to release.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qops.formats._transformers import require_transformers
from qops.formats.folder import QUANT_METHOD, Folder
from qops.formats.folders.config import read_config
from qops.formats.folders.pretrained import PretrainedFolder, read_settings
from qops.formats.folders.stored import Options
from qops.formats.open import local_path, open_folder
from qops.models.load import build_model, expand_for, require_fit, skeleton
from qops.models.quantize import quantize_model
from qops.models.schemes import Asked, choose
from qops.models.smoothing import Scales

__all__ = ["QopsConfig", "config_for"]

require_transformers("qops.integrations.transformers")


def config_for(
    path: str | os.PathLike[str],
    *,
    prove: bool = True,
    zero_add: str | None = None,
    symmetric: bool | None = None,
) -> Any:
    """The config with which `from_pretrained` reads a quantised folder by qops.

    Its `quantization_config` is ``{"quant_method": "qops", "source": what the folder says}``: the name that the folder
    itself gives belongs to another reader. It may be changed like any config; saved into the folder it makes
    `from_pretrained(folder)` enough.

    Args:
        path: a folder as of :func:`qops.load_model`, or the name of a repository that holds one.
        prove: as there.
        zero_add: as there.
        symmetric: as there.

    Returns:
        A config of Transformers.

    Raises:
        FileNotFoundError: nothing is at `path`.
        ValueError: it is a file, is dense, or its config is malformed.
    """
    folder = local_path(path)
    if folder.is_file():
        raise ValueError(f"{folder}: must be a folder, got a file; qops.load_model reads GGUF files")
    settings, config = read_settings(folder), read_config(folder)
    if settings["quant_method"] != QUANT_METHOD:
        settings = {"quant_method": QUANT_METHOD, "source": settings}
    said = {"prove": None if prove else False, "zero_add": zero_add, "symmetric": symmetric}
    config.quantization_config = settings | {key: value for key, value in said.items() if value is not None}
    config.__dict__.pop("compression_config", None)
    if config.dtype is None:
        # Transformers would take that of the first tensor, which may be scales.
        config.dtype = open_folder(folder, config.quantization_config, Options()).dtype
    return config


class QopsConfig(QuantizationConfigMixin):
    """How `from_pretrained` quantises a dense checkpoint: `quantization_config=QopsConfig("int4")`.

    The model is what :func:`qops.quantize_model` makes of the one that `from_pretrained` gives without it.

    Args:
        scheme: as there.
        skip: as there.
        skip_default: as there.
        fuse: as there.
        prove: as there.
        smoothing: as there.

    Raises:
        ValueError: an unknown scheme.
    """

    def __init__(
        self,
        scheme: Asked = "int4",
        skip: tuple[str, ...] = (),
        *,
        skip_default: bool = True,
        fuse: bool = True,
        prove: bool = True,
        smoothing: Scales | None = None,
    ):
        if not isinstance(scheme, Mapping):
            choose("qops.integrations.transformers.QopsConfig", scheme, ())
        self.quant_method: Any = QUANT_METHOD
        self.asked: dict[str, Any] = {
            "scheme": scheme,
            "skip": skip,
            "skip_default": skip_default,
            "fuse": fuse,
            "prove": prove,
            "smoothing": smoothing,
        }
        self.stored: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """What the config of a folder says; Transformers calls it.

        Args:
            config_dict: its quantization config.
            return_unused_kwargs: whether `kwargs` are returned too.
            kwargs: of other classes.

        Returns:
            A config.
        """
        config = cls()
        config.stored = dict(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """For JSON.

        Returns:
            The settings of the folder; what was asked for, in words, where it is dense.
        """
        if self.stored is not None:
            return dict(self.stored)
        asked = {key: value for key, value in self.asked.items() if key not in ("scheme", "smoothing")}
        scheme = self.asked["scheme"]
        if isinstance(scheme, Mapping):
            said: Any = {pattern: None if one is None else str(one) for pattern, one in scheme.items()}
        else:
            said = str(scheme)
        return {"quant_method": QUANT_METHOD, "scheme": said, **asked, "smoothing": self.asked["smoothing"] is not None}

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


class QopsQuantizer(HfQuantizer):
    """What Transformers asks while it loads; nothing for users."""

    quantization_config: QopsConfig
    trains_adapters = False
    """Whether its model was prepared for them."""

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        _device(device_map)
        if not self.pre_quantized and self.quantization_config.stored is not None:
            raise ValueError("quantization_config must be a QopsConfig, got the settings of a quantised folder")

    def update_weight_conversions(self, weight_conversions: Any, *args: Any) -> Any:
        """Refuses a user's `key_mapping`, which the readers would not follow."""
        if self.pre_quantized and len(weight_conversions) != len(get_model_conversion_mapping(self.model)):
            raise ValueError("key_mapping must be None: qops reads the tensors of a quantised folder by their names")
        return weight_conversions

    def _process_model_before_weight_loading(
        self,
        model: Any,
        device_map: Any = None,
        checkpoint_files: list[str] | None = None,
        use_kernels: bool = False,
        **kwargs: Any,
    ) -> Any:
        if getattr(model.config, "fusion_config", None) is not None:
            raise ValueError(
                f"fusion_config must be None with quantization method qops, got {model.config.fusion_config}"
            )
        if use_kernels:
            raise ValueError("use_kernels must be False with QopsConfig: its layers have kernels of qops")
        self.device = _device(device_map)
        if self.pre_quantized:
            self.model, self.checkpoint = model, self._checkpoint(model, checkpoint_files)
            # The loader meets a model without parameters, so that it reads, casts and initialises nothing; that it
            # then knows no place for any tensor is as it should be.
            model._modules.clear()
            model._parameters.clear()
            model._buffers.clear()
            model.all_tied_weights_keys = {}
            model._keys_to_ignore_on_load_unexpected = {""}
        self.marker = _keep_whole_while_loading(model)
        if self.marker is not None:
            model.add_module(_MARKER, self.marker)
        return model

    def _checkpoint(self, model: Any, files: list[str] | None) -> Folder | PretrainedFolder:
        if not files:
            raise ValueError("from_pretrained must be given a folder with quantization method qops, got a state_dict")
        folder = Path(files[0]).parent
        checkpoint = open_folder(folder, self.quantization_config.to_dict(), Options())
        named = {Path(file).name for file in files}
        if named != checkpoint.files:
            raise ValueError(f"{folder}: qops reads {sorted(checkpoint.files)}, got {sorted(named)}")
        wanted = (checkpoint.config.architectures or [None])[0]
        if type(model).__name__ != wanted:
            raise ValueError(f"{folder}: the class of the model must be {wanted}, got {type(model).__name__}")
        try:
            expand_for(checkpoint, model, False)
            require_fit(checkpoint, model)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        return checkpoint

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model._modules.pop(_MARKER, None)
        marker = vars(self).pop("marker")
        if not self.pre_quantized:
            asked = self.quantization_config.asked
            return _shared_out(quantize_model(model, **asked), marker, asked["prove"])
        checkpoint = self.checkpoint
        del self.model, self.checkpoint
        fresh = vars(skeleton(type(model), model.config, model.config.dtype))
        # The generation config is Transformers', by its arguments.
        del model._keys_to_ignore_on_load_unexpected
        vars(model).update({name: value for name, value in fresh.items() if name != "generation_config"})
        generation_config = vars(model).get("generation_config")
        prove = self.quantization_config.to_dict().get("prove", True)
        build_model(checkpoint, model.config.dtype, self.device, prove, model)
        if generation_config is not None:
            model.generation_config = generation_config
        return _shared_out(model, marker, prove)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return self.trains_adapters

    @property
    def is_compileable(self) -> bool:
        return True


# Tensor parallel -----------------------------------------------------------------------------------------------------

_STYLE = "qops"
_MARKER = "qops_shards"


class _Marker(nn.Module):
    """The one module of a model that the plan of Transformers names while the model is loaded."""

    def __init__(self, model: Any):
        super().__init__()
        vars(self).update(model=model, plan=model._tp_plan, mesh=None)


class _Whole:
    """A parallel style by which Transformers shards nothing, as qops does so when the weights are there."""

    def install_forward(self, module: Any, mesh: Any) -> Any:
        module.mesh = mesh
        # A plan that names all of the model, so that no weight is reported as forgotten.
        names = {re.sub(r"\d+", "*", name.rpartition(".")[0]) for name in module.model.state_dict()}
        module.model._tp_plan = dict.fromkeys(names, _STYLE)
        return module


def _keep_whole_while_loading(model: Any) -> _Marker | None:
    """Where a model is to be loaded with `tp_plan="auto"` and several processes, puts another plan in its plan's place.

    Returns:
        What learns the mesh, and has to be added to the model.
    """
    config = getattr(model.config, "distributed_config", None)
    if config is None:
        return None
    said = {key: value for key, value in vars(config).items() if value not in (None, False, 1)}
    others = {key: value for key, value in said.items() if key not in ("tp_size", "ep_implementation")}
    if others.pop("tp_plan", "auto") != "auto" or others:
        raise ValueError(
            'distributed_config must have nothing but tp_size and tp_plan="auto" with quantization method qops, '
            f"got {said}"
        )
    if "tp_size" not in said:
        return None
    from transformers.distributed import tensor_parallel

    styles: Any = vars(tensor_parallel)["ALL_PARALLEL_STYLES"]  # which newer releases define elsewhere
    styles.register(_STYLE, _Whole())
    marker = _Marker(model)
    model._tp_plan = {_MARKER: _STYLE}
    return marker


def _shared_out(model: Any, marker: _Marker | None, prove: bool) -> Any:
    if marker is None:
        return model
    if marker.mesh is None:
        raise ValueError("distributed_config must be an argument of from_pretrained, got one in the config alone")
    from qops.integrations.tensor_parallel import parallelize

    model._tp_plan = marker.plan
    return parallelize(model, marker.mesh, prove=prove)


# Devices -------------------------------------------------------------------------------------------------------------


def _device(device_map: Any) -> Any:
    """The one device of a device map."""
    if device_map is None:
        return "cpu"
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if len(devices) != 1 or not devices.isdisjoint({"auto", "balanced", "balanced_low_0", "sequential", "disk"}):
        raise ValueError(
            f"device_map must name one device, such as 'cpu' or 'cuda', got {device_map!r}; "
            "accelerate.dispatch_model spreads a loaded model over several"
        )
    return devices.pop()


# Not as decorators, behind which type checkers see the base classes.
register_quantization_config(QUANT_METHOD)(QopsConfig)
register_quantizer(QUANT_METHOD)(QopsQuantizer)
