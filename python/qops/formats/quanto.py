"""optimum-quanto: rows of the weight, or of groups of it, with a scale and (4 bits) a shift each.

    qint4   `_data._data` uint8 [ceil(R/2), G] of R = N K / G groups, the first half in the low nibbles, the second in
            the high ones; `_scale` and `_shift` [R, 1];  w = q * scale - shift
    qint8   `_data` int8 [N, K], `_scale` [N, 1];  w = q * scale

Both along axis 0 of the weight, as quanto does for linears. Of a frozen linear these are `weight._data._data`,
`weight._scale` and `weight._shift`; a `TinyGemmWeightQBitsTensor` (bfloat16) gives them after `weight_qbits_tensor()`.
quanto 0.2.7 rounds `q * scale` to the dtype of the scale before it subtracts the shift; the 4-bit weights here are the
exact numbers, rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qops.formats.folders.config import linear_shapes
from qops.formats.folders.stored import Options, Stored, require_specs
from qops.formats.folders.tensors import Spec, TensorFiles
from qops.nn import Int4Linear, Int8WeightOnlyLinear
from qops.weights import Int4Weight, Int8Weight
from qops.weights.requirements import SCALE_DTYPES, require_dtype, require_matrix, require_shape, require_tensor
from qops.weights.rounding import store_nibbles

__all__ = ["int4_weight", "int8_weight"]


def int4_weight(data: Tensor, scale: Tensor, shift: Tensor, *, shape: Sequence[int], pack: bool = True) -> Int4Weight:
    """A weight from the tensors of a `WeightQBitsTensor` of type qint4.

    Args:
        data: uint8 `[ceil(R/2), G]`, `weight._data._data` of a state.
        scale: float16, bfloat16 or float32 `[R, 1]`, R = N K / G.
        shift: as `scale`; or of an integer dtype, zero points 0 ... 15, which older releases subtract from the codes.
        shape: `[N, K]`.
        pack: as in :meth:`qops.Int4Weight.from_canonical`.

    Returns:
        A weight of kind `"offset"`, or of kind `"zero_point"` where `shift` has integers.

    Numerics:
        Nothing is rounded. `dequantize()` of quanto rounds `q * scale` to the dtype of `scale` and then the difference;
        where that product is exact it gives the same bits.

    Raises:
        ValueError: axis -1, whose scales lie in a row; shapes that do not fit; an integer shift outside 0 ... 15; what
            :meth:`qops.Int4Weight.from_canonical` refuses.
        RuntimeError: dtypes.
    """
    name = "qops.formats.quanto.int4_weight"
    for label, tensor in (("data", data), ("scale", scale), ("shift", shift)):
        require_matrix(name, label, tensor)
    require_dtype(name, "data", data, torch.uint8)
    n, k = require_shape(name, shape)
    rows, columns = scale.shape[0], data.shape[1]
    if not rows or scale.shape[1] != 1:
        raise ValueError(f"{name}: scale must have shape [N K / G, 1], as along axis 0, got {list(scale.shape)}")
    if shift.shape != scale.shape:
        raise ValueError(f"{name}: shift must have the shape of scale, {list(scale.shape)}, got {list(shift.shape)}")
    if rows * columns != n * k or k % columns or data.shape[0] != (rows + 1) // 2:
        raise ValueError(
            f"{name}: data must have two codes in a byte, {[(rows + 1) // 2, n * k // rows]} for {rows} groups "
            f"of shape [N, K] = {[n, k]}, got {list(data.shape)}"
        )
    codes = torch.cat([data & 15, data >> 4])[:rows].view(n, k)
    groups = rows // n
    kind = _kind(shift.dtype)
    if kind == "zero_point":
        if not ((shift >= 0) & (shift <= 15)).all():
            raise ValueError(f"{name}: shift must be 0 ... 15, got {int(shift.min())} ... {int(shift.max())}")
        zeros = shift.to(torch.uint8)
    else:
        zeros = -shift
    return Int4Weight.from_canonical(
        store_nibbles(codes),
        scale.view(n, groups),
        kind=kind,
        zeros=zeros.view(n, groups),
        in_features=k,
        pack=pack,
    )


def _kind(shift: torch.dtype) -> str:
    return "offset" if shift.is_floating_point else "zero_point"


def int8_weight(data: Tensor, scale: Tensor, *, pack: bool = True) -> Int8Weight:
    """A weight from the tensors of a `WeightQBytesTensor` of type qint8.

    Args:
        data: int8 `[N, K]`, `weight._data` of a state.
        scale: float16, bfloat16 or float32 `[N, 1]`, or one scale for the whole weight, `[]`.
        pack: as in :meth:`qops.Int8Weight.from_canonical`.

    Returns:
        A weight with quanto's own bits.

    Raises:
        ValueError: axis -1, whose scales lie in a row; what :meth:`qops.Int8Weight.from_canonical` refuses.
        RuntimeError: dtypes.
    """
    name = "qops.formats.quanto.int8_weight"
    require_matrix(name, "data", data)
    require_tensor(name, "scale", scale)
    if scale.dim() and list(scale.shape) != [data.shape[0], 1]:
        raise ValueError(
            f"{name}: scale must have shape [N, 1] = {[data.shape[0], 1]}, as along axis 0, or [], "
            f"got {list(scale.shape)}"
        )
    return Int8Weight.from_canonical(data, scale, pack=pack)


# In folders ----------------------------------------------------------------------------------------------------------

_INT4 = ("weight._data._data", "weight._scale", "weight._shift")
_INT8 = ("weight._data", "weight._scale")
# Of activations that are not quantised; they are ones.
_UNUSED = ("input_scale", "output_scale")


class Quanto:
    """quanto's tensors in a folder (`qops.formats.folders.stored.Method`).

    Args:
        settings: `quanto_qmap.json`: the types of weights and activations, by module.
        options: of the user.
        files: the folder's.

    Raises:
        ValueError: the folder's config is no model's.
    """

    def __init__(self, settings: Mapping[str, Any], options: Options, files: TensorFiles):
        options.refuse("quanto")
        self._types = {module: said for module, said in settings.items() if isinstance(said, dict)}
        self._shapes = linear_shapes(files.folder, len(files.specs))

    def stored(self, module: str, specs: Mapping[str, Spec]) -> Stored | None:
        if not any(key.startswith("weight._") for key in specs):
            return None
        said = self._types.get(module, {})
        if said.get("activations", "none") not in ("none", None):
            raise ValueError(f"activations must be none in quanto_qmap.json, got {said['activations']!r}")
        if said.get("weights") not in ("qint4", "qint8"):
            raise ValueError(f"weights must be qint4 or qint8 in quanto_qmap.json, got {said.get('weights')!r}")
        if module not in self._shapes:
            raise ValueError("it is no linear of the model that config.json describes")
        rows, columns = self._shapes[module]
        wanted: dict[str, Any]
        if said["weights"] == "qint8":
            scale = specs.get("weight._scale")
            one = scale is not None and scale.shape == ()
            wanted = dict(
                zip(_INT8, (((rows, columns), torch.int8), (() if one else (rows, 1), SCALE_DTYPES)), strict=True)
            )
            group_size = columns
        else:
            data = specs.get("weight._data._data")
            if data is None or len(data.shape) != 2 or 0 in data.shape or columns % data.shape[1]:
                raise ValueError(f"weight._data._data must have rows of a size that divides K = {columns}, got {data}")
            group_size = data.shape[1]
            groups = rows * columns // group_size
            scales = ((groups, 1), SCALE_DTYPES)
            shifts = ((groups, 1), (*SCALE_DTYPES, torch.int8))
            wanted = dict(zip(_INT4, ((((groups + 1) // 2, group_size), torch.uint8), scales, shifts), strict=True))
        wanted |= {key: ((), SCALE_DTYPES) for key in _UNUSED if key in specs}
        require_specs(specs, wanted)
        int4 = said["weights"] == "qint4"
        kind = _kind(specs["weight._shift"].dtype) if int4 else "symmetric"
        return Stored(
            linear=Int4Linear if int4 else Int8WeightOnlyLinear,
            kind=f"quanto {said['weights']}",
            shape=(rows, columns),
            group_size=group_size,
            keys=tuple(wanted),
            build=partial(_build_int4, (rows, columns)) if int4 else _build_int8,
            scale_dtype=specs["weight._scale"].dtype,
            kinds=(kind,),
            act_order=False,
            zero_dtype=specs["weight._shift"].dtype if kind == "offset" else torch.float32,
        )


def _build_int4(shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Int4Weight:
    return int4_weight(*(tensors[key] for key in _INT4), shape=shape, pack=False)


def _build_int8(tensors: Mapping[str, Tensor]) -> Int8Weight:
    return int8_weight(*(tensors[key] for key in _INT8), pack=False)
