"""HQQ: groups of consecutive weights, with a float zero each, `w = (q - zero) * scale`.

The weight [N, K] is cut into R = N K / G rows of G (axis 1), so groups lie in the rows of the weight where G divides K.

    W_q     4 bits: uint8 [R/2, G], row r in the high nibble of row r, row R/2 + r in the low one; 8 bits: uint8 [R, G]
    scale   [R, 1], and zero [R, 1], in the dtype of the activations

Of an `HQQLinear` these are `layer.W_q`, `layer.meta["scale"]`, `layer.meta["zero"]`, `layer.meta["shape"]` and
`layer.meta["axis"]`. hqq 0.2.8 computes `q - zero` and the product in that dtype, with a rounding each. The weights
here are the exact numbers: they have the same bits wherever `q - zero` is exact.
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
from qops.weights.requirements import SCALE_DTYPES, require_dtype, require_matrix, require_shape
from qops.weights.rounding import move_zeros_to_offsets, store_nibbles

__all__ = ["int4_weight", "int8_weight"]


def int4_weight(
    W_q: Tensor, scale: Tensor, zero: Tensor, *, shape: Sequence[int], axis: int, pack: bool = True
) -> Int4Weight:
    """A weight from the tensors of a 4-bit `HQQLinear`.

    Args:
        W_q: uint8 `[N K / G / 2, G]`.
        scale: float16, bfloat16 or float32 `[N K / G, 1]`.
        zero: as `scale`.
        shape: `[N, K]`.
        axis: along which the layer was quantised, 1.
        pack: as in :meth:`qops.Int4Weight.from_canonical`.

    Returns:
        A weight of kind `"float_zero"`.

    Numerics:
        Nothing is rounded. `HQQLinear.dequantize` rounds `q - zero` in the dtype of the activations before it
        multiplies; where that difference is exact it gives the same bits.

    Raises:
        ValueError: axis 0; shapes that do not fit; what :meth:`qops.Int4Weight.from_canonical` refuses.
        RuntimeError: dtypes.
    """
    name = "qops.formats.hqq.int4_weight"
    n, k, groups = _groups(name, W_q, scale, zero, shape, axis, codes_per_byte=2)
    codes = torch.cat([W_q >> 4, W_q & 15]).view(n, k)
    scales, zeros = scale.view(n, groups), zero.view(n, groups)
    return Int4Weight.from_canonical(
        store_nibbles(codes), scales, kind="float_zero", zeros=zeros, in_features=k, pack=pack
    )


def int8_weight(
    W_q: Tensor, scale: Tensor, zero: Tensor, *, shape: Sequence[int], axis: int, pack: bool = True
) -> Int8Weight:
    """A weight from the tensors of an 8-bit `HQQLinear`.

    Args:
        W_q: uint8 `[N K / G, G]`.
        scale: float16, bfloat16 or float32 `[N K / G, 1]`.
        zero: as `scale`.
        shape: `[N, K]`.
        axis: along which the layer was quantised, 1.
        pack: as in :meth:`qops.Int8Weight.from_canonical`.

    Returns:
        A weight of kind `"offset"`.

    Numerics:
        Nothing is rounded, as in :func:`int4_weight`.

    Raises:
        ValueError: axis 0; shapes that do not fit; scales and zeros whose offsets no float32 holds, as those of
            float32 layers mostly are and those of float16 and bfloat16 hardly ever.
        RuntimeError: dtypes.
    """
    name = "qops.formats.hqq.int8_weight"
    n, k, groups = _groups(name, W_q, scale, zero, shape, axis, codes_per_byte=1)
    scales = scale.view(n, groups)
    qweight, offsets = move_zeros_to_offsets(name, W_q.view(n, k), scales, zero.view(n, groups))
    return Int8Weight.from_canonical(qweight, scales, kind="offset", zeros=offsets, pack=pack)


def _groups(
    name: str, W_q: Tensor, scale: Tensor, zero: Tensor, shape: Sequence[int], axis: int, codes_per_byte: int
) -> tuple[int, int, int]:
    """N, K and the number of groups in a row."""
    if axis != 1:
        raise ValueError(f"{name}: axis must be 1, groups inside the rows of the weight, got {axis!r}")
    require_matrix(name, "W_q", W_q)
    require_dtype(name, "W_q", W_q, torch.uint8)
    n, k = require_shape(name, shape)
    rows, columns = codes_per_byte * W_q.shape[0], W_q.shape[1]
    if rows * columns != n * k or k % columns:
        raise ValueError(
            f"{name}: W_q must hold {codes_per_byte} code{'s' if codes_per_byte > 1 else ''} in a byte, in rows of a "
            f"group size that divides K, for shape [N, K] = {[n, k]}, got {list(W_q.shape)}"
        )
    for label, tensor in (("scale", scale), ("zero", zero)):
        require_matrix(name, label, tensor)
        if list(tensor.shape) != [rows, 1]:
            raise ValueError(f"{name}: {label} must have shape {[rows, 1]}, got {list(tensor.shape)}")
    return n, k, rows // n


# In folders ----------------------------------------------------------------------------------------------------------

_KEYS = ("W_q", "scale", "zero")
# What says how the codes are stored: each has to be there, and to be this.
_SAID = {"axis": 1, "quant_scale": 0, "quant_zero": 0, "view_as_float": 0}
# The rest of what a layer stores of itself, read for nothing but the shape.
_META = {
    *("nbits", "group_size", "shape", "packing", "unpack_view_dtype", "compute_dtype", "offload_meta", "optimize"),
    *("encoded_state_dict", "stores_quant_config", "channel_wise", "round_zero"),
}


class Hqq:
    """HQQ's tensors in a folder (`qops.formats.folders.stored.Method`).

    Args:
        settings: the quantization config; nothing of it is needed.
        options: of the user.
        files: the folder's.

    Raises:
        ValueError: the folder's config is no model's.
    """

    def __init__(self, settings: Mapping[str, Any], options: Options, files: TensorFiles):
        options.refuse("HQQ")
        self._shapes = linear_shapes(files.folder, len(files.specs))

    def stored(self, module: str, specs: Mapping[str, Spec]) -> Stored | None:
        if "W_q" not in specs:
            return None
        if module not in self._shapes:
            raise ValueError("it is no linear of the model that config.json describes")
        rows, columns = self._shapes[module]
        codes = specs["W_q"]
        if len(codes.shape) != 2 or 0 in codes.shape or columns % codes.shape[1]:
            raise ValueError(f"W_q must have rows of a group size that divides K = {columns}, got {codes}")
        groups = rows * columns // codes.shape[1]
        per_byte = groups / codes.shape[0]
        if per_byte not in (1, 2):
            raise ValueError(f"W_q must have 1 or 2 codes in a byte, of {[rows, columns]}, got {codes}")
        wanted: dict[str, Any] = {
            "W_q": (codes.shape, torch.uint8),
            "scale": ((groups, 1), SCALE_DTYPES),
            "zero": ((groups, 1), SCALE_DTYPES),
            "shape": ((2,), torch.int64),
            **{key: ((), (torch.uint8, torch.int32, torch.int64)) for key in _SAID},
        }
        require_specs(specs, wanted)
        int4 = per_byte == 2
        weight: Any = int4_weight if int4 else int8_weight
        return Stored(
            linear=Int4Linear if int4 else Int8WeightOnlyLinear,
            kind=f"HQQ {4 if int4 else 8} bit",
            shape=(rows, columns),
            group_size=codes.shape[1],
            keys=(*wanted, *sorted(_META & specs.keys() - wanted.keys())),
            build=partial(_build, weight, (rows, columns)),
            scale_dtype=specs["scale"].dtype,
            kinds=("float_zero" if int4 else "offset",),
            act_order=False,
            zero_dtype=specs["zero"].dtype if int4 else torch.float32,
        )


def _build(weight: Any, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Int4Weight | Int8Weight:
    said = {key: int(tensors[key]) for key in _SAID}
    if said != _SAID:
        raise ValueError(f"it must have {_SAID}, got {said}")
    if tensors["shape"].tolist() != list(shape):
        raise ValueError(f"shape must be {list(shape)}, as in config.json, got {tensors['shape'].tolist()}")
    return weight(*(tensors[key] for key in _KEYS), shape=shape, axis=1, pack=False)
