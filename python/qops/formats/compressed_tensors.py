"""compressed-tensors: what llm-compressor writes and vLLM and Transformers read.

``pack-quantized``: integers q of 4 or 8 bits, stored as q + 2^(bits - 1) in words of 32 bits along K, with dense
activations. ``int-quantized`` and ``naive-quantized``: q as int8, with 8-bit activations (W8A8) or dense ones.
``w = scale * (q - zero_point)``. Which module has which scheme is what the config's groups and their targets say; that
a module is quantised, its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qops.formats.folders.stored import Options, Stored, require_specs
from qops.formats.folders.tensors import Spec
from qops.formats.folders.words import int8_from_unsigned, order_of_groups, require_words, unpack
from qops.nn import (
    Int4Linear,
    Int8AsymmetricCompressedTensorsLinear,
    Int8CompressedTensorsLinear,
    Int8StaticCompressedTensorsLinear,
    Int8WeightOnlyLinear,
    QuantizedLinear,
)
from qops.weights import Int4Weight, Int8Weight
from qops.weights.requirements import SCALE_DTYPES, require_dtype, require_matrix, require_scale_dtype, require_tensor
from qops.weights.rounding import store_nibbles

__all__ = ["int4_weight", "int8_weight"]


def int4_weight(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_shape: Tensor | None = None,
    weight_zero_point: Tensor | None = None,
    weight_g_idx: Tensor | None = None,
    *,
    pack: bool = True,
) -> Int4Weight:
    """A 4-bit weight from the tensors of ``pack-quantized``; nothing is rounded.

    Args:
        weight_packed: int32 ``[N, K/8]``, eight codes along K in a word.
        weight_scale: float16, bfloat16 or float32 ``[N, K/G]``.
        weight_shape: integers ``[2]``, N and K; default what `weight_packed` says.
        weight_zero_point: int32 ``[N/8, K/G]``, eight zero points along N in a word; none when symmetric.
        weight_g_idx: integers ``[K]``, the group of each column of w (act-order); all -1 says nothing.
        pack: as in :meth:`qops.Int4Weight.from_canonical`.

    Returns:
        A weight of kind ``"symmetric"``, or ``"zero_point"`` where there are others than 0; in act-order with ``perm``.

    Raises:
        ValueError: shapes do not fit; groups out of range or of different sizes.
        RuntimeError: dtypes.
        TypeError: something else than a tensor.

    Source:
        ``compressed_tensors.compressors.pack_quantized``.
    """
    name = "qops.formats.compressed_tensors.int4_weight"
    columns = _checked(name, "weight_packed", weight_packed, weight_scale, weight_shape, 4)
    perm = _perm(name, weight_g_idx, columns, weight_scale.shape[1])
    if perm is None:
        # Eight codes of a row from the lowest bits on: four bytes of the canonical form, on a little-endian machine.
        codes = weight_packed.contiguous().view(torch.uint8)
    else:
        codes = store_nibbles(unpack(weight_packed, 4)[:, perm.long()])
    zeros = _zero_points(name, weight_zero_point, weight_scale, 4)
    zeros = None if zeros is None or bool((zeros == 8).all()) else zeros
    return Int4Weight.from_canonical(
        codes,
        weight_scale,
        kind="symmetric" if zeros is None else "zero_point",
        zeros=zeros,
        perm=perm,
        in_features=columns,
        pack=pack,
    )


def int8_weight(
    weight: Tensor,
    weight_scale: Tensor,
    weight_shape: Tensor | None = None,
    weight_zero_point: Tensor | None = None,
    weight_g_idx: Tensor | None = None,
    *,
    pack: bool = True,
) -> Int8Weight:
    """An 8-bit weight from the tensors of ``pack-quantized`` or ``int-quantized``; nothing is rounded.

    Args:
        weight: int32 ``[N, K/4]``, four codes along K in a word; or int8 ``[N, K]``.
        weight_scale: float16, bfloat16 or float32 ``[N, K/G]``, or one for the whole weight.
        weight_shape: as in :func:`int4_weight`.
        weight_zero_point: int32 ``[N/4, K/G]`` in words, or int8 ``[N, K/G]``; none when symmetric.
        weight_g_idx: as in :func:`int4_weight`.
        pack: as in :meth:`qops.Int8Weight.from_canonical`.

    Returns:
        A weight of kind ``"symmetric"`` or, with zero points other than 0, ``"offset"``.

    Raises:
        ValueError: shapes do not fit; an offset, ``-scale * zero_point``, that no float32 holds.
        RuntimeError: dtypes.
        TypeError: something else than a tensor.
    """
    name = "qops.formats.compressed_tensors.int8_weight"
    require_tensor(name, "weight_scale", weight_scale)
    require_matrix(name, "weight", weight)
    if weight_scale.numel() == 1:
        weight_scale = weight_scale.reshape(1, 1).expand(weight.shape[0], 1).contiguous()
    columns = _checked(name, "weight", weight, weight_scale, weight_shape, 8)
    if weight.dtype == torch.int8:
        codes = weight.contiguous().view(torch.uint8) ^ 128
        zeros = weight_zero_point
        if zeros is not None:
            require_tensor(name, "weight_zero_point", zeros)
            require_dtype(name, "weight_zero_point", zeros, torch.int8)
            if zeros.numel() != 1 and zeros.shape != weight_scale.shape:
                raise ValueError(
                    f"{name}: weight_zero_point must have shape [N, K/G] = {list(weight_scale.shape)}, "
                    f"got {list(zeros.shape)}"
                )
            zeros = zeros.expand(weight_scale.shape).contiguous().view(torch.uint8) ^ 128
    else:
        codes = weight.contiguous().view(torch.uint8)
        zeros = _zero_points(name, weight_zero_point, weight_scale, 8)
    perm = _perm(name, weight_g_idx, columns, weight_scale.shape[1])
    codes = codes if perm is None else codes[:, perm.long()]
    return int8_from_unsigned(name, codes, zeros, weight_scale, perm, pack=pack)


def _checked(name: str, label: str, codes: Any, scale: Any, shape: Any, bits: int) -> int:
    """K."""
    if bits == 4 or codes.dtype != torch.int8:
        require_words(name, label, codes)
    require_matrix(name, "weight_scale", scale)
    require_scale_dtype(name, scale.dtype)
    rows, columns = codes.shape[0], codes.shape[1] * 8 * codes.dtype.itemsize // bits
    if shape is not None:
        require_tensor(name, "weight_shape", shape)
        if shape.is_floating_point() or shape.tolist() != [rows, columns]:
            raise ValueError(
                f"{name}: weight_shape must be [N, K] = {[rows, columns]}, as {label} {list(codes.shape)} "
                f"says, got {shape.tolist()}"
            )
    if scale.shape[0] != rows:
        raise ValueError(f"{name}: weight_scale must have shape [N, K/G] with N = {rows}, got {list(scale.shape)}")
    return columns


def _perm(name: str, g_idx: Tensor | None, columns: int, groups: int) -> Tensor | None:
    if g_idx is not None:
        require_tensor(name, "weight_g_idx", g_idx)
    # Where a group has not been given, its producer leaves -1.
    if g_idx is None or bool((g_idx == -1).all()):
        return None
    return order_of_groups(name, g_idx, columns, groups)


def _zero_points(name: str, packed: Tensor | None, scale: Tensor, bits: int) -> Tensor | None:
    if packed is None:
        return None
    require_words(name, "weight_zero_point", packed)
    in_word = 32 // bits
    if list(packed.shape) != [-(-scale.shape[0] // in_word), scale.shape[1]]:
        raise ValueError(
            f"{name}: weight_zero_point must have shape [N/{in_word}, K/G] where weight_scale has shape "
            f"{list(scale.shape)}, got {list(packed.shape)}"
        )
    return unpack(packed.T, bits)[:, : scale.shape[0]].T.contiguous()


# In folders ----------------------------------------------------------------------------------------------------------

_INTEGERS = ("weight", "weight_scale", "weight_zero_point")
_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
# strategy, dynamic, symmetric -> what multiplies as the producer's own runtime does.
_LINEARS: dict[tuple[Any, Any, Any], type[QuantizedLinear]] = {
    ("token", True, True): Int8CompressedTensorsLinear,
    ("token", True, False): Int8AsymmetricCompressedTensorsLinear,
    ("tensor", False, True): Int8StaticCompressedTensorsLinear,
    ("tensor", False, False): Int8StaticCompressedTensorsLinear,
}
_EMPTY = (None, {}, [], "dense")


class CompressedTensors:
    """The tensors of compressed-tensors in a folder (`qops.formats.folders.stored.Method`).

    Args:
        settings: the quantization config.
        options: of the user.

    Raises:
        ValueError: a format, or a setting, that is not supported.
    """

    def __init__(self, settings: Mapping[str, Any], options: Options):
        options.refuse("compressed-tensors")
        for key in ("sparsity_config", "transform_config", "kv_cache_scheme"):
            value = settings.get(key)
            if value not in _EMPTY and not (isinstance(value, dict) and value.get("format") == "dense"):
                raise ValueError(f"{key} is not supported, got {value}")
        status = settings.get("quantization_status", "compressed")
        if status != "compressed":
            raise ValueError(f"quantization_status must be compressed, got {status!r}")
        groups = settings.get("config_groups")
        if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
            raise ValueError(f"config_groups must map names to groups, got {groups!r}")
        self._groups: dict[str, Mapping[str, Any]] = groups
        self._format = settings.get("format")

    def stored(self, module: str, specs: Mapping[str, Spec]) -> Stored | None:
        if "weight_packed" not in specs and "weight_scale" not in specs:
            return None
        group = self._group_of(module)
        said = group.get("format") or self._format
        if said not in _FORMATS:
            raise ValueError(f"format must be one of {', '.join(_FORMATS)}, got {said!r}")
        weights, inputs = group.get("weights"), group.get("input_activations")
        if not isinstance(weights, dict):
            raise ValueError(f"weights of its config group must be an object, got {weights!r}")
        if group.get("output_activations") is not None:
            raise ValueError(f"output_activations are not supported, got {group['output_activations']}")
        bits = weights.get("num_bits")
        if weights.get("type", "int") != "int" or bits not in (4, 8):
            raise ValueError(f"weights must be integers of 4 or 8 bits, got {bits!r} of {weights.get('type')!r}")
        if weights.get("strategy") not in ("tensor", "channel", "group"):
            raise ValueError(f"strategy of weights must be tensor, channel or group, got {weights.get('strategy')!r}")
        if said == "pack-quantized":
            if inputs is not None:
                raise ValueError(f"input_activations of {said} are not supported, got {inputs}")
            return self._packed(specs, weights, bits)
        if bits != 8:
            raise ValueError(f"weights of {said} must have 8 bits, got {bits}")
        return self._integers(specs, weights, inputs)

    def _group_of(self, module: str) -> Mapping[str, Any]:
        """The config group that is for a linear: by its name, by a pattern, by its class, in this order."""
        by_pattern, by_class = [], []
        for group in self._groups.values():
            for target in group.get("targets", ()):
                if target == module:
                    return group
                if target.startswith("re:"):
                    if re.match(target.removeprefix("re:"), module):
                        by_pattern.append(group)
                elif target == "Linear":
                    by_class.append(group)
        found = (by_pattern or by_class)[:1]
        if not found:
            raise ValueError("no target of config_groups is for it, and it is quantised")
        return found[0]

    def _packed(self, specs: Mapping[str, Spec], weights: Mapping[str, Any], bits: int) -> Stored:
        packed, scale = specs.get("weight_packed"), specs.get("weight_scale")
        if packed is None or scale is None or len(packed.shape) != 2 or len(scale.shape) != 2 or 0 in scale.shape:
            raise ValueError(f"weight_packed and weight_scale must be matrices, got {packed} and {scale}")
        in_word = 32 // bits
        rows, columns, groups = packed.shape[0], packed.shape[1] * in_word, scale.shape[1]
        wanted: dict[str, Any] = {
            "weight_packed": ((rows, columns // in_word), torch.int32),
            "weight_scale": ((rows, groups), SCALE_DTYPES),
            "weight_shape": ((2,), (torch.int64, torch.int32)),
        }
        if "weight_zero_point" in specs or not weights.get("symmetric", True):
            wanted["weight_zero_point"] = ((-(-rows // in_word), groups), torch.int32)
        if "weight_g_idx" not in specs and weights.get("actorder") in ("group", True):
            raise ValueError("tensor weight_g_idx is missing, and actorder says that columns are in act-order")
        if "weight_g_idx" in specs:
            wanted["weight_g_idx"] = ((columns,), (torch.int32, torch.int64))
        require_specs(specs, wanted)
        group_size = self._group_size(weights, columns, groups)
        return Stored(
            linear=Int4Linear if bits == 4 else Int8WeightOnlyLinear,
            kind=f"pack-quantized {bits} bit",
            shape=(rows, columns),
            group_size=group_size,
            keys=tuple(wanted),
            build=partial(_build_packed, bits),
            scale_dtype=scale.dtype,
            kinds=_kinds(bits, "weight_zero_point" in wanted),
            act_order=None if "weight_g_idx" in wanted else False,
        )

    @staticmethod
    def _group_size(weights: Mapping[str, Any], columns: int, groups: int) -> int:
        said = weights.get("group_size") if weights["strategy"] == "group" else columns
        if (
            isinstance(said, bool)
            or not isinstance(said, int)
            or said <= 0
            or columns % said
            or columns // said != groups
        ):
            raise ValueError(f"weight_scale must have K/G columns with K = {columns}, G = {said}, got {groups}")
        return said

    def _integers(
        self, specs: Mapping[str, Spec], weights: Mapping[str, Any], inputs: Mapping[str, Any] | None
    ) -> Stored:
        weight, scale = specs.get("weight"), specs.get("weight_scale")
        if weight is None or scale is None or len(weight.shape) != 2:
            raise ValueError(f"weight must be a matrix and weight_scale be there, got {weight} and {scale}")
        rows, columns = weight.shape
        one = weights["strategy"] == "tensor"
        groups = 1 if one or len(scale.shape) != 2 else scale.shape[1]
        group_size = self._group_size(weights, columns, groups)
        scale_shape = scale.shape if one and scale.shape in ((), (1,)) else (rows, groups)
        wanted: dict[str, Any] = {"weight": ((rows, columns), torch.int8), "weight_scale": (scale_shape, SCALE_DTYPES)}
        if "weight_zero_point" in specs:
            wanted["weight_zero_point"] = (scale_shape, torch.int8)
        elif not weights.get("symmetric", True):
            raise ValueError("tensor weight_zero_point is missing, and its config group says not symmetric")
        require_specs(specs, wanted)
        linear = self._linear(inputs)
        if linear is not Int8WeightOnlyLinear and groups != 1:
            raise ValueError(f"weights with 8-bit activations must have one scale per row, got weight_scale {scale}")
        inputs_there = [key for key in linear.static_input if key == "input_scale" or key in specs]
        for key in inputs_there:
            dtypes = SCALE_DTYPES if key == "input_scale" else (torch.int8, torch.int32, torch.int64)
            shape = specs[key].shape if key in specs and specs[key].shape in ((), (1,), (1, 1)) else (1,)
            require_specs(specs, {key: (shape, dtypes)})
        return Stored(
            linear=linear,
            kind=f"int-quantized {linear.scheme}",
            shape=(rows, columns),
            group_size=group_size,
            keys=tuple(wanted),
            build=_build_integers,
            scale_dtype=scale.dtype,
            kinds=_kinds(8, "weight_zero_point" in wanted and linear is Int8WeightOnlyLinear),
            act_order=False,
            input_keys=tuple(inputs_there),
        )

    @staticmethod
    def _linear(inputs: Mapping[str, Any] | None) -> type[QuantizedLinear]:
        """What multiplies, by the scheme of its input."""
        if inputs is None:
            return Int8WeightOnlyLinear
        how = inputs.get("strategy"), inputs.get("dynamic"), inputs.get("symmetric", True)
        linear = _LINEARS.get(how) if inputs.get("num_bits") == 8 and inputs.get("type", "int") == "int" else None
        if linear is None:
            raise ValueError(
                "input_activations must be integers of 8 bits, dynamic with strategy token, or static with strategy "
                f"tensor, got {dict(inputs)}"
            )
        return linear


def _kinds(bits: int, zero_points: bool) -> tuple[str, ...]:
    """Zero points that are all 0 are none."""
    return ("symmetric", "zero_point" if bits == 4 else "offset") if zero_points else ("symmetric",)


def _build_packed(bits: int, tensors: Mapping[str, Tensor]) -> Int4Weight | Int8Weight:
    given = dict(tensors)
    packed = given.pop("weight_packed")
    if bits == 4:
        return int4_weight(packed, pack=False, **given)
    return int8_weight(packed, pack=False, **given)


def _build_integers(tensors: Mapping[str, Tensor]) -> Int8Weight:
    return int8_weight(**{key: tensors[key] for key in _INTEGERS if key in tensors}, pack=False)
