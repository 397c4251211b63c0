"""What `quantize_` calls for each linear. Importing this module tells torchao of it."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchao.core.config import (  # pyright: ignore[reportMissingImports]
    AOBaseConfig,
    ConfigJSONEncoder,
)
from torchao.quantization.transform_module import (  # pyright: ignore[reportMissingImports]
    register_quantize_module_handler,
)

from qops.formats import torchao as tensors
from qops.models.quantize import unquantizable
from qops.models.replacement import odd_linear, take_hooks
from qops.models.schemes import Scheme
from qops.nn import QuantizedLinear

_CALLER = "qops.integrations.torchao"


@dataclass
class QopsConfig(AOBaseConfig):
    """See :func:`qops.integrations.torchao.config`."""

    scheme: Scheme | None


@register_quantize_module_handler(QopsConfig)
def _transform(module: Any, config: QopsConfig) -> nn.Module:
    _refuse_the_loader_of_transformers()
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) and hasattr(weight, "tensor_data_names"):
        if (why := odd_linear(module)) is None:
            return _become(module, _from_tensor(module, weight))
    elif config.scheme is None:
        return module
    else:
        why = unquantizable(module) if isinstance(module, nn.Linear) else "it is no nn.Linear"
        if why is None:
            return _become(module, config.scheme._quantize(module))
    warnings.warn(f"{_CALLER}: {module} stays as it is: {why}", stacklevel=2)
    return module


def _refuse_the_loader_of_transformers() -> None:
    """It quantises while it loads, and then lays empty tensors over every buffer that is in no file: packed weights."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "transformers.integrations.torchao":
            raise RuntimeError(
                f"{_CALLER}: config(...) must not be the quant_type of a TorchAoConfig: from_pretrained would "
                "overwrite packed weights; quantization_config=qops.integrations.transformers.QopsConfig(...) is for it"
            )
        frame = frame.f_back


def _from_tensor(linear: nn.Linear, weight: Any) -> QuantizedLinear:
    names = (*weight.tensor_attribute_names, *getattr(weight, "optional_tensor_attribute_names", ()))
    # As torchao writes them into a file, from which they are read as well.
    said = json.loads(json.dumps({name: getattr(weight, name) for name in names}, cls=ConfigJSONEncoder))
    quantized = tensors.weight(weight)
    return tensors.linear_of(type(weight).__name__, said)(quantized, linear.bias)


def _become(old: nn.Linear, new: QuantizedLinear) -> nn.Linear:
    """`old` as `new`: whoever calls `quantize_` with the linear itself gets no other module back."""
    take_hooks(new, old).train(old.training)
    old.__class__ = type(new)  # pyright: ignore[reportAttributeAccessIssue]
    vars(old).clear()
    vars(old).update(vars(new))
    return old
