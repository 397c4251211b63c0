"""torchao's `quantize_`, with qops' linears as its result.

:func:`config` gives what `quantize_` takes; it alone needs the package, importing this module does not::

    from torchao.quantization import quantize_
    from qops.integrations import torchao

    quantize_(model, torchao.config("int4"))
"""

from __future__ import annotations

from typing import Any

from qops.models.schemes import Scheme, scheme_of

__all__ = ["config"]


def config(scheme: str | Scheme | None = "int4") -> Any:
    """What `torchao.quantization.quantize_` makes of each linear that its filter lets pass, in place.

    A dense linear is quantised by round-to-nearest, as by :func:`qops.quantize_model`. A linear that torchao has
    quantised keeps its codes and scales, whatever the scheme, and is computed by qops as its tensor says:

    * `Int8Tensor`: :class:`qops.nn.Int8WeightOnlyLinear`, or with `act_quant_kwargs` by rows
      :class:`qops.nn.Int8TorchaoLinear`;
    * `IntxUnpackedToInt8Tensor` of int4, and `Int4Tensor`: :class:`qops.nn.Int4Linear`.

    The linear itself changes, so what else holds it holds the new one. Hooks stay. Layers are not fused: that is what
    :func:`qops.quantize_model` does, for the models of Transformers that it knows.

    Args:
        scheme: a scheme, such as `qops.Int4(group_size=64)`, or its name; None leaves dense linears dense, and takes
            those of torchao's tensors alone. Several schemes in one model are torchao's own `FqnToConfig`.

    Returns:
        A config of torchao's (`torchao.core.config.AOBaseConfig`).

    Numerics:
        No weight that torchao has quantised is rounded: dequantised it has torchao's own bits. Products are those of
        the operators.

    Raises:
        ImportError: torchao is missing.
        ValueError: an unknown scheme. While `quantize_` runs, with the linear as it was: a group size that does not fit
            or weights that are not finite; `act_pre_scale`, static scales or other rules for activations.
        RuntimeError: while `quantize_` runs, likewise: a tensor of torchao's that qops cannot read.

    What cannot become a linear of qops stays as it is, and a warning says why: subclasses of nn.Linear, N or K that are
    no multiple of 8.

    Source:
        `torchao.quantization.transform_module.register_quantize_module_handler`.
    """
    from qops.integrations.torchao.handler import QopsConfig

    return QopsConfig(None if scheme is None else scheme_of("qops.integrations.torchao.config", scheme))
