"""Blocks of GGUF as the canonical tensors of a weight; every stored code, scale and offset keeps its value.

A block holds 32 consecutive elements of one row, or 256 (the K-quants), whose scales then are products of a number of
the block and a small integer of the group, and are kept so (scales of two levels). d, m, dmin are float16.

    type   bytes  elements  group  w                     weight                   bits an element, and in the file
    Q4_0      18        32     32  d (q - 8)             Int4Weight, "symmetric"   4.5   4.5
    Q4_1      20        32     32  d q + m               Int4Weight, "offset"      5     5
    Q5_0      22        32     32  d (q - 16)            Int8Weight, "symmetric"   8.5   5.5
    Q5_1      24        32     32  d q + m               Int8Weight, "offset"      9     6
    Q8_0      34        32     32  d q                   Int8Weight, "symmetric"   8.5   8.5
    Q2_K      84       256     16  (d s) q - (dmin m)    Int4Weight, "offset"      5.13  2.63
    Q3_K     110       256     16  (d (s - 32)) (q - 4)  Int4Weight, "symmetric"   4.56  3.44
    Q4_K     144       256     32  (d s) q - (dmin m)    Int4Weight, "offset"      4.63  4.5
    Q5_K     176       256     32  (d s) q - (dmin m)    Int8Weight, "offset"      8.63  5.5
    Q6_K     210       256     16  (d s) (q - 32)        Int8Weight, "symmetric"   8.56  6.56

At M = 1, where a product reads its weight once and little else, it reads so many bits.

Offsets are stored as (-dmin) m, whose zeros have signs: w then has that of ggml's zero, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qops._layout import with_levels
from qops.formats.checkpoint import QuantizedFacts
from qops.weights import Int4Weight, Int8Weight

# Elements that are decoded at a time: temporaries of a few MiB, whatever the weight.
_CHUNK_ELEMENTS = 1 << 20


class Decoded(NamedTuple):
    """Some blocks: codes uint8 [R, B, elements] for 4 bits and int8 for 8, scales and offsets [R, B, groups], or of two
    levels int8 [R, B, 2 + groups]."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None = None


class BlockType(NamedTuple):
    """How a type lies in memory.

    Attributes:
        bytes: of a block.
        elements: of a block.
        bits: of the codes of the weight it becomes, 4 or 8.
        decode: uint8 [R, B, bytes] -> their contents.
    """

    bytes: int
    elements: int
    bits: int
    decode: Callable[[Tensor], Decoded]


def _halves(blocks: Tensor, offset: int, count: int = 1) -> Tensor:
    """The float16 numbers at byte `offset` of each block, [R, B, count]."""
    return blocks[..., offset : offset + 2 * count].contiguous().view(torch.float16)


def _levels(halves: Tensor, codes: Tensor) -> Tensor:
    """Scales of two levels, of bytes that are codes of 8 bits with sign or fewer without."""
    return with_levels(halves.squeeze(-1), codes.view(torch.int8))


def _digits(packed: Tensor, bits: int) -> Tensor:
    """[..., n] -> [..., 8 / bits, n]: the lowest digits of all bytes, then the next ones."""
    shifts = range(0, 8, bits)
    return torch.stack([packed >> shift & (1 << bits) - 1 for shift in shifts], dim=-2)


def _runs(packed: Tensor, length: int, bits: int) -> Tensor:
    """[..., n] -> [..., 8 n / bits]: of each run of `length` bytes the lowest digits, then the next ones."""
    return _digits(packed.unflatten(-1, (-1, length)), bits).flatten(-3)


def _bits_in_order(packed: Tensor) -> Tensor:
    """[..., n] -> [..., 8 n]: element j is bit j % 8 of byte j / 8."""
    return _digits(packed, 1).transpose(-2, -1).flatten(-2)


def _q4_0(blocks: Tensor) -> Decoded:
    return Decoded(_runs(blocks[..., 2:], 16, 4), _halves(blocks, 0))


def _q4_1(blocks: Tensor) -> Decoded:
    return Decoded(_runs(blocks[..., 4:], 16, 4), _halves(blocks, 0), _halves(blocks, 2))


def _five_bits(blocks: Tensor, offset: int) -> Tensor:
    high = _bits_in_order(blocks[..., offset : offset + 4])
    return (_runs(blocks[..., offset + 4 :], 16, 4) | high << 4).view(torch.int8)


def _q5_0(blocks: Tensor) -> Decoded:
    return Decoded(_five_bits(blocks, 2) - 16, _halves(blocks, 0))


def _q5_1(blocks: Tensor) -> Decoded:
    return Decoded(_five_bits(blocks, 4), _halves(blocks, 0), _halves(blocks, 2))


def _q8_0(blocks: Tensor) -> Decoded:
    return Decoded(blocks[..., 2:].contiguous().view(torch.int8), _halves(blocks, 0))


def _q2_k(blocks: Tensor) -> Decoded:
    scales, offsets = blocks[..., :16] & 15, blocks[..., :16] >> 4
    codes = _runs(blocks[..., 16:80], 32, 2)
    return Decoded(codes, _levels(_halves(blocks, 80), scales), _levels(-_halves(blocks, 82), offsets))


def _q3_k(blocks: Tensor) -> Decoded:
    low, high = _runs(blocks[..., 96:104], 8, 4), _runs(blocks[..., 104:108], 4, 2)
    scales = (low | high << 4).view(torch.int8) - 32
    # q - 4 as the 4-bit code of q + 4 - 8.
    codes = (_runs(blocks[..., 32:96], 32, 2) | _runs(blocks[..., :32], 32, 1) << 2) + 4
    return Decoded(codes, _levels(_halves(blocks, 108), scales))


def _scales_and_offsets(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: d, dmin, and for each of 8 groups 6 bits of either, those of the last four in two pieces."""
    first, second, third = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=-1)
    offsets = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=-1)
    return _levels(_halves(blocks, 0), scales), _levels(-_halves(blocks, 2), offsets)


def _q4_k(blocks: Tensor) -> Decoded:
    return Decoded(_runs(blocks[..., 16:], 32, 4), *_scales_and_offsets(blocks))


def _q5_k(blocks: Tensor) -> Decoded:
    codes = _runs(blocks[..., 48:], 32, 4) | _runs(blocks[..., 16:48], 32, 1) << 4
    return Decoded(codes.view(torch.int8), *_scales_and_offsets(blocks))


def _q6_k(blocks: Tensor) -> Decoded:
    codes = (_runs(blocks[..., :128], 64, 4) | _runs(blocks[..., 128:192], 32, 2) << 4).view(torch.int8) - 32
    return Decoded(codes, _levels(_halves(blocks, 208), blocks[..., 192:208]))


BLOCK_TYPES = {
    "Q4_0": BlockType(18, 32, 4, _q4_0),
    "Q4_1": BlockType(20, 32, 4, _q4_1),
    "Q5_0": BlockType(22, 32, 8, _q5_0),
    "Q5_1": BlockType(24, 32, 8, _q5_1),
    "Q8_0": BlockType(34, 32, 8, _q8_0),
    "Q2_K": BlockType(84, 256, 4, _q2_k),
    "Q3_K": BlockType(110, 256, 4, _q3_k),
    "Q4_K": BlockType(144, 256, 4, _q4_k),
    "Q5_K": BlockType(176, 256, 8, _q5_k),
    "Q6_K": BlockType(210, 256, 8, _q6_k),
}
"""By GGUF's name of the type."""


def int4_weight(blocks: Tensor, qtype: str, *, pack: bool = True) -> Int4Weight:
    """A weight from GGUF blocks; nothing is rounded.

    Args:
        blocks: uint8 ``[N, bytes per row]``, as stored in the file.
        qtype: "Q4_0", "Q4_1", "Q2_K", "Q3_K" or "Q4_K".
        pack: as in :meth:`qops.Int4Weight.from_canonical`.

    Returns:
        Of kind ``"symmetric"`` (Q4_0, Q3_K) or ``"offset"``, in groups of 32, and of 16 for Q2_K and Q3_K. Scales and
        offsets are float16, and of two levels for K-quants.

    Raises:
        ValueError: another type, or blocks that do not fill rows of it; N is no multiple of 8; NaN or infinity in a
            block's scales.
        TypeError: blocks that are no tensor.

    Source:
        ggml's block formats (ggml-quants.c, ggml-common.h).
    """
    return Int4Weight.from_canonical(**_canonical("qops.Int4Weight.from_gguf", blocks, qtype, bits=4), pack=pack)


def int8_weight(blocks: Tensor, qtype: str, *, pack: bool = True) -> Int8Weight:
    """A weight from GGUF blocks; nothing is rounded.

    Args:
        blocks: uint8 ``[N, bytes per row]``, as stored in the file.
        qtype: "Q8_0", "Q5_0", "Q5_1", "Q5_K" or "Q6_K".
        pack: as in :meth:`qops.Int8Weight.from_canonical`.

    Returns:
        Of kind ``"symmetric"``, and ``"offset"`` for Q5_1 and Q5_K, in groups of 32, and of 16 for Q6_K. Scales and
        offsets are float16, and of two levels for K-quants.

    Raises:
        ValueError: another type, or blocks that do not fill rows of it; N is no multiple of 8; NaN or infinity in a
            block's scales.
        TypeError: blocks that are no tensor.

    Source:
        ggml's block formats (ggml-quants.c, ggml-common.h).
    """
    return Int8Weight.from_canonical(**_canonical("qops.Int8Weight.from_gguf", blocks, qtype, bits=8), pack=pack)


@functools.cache
def facts(qtype: str) -> QuantizedFacts:
    """What every weight of a type has in common, by one of zeros."""
    block = BLOCK_TYPES[qtype]
    zeros = torch.zeros(8, block.bytes, dtype=torch.uint8)
    weight = (int4_weight if block.bits == 4 else int8_weight)(zeros, qtype, pack=False)
    return QuantizedFacts(weight.group_size, weight.scale_dtype, (weight.kind,), weight.act_order, weight.zero_dtype)


def dequantize(blocks: Tensor, qtype: str) -> Tensor:
    """The float32 values of blocks, of any number of rows; bit for bit ggml's own.

    Args:
        blocks: uint8 ``[N, bytes per row]``.
        qtype: one of `BLOCK_TYPES`.

    Returns:
        float32 ``[N, K]``.

    Raises:
        ValueError: as of :func:`int4_weight`, but N is any.
    """
    make = int4_weight if qtype in BLOCK_TYPES and BLOCK_TYPES[qtype].bits == 4 else int8_weight
    filled = torch.nn.functional.pad(blocks, (0, 0, 0, -blocks.shape[0] % 8))
    return make(filled, qtype, pack=False).dequantize()[: blocks.shape[0]]


def _of_rows(numbers: Tensor) -> Tensor:
    """Scales or offsets as a weight has them."""
    return numbers if numbers.dtype == torch.int8 else numbers.flatten(1)


def _canonical(name: str, blocks: Tensor, qtype: str, bits: int) -> dict[str, Any]:
    """The arguments of `from_canonical`."""
    types = [key for key, value in BLOCK_TYPES.items() if value.bits == bits]
    if qtype not in types:
        raise ValueError(f"{name}: qtype must be one of {', '.join(types)}, got {qtype!r}")
    if not isinstance(blocks, Tensor):
        raise TypeError(f"{name}: blocks must be a tensor, got {type(blocks).__name__}")
    block_bytes, elements, _, decode = BLOCK_TYPES[qtype]
    if blocks.dtype != torch.uint8 or blocks.dim() != 2 or blocks.shape[1] % block_bytes:
        raise ValueError(
            f"{name}: {qtype} blocks must be uint8 [N, a multiple of {block_bytes}], "
            f"got {blocks.dtype} {list(blocks.shape)}"
        )
    n, per_row = blocks.shape[0], blocks.shape[1] // block_bytes
    step = max(_CHUNK_ELEMENTS // max(per_row * elements, 1), 1)
    found: dict[str, Any] = {}
    for start in range(0, max(n, 1), step):
        rows = slice(start, start + step)
        codes, scales, offsets = decode(blocks[rows].unflatten(1, (per_row, block_bytes)))
        codes = codes.flatten(1)
        qweight = codes[:, 0::2] | codes[:, 1::2] << 4 if bits == 4 else codes
        decoded = {"qweight": qweight, "scales": _of_rows(scales)}
        if offsets is not None:
            decoded["zeros"] = _of_rows(offsets)
        for key, tensor in decoded.items():
            if key not in found:
                found[key] = tensor.new_empty(n, *tensor.shape[1:])
            found[key][rows] = tensor
    found["kind"] = "offset" if "zeros" in found else "symmetric"
    return found | ({"in_features": per_row * elements} if bits == 4 else {})
