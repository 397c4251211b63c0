"""The quantization methods ``"qops"`` and ``"qops_w4a8"`` of vLLM: checkpoints as qops' own readers read them."""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.config import get_safetensors_params_metadata

from qops.formats.awq import Awq
from qops.formats.compressed_tensors import CompressedTensors
from qops.formats.folder import QUANT_METHOD
from qops.formats.folders.stored import Method, Options, Stored
from qops.formats.folders.tensors import _DTYPES, Spec, tensors_by_module
from qops.formats.gptq import Gptq
from qops.integrations.vllm.shards import Product, take_columns, take_rows
from qops.nn import Int4Int8Linear, Int4Linear, QuantizedLinear
from qops.ops._checks import FLOAT_DTYPES

_METHODS: dict[str, Callable[[Mapping[str, Any], Options], Method]] = {
    "gptq": Gptq,
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
}


class QopsConfig(QuantizationConfig):
    """A checkpoint of GPTQ, AWQ or compressed-tensors whose quantised linears are all qops'.

    Which modules are quantised, and how, is what the headers of the safetensors files say.

    Args:
        settings: the checkpoint's quantization config.

    Raises:
        ValueError: a format, or a setting, that is not read.
    """

    name: ClassVar[str] = QUANT_METHOD

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__()
        self.settings = dict(settings)
        self.specs: dict[str, dict[str, Spec]] = {}
        self._method()

    def _method(self) -> Method:
        said = self.settings.get("quant_method")
        if said == QUANT_METHOD:
            raise ValueError(
                "a folder of qops.save_model must be one of compressed-tensors for vLLM: "
                'qops.save_model(model, folder, format="compressed-tensors") writes it'
            )
        if said not in _METHODS:
            raise ValueError(f"{self.name}: quant_method must be one of {', '.join(_METHODS)}, got {said!r}")
        return _METHODS[said](self.settings, Options())

    # What vLLM asks before it makes the model ------------------------------------------------------------------------

    def get_name(self) -> str:
        return self.name

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return list(FLOAT_DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return ["quantize_config.json", "quant_config.json"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QopsConfig:
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Takes what its user asks for, and what vLLM refuses: GPTQ in act-order and GPTQ with zero points."""
        if user_quant == cls.name:
            return cls.name
        refused = hf_quant_cfg.get("quant_method") == "gptq" and (
            hf_quant_cfg.get("sym") is False
            or (hf_quant_cfg.get("desc_act") is True and hf_quant_cfg.get("group_size") != -1)
        )
        return cls.name if refused and user_quant is None and cls.name == QUANT_METHOD else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        found = get_safetensors_params_metadata(model_name, revision=revision)
        if not found:
            raise ValueError(f"{self.name}: {model_name} must have safetensors files whose headers can be read")
        self.specs = tensors_by_module(
            {
                name: Spec(tuple(info["shape"]), _DTYPES[info["dtype"]])
                for name, info in found.items()
                if info.get("dtype") in _DTYPES
            }
        )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.specs = hf_to_vllm_mapper.apply_dict(self.specs)

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Unlike vLLM's own methods this one reads g_idx."""
        return WeightsMapper()

    # What becomes of a layer -----------------------------------------------------------------------------------------

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        linear = isinstance(layer, LinearBase)
        if not linear:
            inside = [name for name in self.specs if name == prefix or name.startswith(f"{prefix}.")]
            if found := [name for name in inside if self._stored(name) is not None]:
                raise ValueError(f"{self.name}: {found[0]} must be dense, as {type(layer).__name__} is no linear")
            return None
        names = self._members(prefix)
        stored = [self._stored(name) for name in names]
        quantized = [each for each in stored if each is not None]
        if not quantized:
            return UnquantizedLinearMethod()
        if len(quantized) != len(stored):
            dense = [name for name, each in zip(names, stored, strict=True) if each is None]
            raise ValueError(f"{self.name}: {', '.join(dense)} must be quantised, as the others of {prefix} are")
        dtypes = {key: spec.dtype for name in names for key, spec in self.specs[name].items()}
        return QopsLinearMethod(prefix, names, [self._chosen(each) for each in quantized], dtypes)

    def _members(self, prefix: str) -> list[str]:
        """The modules of the checkpoint that one of vLLM is."""
        parent, dot, last = prefix.rpartition(".")
        members = [last] if prefix in self.specs else self.packed_modules_mapping.get(last, [last])
        return [f"{parent}{dot}{member}" for member in members]

    def _stored(self, name: str) -> Stored | None:
        try:
            return self._method().stored(name, self.specs.get(name, {}))
        except ValueError as error:
            raise ValueError(f"{self.name}: {name}: {error}") from error

    def _chosen(self, stored: Stored) -> tuple[type[QuantizedLinear], Stored]:
        """What is to multiply with a weight."""
        return stored.linear, stored


class QopsW4A8Config(QopsConfig):
    """The same, but 4-bit weights are multiplied with activations that are rounded to 8 bits per token (W4A8).

    Args:
        settings: as there.

    Raises:
        ValueError: as there.
    """

    name: ClassVar[str] = "qops_w4a8"

    def _chosen(self, stored: Stored) -> tuple[type[QuantizedLinear], Stored]:
        return Int4Int8Linear if stored.linear is Int4Linear else stored.linear, stored


class _Loading:
    """The modules of the checkpoint that become one linear of vLLM, while their tensors come in.

    Each is cut as soon as it is complete, so that no process holds more than one module that is whole.
    """

    def __init__(
        self,
        prefix: str,
        names: list[str],
        chosen: list[tuple[type[QuantizedLinear], Stored]],
        loader: Callable[..., None],
        sizes: tuple[int, int, int],
    ):
        self.prefix, self.names, self.chosen, self.loader = prefix, names, chosen, loader
        self.rows, self.columns, self.input_size = sizes
        self.keys = sorted({key for _, stored in chosen for key in (*stored.keys, *stored.input_keys)})
        self.tensors: list[dict[str, Tensor]] = [{} for _ in names]
        self.parts: dict[int, tuple[QuantizedLinear, int]] = {}

    def take(self, key: str, parameter: nn.Parameter, tensor: Tensor, *shard: Any, **named: Any) -> None:
        """A tensor of one module; `shard` says, in vLLM's words, which."""
        index = self._index((*shard, *named.values()))
        _, stored = self.chosen[index]
        self.tensors[index][key] = tensor.detach().clone()
        if all(wanted in self.tensors[index] for wanted in (*stored.keys, *stored.input_keys)):
            try:
                self._cut(index, shard, named)
            except (ValueError, TypeError, RuntimeError, AssertionError) as error:
                raise ValueError(f"qops: {self.names[index]}: {error}") from error

    def _index(self, shard: tuple[Any, ...]) -> int:
        said = shard[0] if shard else None
        if len(self.names) == 1:
            return 0
        if said in ("q", "k", "v"):
            return "qkv".index(said)
        if isinstance(said, int) and not isinstance(said, bool) and 0 <= said < len(self.names):
            return said
        raise ValueError(
            f"qops: {self.prefix}: one of {', '.join(self.names)} must be named by its shard, got {said!r}"
        )

    def _cut(self, index: int, shard: tuple[Any, ...], named: dict[str, Any]) -> None:
        linear, stored = self.chosen[index]
        tensors, self.tensors[index] = self.tensors[index], {}
        weight = stored.build(tensors)
        if weight.in_features != self.input_size:
            raise ValueError(f"K must be {self.input_size}, as vLLM's layer says, got {weight.in_features}")
        # vLLM's own loader says which rows and columns are this process's: it cuts a vector of their numbers, from 1.
        places = self._numbers(self.rows, weight.out_features, "output_dim", shard, named)
        there = places.nonzero().flatten()
        first, count = int(there[0]), len(there)
        if not torch.equal(there, torch.arange(first, first + count, device="cpu")):
            raise ValueError("its rows must be neighbours in vLLM's layer")
        weight, padding = take_rows(weight, places[there] - 1), 0
        if self.columns != self.input_size:
            columns = self._numbers(self.columns, self.input_size, "input_dim", shard, named)
            weight, padding = take_columns(weight, int(columns[0]) - 1, int(columns[-1]))
        activations: Any = {key: tensors[key] for key in stored.input_keys}
        self.parts[first] = linear(weight, None, **activations), padding

    def _numbers(self, size: int, whole: int, dim: str, shard: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
        numbers = nn.Parameter(torch.zeros(size, dtype=torch.int64, device="cpu"), requires_grad=False)
        setattr(numbers, dim, 0)
        self.loader(numbers, torch.arange(1, whole + 1, device="cpu"), *shard, **named)
        return numbers.data

    def finish(self, device: torch.device) -> Product:
        """The linear, on its device."""
        row, linears, padding = 0, [], 0
        for first in sorted(self.parts):
            linear, padding = self.parts[first]
            if first != row:
                break
            row += linear.out_features
            linears.append(linear.to(device))
        if row != self.rows:
            wanted = ", ".join(f"{name}.{{{','.join(self.keys)}}}" for name in self.names)
            raise ValueError(f"qops: {self.prefix} must get all rows of {wanted}, got {row} of {self.rows}")
        return Product(linears, padding)


class QopsLinearMethod(LinearMethodBase):
    """One linear of vLLM whose weights are quantised.

    Args:
        prefix: its name.
        names: of the modules of the checkpoint that it is.
        chosen: for each what multiplies with it, and how it is stored.
        dtypes: of their tensors, by the last parts of the names.
    """

    def __init__(
        self,
        prefix: str,
        names: list[str],
        chosen: list[tuple[type[QuantizedLinear], Stored]],
        dtypes: Mapping[str, torch.dtype],
    ):
        self.prefix, self.names, self.chosen, self.dtypes = prefix, names, chosen, dtypes

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        sizes = sum(output_partition_sizes), input_size_per_partition, input_size
        loading = _Loading(self.prefix, self.names, self.chosen, extra_weight_attrs["weight_loader"], sizes)
        for key in loading.keys:
            # Empty: what is loaded is cut by qops, in a form that no parameter of vLLM has. vLLM warns of other dtypes.
            placeholder: Any = nn.Parameter(torch.empty(0, dtype=self.dtypes[key]), requires_grad=False)
            placeholder.weight_loader = partial(loading.take, key)
            layer.register_parameter(key, placeholder)
        layer.qops_loading = loading

    def process_weights_after_loading(self, layer: Any) -> None:
        loading = layer.__dict__.pop("qops_loading", None)
        if loading is None:
            return
        device = next(layer._parameters[key] for key in loading.keys).device
        for key in loading.keys:
            delattr(layer, key)
        layer.qops = loading.finish(device)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.qops(x, bias)
