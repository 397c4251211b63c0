"""torchao's tensor subclasses, by the names of their attributes; the package itself is not needed.

    Int8Tensor                 `qdata` int8 [N, K], `scale` float32 [N, K/G];  w = qdata * scale
    IntxUnpackedToInt8Tensor   `qdata` int8 [N, K], `scale` and `zero_point` int8 [N, K/G], read where `target_dtype` is
                               int4;  w = (qdata - zero_point) * scale
    Int4Tensor                 `qdata` int8 [N, K/2], even k in the low nibble, signed; `scale` and `zero_point`
                               [K/G, N] in the dtype of the activations;  w = qdata * scale + zero_point

Activations of an Int8Tensor with `act_quant_kwargs` are quantised per row by rule "torchao".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qops.weights import Int4Weight, Int8Weight
from qops.weights.requirements import require_dtype, require_matrix
from qops.weights.rounding import store_nibbles

__all__ = ["int4_weight", "int8_weight", "intx_weight", "weight"]

OTHERS = {
    "Int4TilePackedTo4dTensor": "tiles of tensor cores, a layout of aten's kernels on a GPU",
    "Int4PlainInt32Tensor": "a layout of aten's kernels on XPU and NPU",
    "Int4PreshuffledTensor": "an order of mslk's kernels on a GPU",
    "Int4OpaqueTensor": "an order of aten's kernels that depends on the CPU",
    "IntxOpaqueTensor": "an order of torchao's kernels that depends on the CPU",
}
"""Subclasses with 4-bit codes that are refused, and in what order their codes are."""


def int8_weight(qdata: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, pack: bool = True) -> Int8Weight:
    """A weight from the tensors of an `Int8Tensor`.

    Args:
        qdata: int8 `[N, K]`.
        scale: float16, bfloat16 or float32 `[N, K/G]`, or `[1, 1]`, one for the whole weight.
        zero_point: of the shape of `scale`, all 0; None for the same.
        pack: as in :meth:`qops.Int8Weight.from_canonical`.

    Returns:
        A weight with torchao's own bits.

    Raises:
        ValueError: a zero point that is not 0; shapes that do not fit; what :meth:`qops.Int8Weight.from_canonical`
            refuses.
        RuntimeError: dtypes.
    """
    name = "qops.formats.torchao.int8_weight"
    require_matrix(name, "qdata", qdata)
    require_matrix(name, "scale", scale)
    if zero_point is not None and bool(zero_point.count_nonzero()):
        raise ValueError(
            f"{name}: zero_point must be 0, a weight quantised symmetrically, got "
            f"{int(zero_point.min())} ... {int(zero_point.max())}"
        )
    if list(scale.shape) == [1, 1] and qdata.shape[0] != 1:
        scale = scale.view([])
    return Int8Weight.from_canonical(qdata, scale, pack=pack)


def intx_weight(qdata: Tensor, scale: Tensor, zero_point: Tensor, *, pack: bool = True) -> Int4Weight:
    """A weight from the tensors of an `IntxUnpackedToInt8Tensor` whose `target_dtype` is int4.

    Args:
        qdata: int8 `[N, K]`, -8 ... 7.
        scale: float16, bfloat16 or float32 `[N, K/G]`.
        zero_point: int8 `[N, K/G]`, -8 ... 7.
        pack: as in :meth:`qops.Int4Weight.from_canonical`.

    Returns:
        A weight of kind `"zero_point"` with torchao's own bits.

    Raises:
        ValueError: codes or zero points out of range; shapes that do not fit; what
            :meth:`qops.Int4Weight.from_canonical` refuses.
        RuntimeError: dtypes.
    """
    name = "qops.formats.torchao.intx_weight"
    for label, tensor in (("qdata", qdata), ("zero_point", zero_point)):
        require_matrix(name, label, tensor)
        require_dtype(name, label, tensor, torch.int8)
        if not ((tensor >= -8) & (tensor <= 7)).all():
            raise ValueError(f"{name}: {label} must be -8 ... 7, got {int(tensor.min())} ... {int(tensor.max())}")
    if qdata.shape[1] % 2:
        raise ValueError(f"{name}: qdata must have an even number of columns, got {list(qdata.shape)}")
    return Int4Weight.from_canonical(
        store_nibbles(qdata + 8),
        scale,
        kind="zero_point",
        zeros=(zero_point + 8).to(torch.uint8),
        in_features=qdata.shape[1],
        pack=pack,
    )


def int4_weight(qdata: Tensor, scale: Tensor, zero_point: Tensor, *, pack: bool = True) -> Int4Weight:
    """A weight from the tensors of an `Int4Tensor`.

    Args:
        qdata: int8 `[N, K/2]`, signed codes.
        scale: float16, bfloat16 or float32 `[K/G, N]`.
        zero_point: as `scale`, the weight of code 0.
        pack: as in :meth:`qops.Int4Weight.from_canonical`.

    Returns:
        A weight of kind `"offset"`, whose offsets are `zero_point - 8 * scale`.

    Numerics:
        Nothing is rounded.

    Raises:
        ValueError: an offset that no float32 holds; shapes that do not fit; what
            :meth:`qops.Int4Weight.from_canonical` refuses.
        RuntimeError: dtypes.

    Source:
        `pack_int4` and `int4_row_quantize_zp` of FBGEMM, from which mslk has them: torchao makes these tensors on GPUs.
    """
    name = "qops.formats.torchao.int4_weight"
    for label, tensor in (("qdata", qdata), ("scale", scale), ("zero_point", zero_point)):
        require_matrix(name, label, tensor)
    require_dtype(name, "qdata", qdata, torch.int8)
    if zero_point.shape != scale.shape or scale.shape[1] != qdata.shape[0]:
        raise ValueError(
            f"{name}: scale and zero_point must have shape [K/G, N] with N = {qdata.shape[0]}, "
            f"got {list(scale.shape)} and {list(zero_point.shape)}"
        )
    offsets = zero_point.double() - 8 * scale.double()
    inexact = (offsets.float() != offsets) & offsets.isfinite()
    if inexact.any():
        group, row = (int(index) for index in inexact.nonzero()[0])
        raise ValueError(
            f"{name}: zero_point - 8 * scale must fit in float32, for the weight to be exact, got "
            f"{float(zero_point[group, row])!r} and {float(scale[group, row])!r} in row {row}, group {group}"
        )
    return Int4Weight.from_canonical(
        qdata.view(torch.uint8) ^ 0x88,  # signed codes plus 8, as ours, are the same nibbles with the sign bits turned
        scale.t().contiguous(),
        kind="offset",
        zeros=offsets.t().float().contiguous(),
        in_features=2 * qdata.shape[1],
        pack=pack,
    )


def weight(tensor: Tensor, *, pack: bool = True) -> Int4Weight | Int8Weight:
    """A weight from a live tensor of one of the three subclasses.

    Args:
        tensor: `linear.weight` after `torchao.quantization.quantize_`.
        pack: as in :meth:`qops.Int8Weight.from_canonical`.

    Returns:
        What the function for its class returns.

    Raises:
        ValueError: `act_pre_scale` or static scales of activations, which a weight cannot hold; and what that function
            refuses.
        RuntimeError: another class.
    """
    names = (*getattr(tensor, "tensor_data_names", ()), *getattr(tensor, "optional_tensor_data_names", ()))
    tensors = {key: getattr(tensor, key) for key in names if getattr(tensor, key) is not None}
    attributes = {"target_dtype": str(getattr(tensor, "target_dtype", ""))}
    return from_parts("qops.formats.torchao.weight", type(tensor).__name__, attributes, tensors, pack)


def from_parts(
    name: str, subclass: str, attributes: Mapping[str, Any], tensors: Mapping[str, Tensor], pack: bool
) -> Int4Weight | Int8Weight:
    """A weight from the name of a subclass, its attributes and its tensors, as torchao's safetensors files hold them.

    Args:
        name: of the caller, for messages.
        subclass: its `_type`.
        attributes: its `_data`; of IntxUnpackedToInt8Tensor `target_dtype` is read.
        tensors: by the names of attributes.
        pack: as in :meth:`qops.Int8Weight.from_canonical`.

    Returns:
        What the function for the subclass returns, which tells the errors, too.
    """
    constructors = {"Int8Tensor": int8_weight, "IntxUnpackedToInt8Tensor": intx_weight, "Int4Tensor": int4_weight}
    if subclass not in constructors:
        reason = f", {OTHERS[subclass]}" if subclass in OTHERS else ""
        raise RuntimeError(f"{name}: tensor must be one of {', '.join(constructors)}, got {subclass}{reason}")
    if subclass == "IntxUnpackedToInt8Tensor" and not str(attributes["target_dtype"]).endswith("int4"):
        raise RuntimeError(f"{name}: target_dtype must be int4, got {attributes['target_dtype']}")
    for label in ("act_pre_scale", "act_quant_scale", "act_quant_zero_point"):
        if label in tensors:
            raise ValueError(
                f"{name}: {subclass} must have no {label}, which belongs to the activations, not the weight"
            )
    return constructors[subclass](**tensors, pack=pack)
