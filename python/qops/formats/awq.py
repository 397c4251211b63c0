"""AWQ: what AutoAWQ, auto-round, llm-compressor's predecessors and lmdeploy write; versions gemm, gemv, gemv_fast.

``w[n, k] = scales * (q - z)`` with 4-bit q and z, nothing added. The versions differ in how codes lie in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qops.formats.folders.stored import Options, Stored, require_specs
from qops.formats.folders.tensors import Spec
from qops.formats.folders.words import require_words, unpack
from qops.nn import Int4Linear
from qops.weights import Int4Weight
from qops.weights.requirements import (
    SCALE_DTYPES,
    require_dtype,
    require_int,
    require_matrix,
    require_scale_dtype,
)
from qops.weights.rounding import store_nibbles

__all__ = ["int4_weight"]

VERSIONS = ("gemm", "gemv", "gemv_fast")
# Of version gemm: column 8 j + i of a word is in its nibble _NIBBLE_OF_COLUMN[i].
_NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)


def int4_weight(
    qweight: Tensor,
    qzeros: Tensor | None,
    scales: Tensor,
    *,
    version: str = "gemm",
    group_size: int | None = None,
    symmetric: bool = False,
    pack: bool = True,
) -> Int4Weight:
    """A 4-bit weight from AWQ's tensors; nothing is rounded.

    Args:
        qweight: by version: ``"gemm"`` int32 ``[K, N/8]``; ``"gemv"`` int32 ``[N, K/8]``; ``"gemv_fast"`` int16
            ``[N/4, K]``.
        qzeros: ``"gemm"`` int32 ``[K/G, N/8]``; ``"gemv"`` int32 ``[N, Z]``; ``"gemv_fast"`` in the dtype of scales
            ``[8 Z, N]``, ``-(scale * zero)``. None for a symmetric weight, which lmdeploy stores so.
        scales: float16, bfloat16 or float32: ``"gemm"`` ``[K/G, N]``; ``"gemv"`` ``[N, 8 Z]``; ``"gemv_fast"``
            ``[8 Z, N]``, 8 Z >= K/G, padded.
        version: "gemm", "gemv" or "gemv_fast".
        group_size: G. Needed by the versions whose scales are padded; -1 for one group.
        symmetric: says that, without qzeros, every zero point is 8.
        pack: as in :meth:`qops.Int4Weight.from_canonical`.

    Returns:
        A weight of kind ``"zero_point"`` or, without qzeros, ``"symmetric"``.

    Raises:
        ValueError: shapes do not fit; another version; no group size where it is needed; qzeros are missing, or are
            there where ``symmetric`` says otherwise; scaled zeros that are no multiple of their scale.
        RuntimeError: dtypes.
        TypeError: something else than a tensor.

    Source:
        AutoAWQ's ``WQLinear_GEMM``, ``WQLinear_GEMV`` and ``WQLinear_GEMVFast``.
    """
    name = "qops.formats.awq.int4_weight"
    if version not in VERSIONS:
        raise ValueError(f"{name}: version must be one of {', '.join(VERSIONS)}, got {version!r}")
    if (qzeros is None) != symmetric:
        said = "missing: symmetric=True says that each is 8" if qzeros is None else "there, and symmetric is True"
        raise ValueError(f"{name}: qzeros are {said}")
    require_matrix(name, "scales", scales)
    require_scale_dtype(name, scales.dtype)
    if group_size is not None:
        group_size = require_int(name, "group_size", group_size)
    if version == "gemm":
        codes, zeros, scales = _gemm(name, qweight, qzeros, scales, group_size)
    else:
        if group_size is None:
            raise ValueError(f"{name}: group_size must be given for version {version}, whose scales are padded")
        read = _gemv if version == "gemv" else _gemv_fast
        codes, zeros, scales = read(name, qweight, qzeros, scales, group_size)
    return Int4Weight.from_canonical(
        codes,
        scales,
        kind="symmetric" if zeros is None else "zero_point",
        zeros=zeros,
        in_features=2 * codes.shape[1],
        pack=pack,
    )


def _gemm(
    name: str, qweight: Any, qzeros: Any, scales: Tensor, group_size: int | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    require_words(name, "qweight", qweight)
    (columns, words), groups = qweight.shape, scales.shape[0]
    wanted = columns if group_size == -1 else group_size
    if scales.shape[1] != 8 * words or groups == 0 or columns % groups or wanted not in (None, columns // groups):
        size = "" if wanted is None else f", G = {wanted}"
        raise ValueError(
            f"{name}: scales must have shape [K/G, N] with K = {columns}, N = {8 * words}{size}, "
            f"got {list(scales.shape)}"
        )
    zeros = None
    if qzeros is not None:
        require_words(name, "qzeros", qzeros)
        if list(qzeros.shape) != [groups, words]:
            raise ValueError(f"{name}: qzeros must have shape [K/G, N/8] = {[groups, words]}, got {list(qzeros.shape)}")
        zeros = _columns(qzeros).T.contiguous()
    return store_nibbles(_columns(qweight).T.contiguous()), zeros, scales.T.contiguous()


def _columns(words: Tensor) -> Tensor:
    """Nibbles in the order of their columns: int32 [A, B] -> uint8 [A, 8 B]."""
    nibbles = unpack(words, 4).view(*words.shape, 8)
    return nibbles[..., list(_NIBBLE_OF_COLUMN)].flatten(1)


def _gemv(
    name: str, qweight: Any, qzeros: Any, scales: Tensor, group_size: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    require_words(name, "qweight", qweight)
    rows, columns = qweight.shape[0], 8 * qweight.shape[1]
    groups = _groups(name, columns, group_size)
    if scales.shape[0] != rows or scales.shape[1] < groups:
        raise ValueError(
            f"{name}: scales must have shape [N, 8 Z] with N = {rows} and 8 Z >= K/G = {groups}, "
            f"got {list(scales.shape)}"
        )
    zeros = None
    if qzeros is not None:
        require_words(name, "qzeros", qzeros)
        if qzeros.shape[0] != rows or 8 * qzeros.shape[1] < groups:
            raise ValueError(
                f"{name}: qzeros must have shape [N, Z] with N = {rows} and 8 Z >= K/G = {groups}, "
                f"got {list(qzeros.shape)}"
            )
        zeros = unpack(qzeros, 4)[:, :groups].contiguous()
    return qweight.contiguous().view(torch.uint8), zeros, scales[:, :groups].contiguous()


def _gemv_fast(
    name: str, qweight: Any, qzeros: Any, scales: Tensor, group_size: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    require_matrix(name, "qweight", qweight)
    require_dtype(name, "qweight", qweight, torch.int16)
    rows, columns = 4 * qweight.shape[0], qweight.shape[1]
    groups = _groups(name, columns, group_size)
    if columns % 64:
        raise ValueError(f"{name}: qweight must have K, a multiple of 64, columns, got {list(qweight.shape)}")
    if scales.shape[1] != rows or scales.shape[0] < groups:
        raise ValueError(
            f"{name}: scales must have shape [8 Z, N] with N = {rows} and 8 Z >= K/G = {groups}, "
            f"got {list(scales.shape)}"
        )
    scales = scales[:groups].T.contiguous()
    zeros = None
    if qzeros is not None:
        require_matrix(name, "qzeros", qzeros)
        require_dtype(name, "qzeros", qzeros, scales.dtype)
        if qzeros.shape[1] != rows or qzeros.shape[0] < groups:
            raise ValueError(
                f"{name}: qzeros must have shape [8 Z, N] with N = {rows} and 8 Z >= K/G = {groups}, "
                f"got {list(qzeros.shape)}"
            )
        zeros = _unscaled(name, qzeros[:groups].T.contiguous(), scales)
    # Of four rows and 64 columns, 16 words of four nibbles a row; in each half of them, column 8 j + 2 i + l is the
    # nibble 8 i + 4 l + j.
    words = qweight.contiguous().view(rows // 4, columns // 64, 4, 16, 1)
    shifts = torch.arange(0, 16, 4, dtype=torch.int16, device=words.device)
    nibbles = (words >> shifts).bitwise_and_(15).to(torch.uint8).view(rows // 4, columns // 64, 4, 2, 4, 2, 4)
    codes = nibbles.permute(0, 2, 1, 3, 6, 4, 5).reshape(rows, columns)
    return store_nibbles(codes), zeros, scales


def _unscaled(name: str, scaled: Tensor, scales: Tensor) -> Tensor:
    """The integer zero points that were multiplied with the scales, rounded, and negated."""
    zeros = (-scaled.double() / scales.double()).nan_to_num_(0.0).round_().clamp_(0, 15)
    again = -(scales.float() * zeros.float()).to(scales.dtype)
    if not torch.equal(again, scaled):
        wrong = (again != scaled).nonzero()[0].tolist()
        raise ValueError(
            f"{name}: qzeros must be -(scale * zero) with zero in 0 ... 15, got {scaled[tuple(wrong)].item()} where "
            f"the scale is {scales[tuple(wrong)].item()} (row {wrong[0]}, group {wrong[1]})"
        )
    return zeros.to(torch.uint8)


def _groups(name: str, columns: int, group_size: int) -> int:
    group_size = columns if group_size == -1 else group_size
    if group_size <= 0 or columns % group_size:
        raise ValueError(f"{name}: group_size must divide K = {columns}, got {group_size}")
    return columns // group_size


# In folders ----------------------------------------------------------------------------------------------------------

# llm-awq calls the scaled zeros of version gemv_fast so; AutoAWQ qzeros.
_SCALED_ZEROS = "scaled_zeros"


class Awq:
    """AWQ's tensors in a folder (`qops.formats.folders.stored.Method`).

    Args:
        settings: the quantization config.
        options: of the user.

    Raises:
        ValueError: another version or number of bits; a group size that is none.
    """

    def __init__(self, settings: Mapping[str, Any], options: Options):
        options.refuse("AWQ", "symmetric")
        self._version = str(settings.get("version", "gemm")).lower()
        if self._version not in VERSIONS:
            raise ValueError(f"version must be one of {', '.join(VERSIONS)}, got {settings.get('version')!r}")
        bits = settings.get("bits", settings.get("w_bit", 4))
        if bits != 4:
            raise ValueError(f"bits must be 4, got {bits!r}")
        group_size = settings.get("group_size", settings.get("q_group_size"))
        if isinstance(group_size, bool) or not isinstance(group_size, int):
            raise ValueError(f"group_size must be an integer, got {group_size!r}")
        self._group_size = group_size
        self._symmetric = options.symmetric

    def stored(self, module: str, specs: Mapping[str, Spec]) -> Stored | None:
        if not any(key in specs for key in ("qweight", "qzeros", "scales", _SCALED_ZEROS)):
            return None
        qweight, scales = specs.get("qweight"), specs.get("scales")
        if qweight is None or scales is None:
            raise ValueError(f"tensor {'qweight' if qweight is None else 'scales'} is missing")
        zeros = _SCALED_ZEROS if self._version == "gemv_fast" and _SCALED_ZEROS in specs else "qzeros"
        if zeros not in specs and not self._symmetric:
            raise ValueError(
                f"tensor {zeros} is missing; where it is left out because the weight is symmetric, as lmdeploy "
                "does, symmetric=True says so"
            )
        if zeros in specs and self._symmetric:
            raise ValueError(f"tensor {zeros} is there, and symmetric=True says that there is none")
        if len(qweight.shape) != 2 or len(scales.shape) != 2:
            raise ValueError(f"tensors must be matrices, got qweight {qweight}, scales {scales}")
        first, second = qweight.shape
        per_row = {"gemm": (8 * second, first), "gemv": (first, 8 * second), "gemv_fast": (4 * first, second)}
        rows, columns = per_row[self._version]
        groups = _groups("AWQ", columns, self._group_size)
        group_size = columns // groups
        # Scales and zero points of the other versions are padded to what a kernel of theirs liked.
        padded = {"gemv": (rows, max(groups, scales.shape[1])), "gemv_fast": (max(groups, scales.shape[0]), rows)}
        if self._version == "gemm":
            wanted: dict[str, Any] = {
                "qweight": ((columns, rows // 8), torch.int32),
                "scales": ((groups, rows), SCALE_DTYPES),
                "qzeros": ((groups, rows // 8), torch.int32),
            }
        else:
            words = torch.int32 if self._version == "gemv" else torch.int16
            wanted = {"qweight": (qweight.shape, words), "scales": (padded[self._version], SCALE_DTYPES)}
        require_specs(specs, {key: value for key, value in wanted.items() if key in specs})
        keys = tuple(key for key in ("qweight", zeros, "scales") if key in specs)
        return Stored(
            linear=Int4Linear,
            kind=f"AWQ {self._version}",
            shape=(rows, columns),
            group_size=group_size,
            keys=keys,
            build=partial(self._build, group_size),
            scale_dtype=scales.dtype,
            kinds=("zero_point" if zeros in specs else "symmetric",),
            act_order=False,
        )

    def _build(self, group_size: int, tensors: Mapping[str, Tensor]) -> Int4Weight:
        return int4_weight(
            tensors["qweight"],
            tensors.get("qzeros", tensors.get(_SCALED_ZEROS)),
            tensors["scales"],
            version=self._version,
            group_size=group_size,
            symmetric=bool(self._symmetric),
            pack=False,
        )
