"""GPTQ: what AutoGPTQ, GPTQModel and auto-round write, versions 1 and 2, 4 and 8 bits.

``w[n, k] = scales[g, n] * (q[k, n] - z[g, n])`` with g = g_idx[k]. Codes share 32-bit words along K, zero points along
N. Version 2 stores z, version 1 stores z - 1. For z = 0 there are two version 1s: GPTQModel subtracts one from each
zero point of a word at once, so that a 0 borrows from its neighbour, and adds them back so ("word"). AutoGPTQ's kernels
add one to each zero point by itself ("nibble").
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qops.formats.folders.stored import Options, Stored, require_specs
from qops.formats.folders.tensors import Spec
from qops.formats.folders.words import (
    int8_from_unsigned,
    order_of_groups,
    require_words,
    unpack,
)
from qops.nn import Int4Linear, Int8WeightOnlyLinear
from qops.weights import Int4Weight, Int8Weight
from qops.weights.requirements import SCALE_DTYPES, require_matrix, require_scale_dtype
from qops.weights.rounding import store_nibbles

__all__ = ["int4_weight", "int8_weight"]

_ADDED = ("word", "nibble", "none")


def int4_weight(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    zero_add: str | None = None,
    pack: bool = True,
) -> Int4Weight:
    """A 4-bit weight from GPTQ's tensors; nothing is rounded.

    Args:
        qweight: int32 ``[K/8, N]``, eight codes along K in a word.
        qzeros: int32 ``[K/G, N/8]``, eight zero points along N in a word.
        scales: float16, bfloat16 or float32 ``[K/G, N]``.
        g_idx: integers ``[K]``, the group of each column of w (act-order); default ``k // G``.
        zero_add: what has to be added to the stored zero points: ``"none"`` for version 2; for version 1 ``"word"``,
            1 to each of a word with carries, as GPTQModel does, or ``"nibble"``, modulo 16, as AutoGPTQ's kernels do.
            They differ where a zero point is 0. Default: ``"word"``, with a warning where ``"nibble"`` would differ,
            and an error where every stored zero point is 8, which is what version 2 stores of a symmetric weight.
        pack: as in :meth:`qops.Int4Weight.from_canonical`.

    Returns:
        A weight of kind ``"symmetric"`` where all zero points are 8, else ``"zero_point"``; in act-order with ``perm``.

    Raises:
        ValueError: shapes do not fit; groups out of range or of different sizes; zero points that can be read in two
            ways; another ``zero_add``.
        RuntimeError: dtypes.
        TypeError: something else than a tensor.
    """
    return _int4_weight("qops.formats.gptq.int4_weight", qweight, qzeros, scales, g_idx, zero_add, pack)


def _int4_weight(
    name: str, qweight: Any, qzeros: Any, scales: Any, g_idx: Any, zero_add: str | None, pack: bool
) -> Int4Weight:
    zeros, columns = _checked(name, qweight, qzeros, scales, zero_add, 4)
    perm = None if g_idx is None else order_of_groups(name, g_idx, columns, scales.shape[0])
    # Eight codes of a row from the lowest bits on: four bytes of the canonical form, on a little-endian machine.
    codes = (
        qweight.T.contiguous().view(torch.uint8)
        if perm is None
        else store_nibbles(unpack(qweight.T, 4)[:, perm.long()])
    )
    zeros = zeros.T.contiguous()
    symmetric = bool((zeros == 8).all())
    return Int4Weight.from_canonical(
        codes,
        scales.T.contiguous(),
        kind="symmetric" if symmetric else "zero_point",
        zeros=None if symmetric else zeros,
        perm=perm,
        in_features=columns,
        pack=pack,
    )


def int8_weight(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    zero_add: str | None = None,
    pack: bool = True,
) -> Int8Weight:
    """An 8-bit weight from GPTQ's tensors; nothing is rounded.

    Args:
        qweight: int32 ``[K/4, N]``, four codes along K in a word.
        qzeros: int32 ``[K/G, N/4]``, four zero points along N in a word.
        scales: float16, bfloat16 or float32 ``[K/G, N]``.
        g_idx: as in :func:`int4_weight`.
        zero_add: as there; the symmetric zero point is 128.
        pack: as in :meth:`qops.Int8Weight.from_canonical`.

    Returns:
        A weight of kind ``"symmetric"`` where all zero points are 128, else ``"offset"``.

    Raises:
        ValueError: as :func:`int4_weight`; an offset, ``scale * (128 - zero)``, that no float32 holds.
        RuntimeError: dtypes.
        TypeError: something else than a tensor.
    """
    return _int8_weight("qops.formats.gptq.int8_weight", qweight, qzeros, scales, g_idx, zero_add, pack)


def _int8_weight(
    name: str, qweight: Any, qzeros: Any, scales: Any, g_idx: Any, zero_add: str | None, pack: bool
) -> Int8Weight:
    zeros, columns = _checked(name, qweight, qzeros, scales, zero_add, 8)
    perm = None if g_idx is None else order_of_groups(name, g_idx, columns, scales.shape[0])
    codes = unpack(qweight.T, 8)
    codes = codes if perm is None else codes[:, perm.long()]
    return int8_from_unsigned(name, codes, zeros.T.contiguous(), scales.T.contiguous(), perm, pack=pack)


def _checked(name: str, qweight: Any, qzeros: Any, scales: Any, zero_add: str | None, bits: int) -> tuple[Tensor, int]:
    """The zero points, uint8 [K/G, N], and K."""
    require_words(name, "qweight", qweight)
    require_words(name, "qzeros", qzeros)
    require_matrix(name, "scales", scales)
    require_scale_dtype(name, scales.dtype)
    in_word = 32 // bits
    columns, rows, groups = in_word * qweight.shape[0], qweight.shape[1], scales.shape[0]
    if scales.shape[1] != rows or groups == 0 or columns % groups:
        raise ValueError(
            f"{name}: scales must have shape [K/G, N] with K = {columns} and N = {rows}, got {list(scales.shape)}"
        )
    if list(qzeros.shape) != [groups, rows // in_word] or rows % in_word:
        raise ValueError(
            f"{name}: qzeros must have shape [K/G, N/{in_word}] with K/G = {groups} and N = {rows}, "
            f"got {list(qzeros.shape)}"
        )
    return zero_points(name, qzeros, bits, zero_add), columns


def require_zero_add(name: str, zero_add: object) -> None:
    if not isinstance(zero_add, str) or zero_add not in _ADDED:
        raise ValueError(f'{name}: zero_add must be "word", "nibble" or "none", got {zero_add!r}')


def zero_points(name: str, qzeros: Tensor, bits: int, zero_add: str | None) -> Tensor:
    """The zero points that are stored along the rows of words, uint8 [A, B] -> [A, B * 32 / bits]."""
    if zero_add is not None:
        require_zero_add(name, zero_add)
    stored, most = unpack(qzeros, bits), (1 << bits) - 1
    if zero_add == "none":
        return stored
    if stored.numel() == 0 or int(stored.max()) < most:  # no carry, however it is added
        if zero_add is None:
            _ask_where_version_2(name, stored, bits)
        return stored + 1
    by_nibble = (stored + 1).bitwise_and_(most)
    if zero_add == "nibble":
        return by_nibble
    by_word = unpack(qzeros + sum(1 << shift for shift in range(0, 32, bits)), bits)
    differ = int((by_word != by_nibble).sum())
    if zero_add is None and differ:
        warnings.warn(
            f'{name}: {differ} of {stored.numel()} zero points differ between zero_add="word", as GPTQModel reads '
            'them, which is used, and zero_add="nibble", as AutoGPTQ does',
            stacklevel=2,
        )
    return by_word


def _ask_where_version_2(name: str, stored: Tensor, bits: int) -> None:
    middle = 1 << (bits - 1)
    if stored.numel() > 0 and bool((stored == middle).all()):
        raise ValueError(
            f"{name}: every stored zero point is {middle}: {middle + 1} if version 1 of the format wrote them "
            f'(zero_add="word"), {middle}, as symmetric weights have, if version 2 did (zero_add="none")'
        )


# In folders ----------------------------------------------------------------------------------------------------------

_FORMATS = {"gptq": None, "gptq_v2": "none"}
_KEYS = ("qweight", "qzeros", "scales")


class Gptq:
    """GPTQ's tensors in a folder (`qops.formats.folders.stored.Method`).

    Bits and groups are what the shapes of the tensors say: the config may give some layers others.

    Args:
        settings: the quantization config.
        options: of the user.

    Raises:
        ValueError: another format than "gptq" and "gptq_v2"; settings of a wrong type.
    """

    def __init__(self, settings: Mapping[str, Any], options: Options):
        options.refuse("GPTQ", "zero_add")
        said = settings.get("checkpoint_format", settings.get("format", "gptq"))
        if said not in _FORMATS or settings.get("is_marlin_format"):
            found = "marlin" if settings.get("is_marlin_format") else said
            raise ValueError(f"checkpoint_format must be one of {', '.join(_FORMATS)}, got {found!r}")
        self._group_size = settings.get("group_size", -1)
        if isinstance(self._group_size, bool) or not isinstance(self._group_size, int):
            raise ValueError(f"group_size must be an integer, got {self._group_size!r}")
        self._act_order = bool(settings.get("desc_act", False))
        if options.zero_add is not None:
            require_zero_add("GPTQ", options.zero_add)
        self._zero_add = _FORMATS[said] if options.zero_add is None else options.zero_add
        self._version = 2 if self._zero_add == "none" else 1
        self._labelled_2 = options.zero_add is None and said == "gptq_v2"

    def stored(self, module: str, specs: Mapping[str, Spec]) -> Stored | None:
        if not any(key in specs for key in (*_KEYS, "g_idx")):
            return None
        qweight, qzeros, scales = (specs.get(key) for key in _KEYS)
        if qweight is None or qzeros is None or scales is None:
            raise ValueError(f"tensor {next(key for key in _KEYS if key not in specs)} is missing")
        if len(scales.shape) != 2 or len(qzeros.shape) != 2 or len(qweight.shape) != 2 or 0 in scales.shape:
            raise ValueError(f"tensors must be matrices, got scales {scales}, qzeros {qzeros}, qweight {qweight}")
        groups, rows = scales.shape
        bits = 32 * qzeros.shape[1] / rows
        if bits not in (4, 8):
            raise ValueError(f"codes must have 4 or 8 bits, got {bits:g} by qzeros {qzeros} and scales {scales}")
        in_word = 32 // int(bits)
        columns = qweight.shape[0] * in_word
        require_specs(
            specs,
            {
                "qweight": ((columns // in_word, rows), torch.int32),
                "qzeros": ((groups, rows // in_word), torch.int32),
                "scales": ((groups, rows), SCALE_DTYPES),
            },
        )
        group_size = columns // groups
        ordered = "g_idx" in specs
        if ordered:
            require_specs(specs, {"g_idx": ((columns,), (torch.int32, torch.int64))})
        elif self._act_order:
            raise ValueError("tensor g_idx is missing, and desc_act says that columns are in act-order")
        elif self._group_size not in (group_size, -1) or (self._group_size == -1 and groups != 1):
            raise ValueError(
                f"scales must have {-(-columns // self._group_size) if self._group_size > 0 else 1} rows where "
                f"group_size is {self._group_size} and K = {columns}, got {scales}"
            )
        if columns % groups:
            raise ValueError(f"K must be a multiple of the number of groups, got {columns} and {groups}")
        int4 = bits == 4
        weight: Any = _int4_weight if int4 else _int8_weight
        return Stored(
            linear=Int4Linear if int4 else Int8WeightOnlyLinear,
            kind=f"GPTQ version {self._version}, {bits:g} bit" + (", act-order" if self._act_order else ""),
            shape=(rows, columns),
            group_size=group_size,
            keys=(*_KEYS, "g_idx") if ordered else _KEYS,
            build=partial(self._build, module, weight, int(bits)),
            scale_dtype=scales.dtype,
            kinds=("symmetric", "zero_point" if int4 else "offset"),
            act_order=None if ordered else False,
        )

    def _build(self, module: str, weight: Any, bits: int, tensors: Mapping[str, Tensor]) -> Any:
        if self._labelled_2:
            stored, middle = unpack(tensors["qzeros"], bits), 1 << (bits - 1)
            if bool((stored == middle - 1).all()):
                raise ValueError(
                    f"every stored zero point is {middle - 1}, which version 1 of the format stores of a symmetric "
                    f'weight (zero_add="word"); as version 2, which the config says, {middle - 1} it is '
                    '(zero_add="none")'
                )
        # The name of the module, for the warning, which no path goes before.
        return weight(module, *(tensors.get(key) for key in (*_KEYS, "g_idx")), self._zero_add, False)
