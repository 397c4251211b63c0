"""torchao's tensor subclasses, by the names of their attributes; the package itself is not needed.

    Int8Tensor                 `qdata` int8 [N, K], `scale` float32 [N, K/G];  w = qdata * scale
    IntxUnpackedToInt8Tensor   `qdata` int8 [N, K], `scale` and `zero_point` int8 [N, K/G], read where `target_dtype` is
                               int4;  w = (qdata - zero_point) * scale
    Int4Tensor                 `qdata` int8 [N, K/2], even k in the low nibble, signed; `scale` and `zero_point`
                               [K/G, N] in the dtype of the activations;  w = qdata * scale + zero_point

Activations of an Int8Tensor with `act_quant_kwargs` are quantised per row by rule "torchao".
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qops.formats.folders.stored import Options, Stored, require_specs
from qops.formats.folders.tensors import Spec, TensorFiles
from qops.nn import Int4Linear, Int8TorchaoLinear, Int8WeightOnlyLinear, QuantizedLinear
from qops.weights import Int4Weight, Int8Weight
from qops.weights.requirements import SCALE_DTYPES, require_dtype, require_matrix
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
    attributes = {"target_dtype": getattr(tensor, "target_dtype", None)}
    return _from_parts("qops.formats.torchao.weight", type(tensor).__name__, attributes, tensors, pack)


def _from_parts(
    name: str, subclass: str, attributes: Mapping[str, Any], tensors: Mapping[str, Tensor], pack: bool
) -> Int4Weight | Int8Weight:
    return _constructor(name, subclass, attributes, tensors)(**tensors, pack=pack)


def _constructor(name: str, subclass: str, attributes: Mapping[str, Any], tensors: Collection[str]) -> Any:
    """The function for a subclass with such attributes and tensors.

    Raises:
        RuntimeError: there is none.
        ValueError: it has tensors that a weight cannot hold.
    """
    constructors = {"Int8Tensor": int8_weight, "IntxUnpackedToInt8Tensor": intx_weight, "Int4Tensor": int4_weight}
    if subclass not in constructors:
        reason = f", {OTHERS[subclass]}" if subclass in OTHERS else ""
        raise RuntimeError(f"{name}: tensor must be one of {', '.join(constructors)}, got {subclass}{reason}")
    if subclass == "IntxUnpackedToInt8Tensor":
        said = attributes["target_dtype"]
        bits = said["_data"] if isinstance(said, dict) else str(said).removeprefix("torch.")
        if bits != "int4":
            raise RuntimeError(f"{name}: target_dtype must be int4, got {bits}")
    for label in ("act_pre_scale", "act_quant_scale", "act_quant_zero_point"):
        if label in tensors:
            raise ValueError(f"{name}: {subclass} must have no {label}: it changes activations, not the weight")
    return constructors[subclass]


# In folders ----------------------------------------------------------------------------------------------------------

_PREFIX = "_weight_"
_KINDS = {"Int8Tensor": "symmetric", "IntxUnpackedToInt8Tensor": "zero_point", "Int4Tensor": "offset"}
_ROWS = ("PerRow", {"dim": -1})


class Torchao:
    """The tensors of torchao's subclasses in a folder (`qops.formats.folders.stored.Method`).

    What each is stands in the metadata of the safetensors files.

    Args:
        settings: the quantization config; nothing of it is needed.
        options: of the user.
        files: the folder's.
    """

    def __init__(self, settings: Mapping[str, Any], options: Options, files: TensorFiles):
        options.refuse("torchao")
        self._metadata = files.metadata

    def stored(self, module: str, specs: Mapping[str, Spec]) -> Stored | None:
        keys = {key.removeprefix(_PREFIX): key for key in specs if key.startswith(_PREFIX)}
        if not keys:
            return None
        try:
            said = json.loads(self._metadata[f"{module}.weight"])
            subclass, attributes = said["_type"], said["_data"]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"the metadata of the file must tell the class of the weight: {error!r}") from error
        _constructor("qops.formats.torchao", subclass, attributes, keys)
        qdata, scale = specs.get("_weight_qdata"), specs.get("_weight_scale")
        if qdata is None or scale is None or len(qdata.shape) != 2 or len(scale.shape) != 2 or 0 in scale.shape:
            raise ValueError(f"_weight_qdata and _weight_scale must be matrices, got {qdata} and {scale}")
        rows, columns = qdata.shape
        groups, zeros = scale.shape[1], (torch.int8, *SCALE_DTYPES)
        if subclass == "Int4Tensor":
            columns, groups = 2 * columns, scale.shape[0]
        shape = (groups, rows) if subclass == "Int4Tensor" else (1 if scale.shape == (1, 1) else rows, groups)
        wanted: dict[str, Any] = {"_weight_qdata": (qdata.shape, torch.int8), "_weight_scale": (shape, SCALE_DTYPES)}
        if subclass != "Int8Tensor" or "zero_point" in keys:
            wanted["_weight_zero_point"] = (shape, zeros)
        require_specs(specs, wanted)
        if columns % groups:
            raise ValueError(f"_weight_scale must have one scale for each group of K = {columns} columns, got {scale}")
        linear = linear_of(subclass, attributes)
        if linear is Int8TorchaoLinear and groups != 1:
            raise ValueError(f"weights with 8-bit activations must have one scale per row, got _weight_scale {scale}")
        return Stored(
            linear=linear,
            kind=f"torchao {subclass} {linear.scheme}",
            shape=(rows, columns),
            group_size=columns // groups,
            keys=tuple(wanted),
            build=partial(_build, subclass, attributes),
            scale_dtype=scale.dtype,
            kinds=(_KINDS[subclass],),
            act_order=False,
        )


def linear_of(subclass: str, attributes: Mapping[str, Any]) -> type[QuantizedLinear]:
    """What multiplies, by what the attributes, as a file has them, say of the activations."""
    if subclass != "Int8Tensor":
        said = attributes.get("activation_quantization")
        if said is not None:
            raise ValueError(f"activation_quantization must be null, got {said}")
        return Int4Linear
    said = attributes.get("act_quant_kwargs")
    if said is None:
        return Int8WeightOnlyLinear
    how = said["_data"]
    granularity = how["granularity"]
    by_rows = (granularity["_type"], granularity["_data"]) == _ROWS and not how.get("reduce_range")
    if not by_rows or how["mapping_type"]["_data"] != "SYMMETRIC":
        raise ValueError(f"act_quant_kwargs must say symmetric, by rows and with the whole range, got {how}")
    return Int8TorchaoLinear


def _build(subclass: str, attributes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Int4Weight | Int8Weight:
    given = {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}
    return _from_parts("qops.formats.torchao", subclass, attributes, given, pack=False)
