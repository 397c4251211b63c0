"""How weights are packed: strips of rows, columns by device; groups, and scales and zeros in strips."""

from __future__ import annotations

import torch
from torch import Tensor

STRIP_ROWS = 16
# Quantising and dequantising hold a few float64 temporaries of this many elements: 1 MiB each, inside L2.
CHUNK_ELEMENTS = 1 << 17

# Scales of two levels: so many columns share a float16, which each group multiplies with a code (csrc/kernels.h).
SUPER_COLUMNS = 256
LEVEL_GROUPS = (16, 32, 64, 128)
LEVELS_DTYPE = torch.int8
# Of rows of int8. Sums of products stay in int32: 128 * 128 * K, and with zero points in -128 ... 127 255 * 128 * K.
MAX_INT8_K, MAX_INT8_K_WITH_ZERO_POINT = 131071, 65793
# Of 4-bit weights those of 16 * 128 do, and the sum of a group's q is exact in float32.
MAX_INT4_INT8_K, MAX_INT4_INT8_GROUP = 1048575, 131071


def strips_of(n: int) -> int:
    return (n + STRIP_ROWS - 1) // STRIP_ROWS


def has_gpu_layout(device: torch.device) -> bool:
    """Whether weights lie there as csrc/int4_layout.h and int8_layout.h say, else as csrc/cpu/weight_pack.cpp does."""
    return device.type == "cuda"


def layout_of(device: torch.device) -> str:
    """How weights are packed there, by kind of device and version: `kLayout` of csrc/binding/device.h."""
    return "cuda 1" if has_gpu_layout(device) else "cpu 1"


def column_step(device: torch.device) -> int:
    """What the columns of a packed weight are a multiple of."""
    return 64 if has_gpu_layout(device) else 8


def stored_columns(k: int, device: torch.device) -> int:
    """Columns that a strip holds for K of them."""
    step = column_step(device)
    return (k + step - 1) // step * step


def group_count(in_features: int, group_size: int) -> int:
    return in_features // group_size if group_size else 0


def levels_shape(in_features: int, group_size: int) -> tuple[int, int]:
    """Of a row's scales of two levels: bytes of a float16 and the codes of its groups, for each SUPER_COLUMNS."""
    return in_features // SUPER_COLUMNS, 2 + SUPER_COLUMNS // group_size


def chunk_rows(in_features: int) -> int:
    """Rows that make about CHUNK_ELEMENTS, in whole strips."""
    return max(CHUNK_ELEMENTS // max(in_features, 1) // STRIP_ROWS, 1) * STRIP_ROWS


def _fill_strips(rows: Tensor) -> Tensor:
    filled = rows.new_zeros(strips_of(len(rows)) * STRIP_ROWS, *rows.shape[1:])
    filled[: len(rows)] = rows
    return filled


def into_strips(rows: Tensor, paired: bool) -> Tensor:
    """[N, C] -> [S, C, 16], zeros for the rows that fill the last strip; always a copy. Paired: rows r and r + 8 of a
    strip side by side."""
    columns, strips = rows.shape[1], strips_of(len(rows))
    filled = _fill_strips(rows)
    if paired:
        return filled.view(strips, 2, STRIP_ROWS // 2, columns).permute(0, 3, 2, 1).flatten(2).contiguous()
    return filled.view(strips, STRIP_ROWS, columns).transpose(1, 2).contiguous()


def out_of_strips(strips: Tensor, n: int, paired: bool) -> Tensor:
    """[S, C, 16] -> [N, C]; always a copy, of N rows alone."""
    if paired:
        strips = strips.unflatten(2, (STRIP_ROWS // 2, 2)).transpose(2, 3).flatten(2)
    return strips.transpose(1, 2).flatten(0, 1)[:n].clone(memory_format=torch.contiguous_format)


def levels_into_strips(rows: Tensor) -> Tensor:
    """int8 [N, B, 2 + C], the bytes of a float16 and C codes, -> [S, B, 2 + C, 16]; always a copy."""
    strips = _fill_strips(rows).unflatten(0, (-1, STRIP_ROWS)).transpose(1, 2)
    halves = strips[..., :2].reshape(*strips.shape[:2], 2, STRIP_ROWS)  # 16 numbers side by side
    return torch.cat([halves, strips[..., 2:].transpose(2, 3)], dim=2)


def levels_out_of_strips(strips: Tensor, n: int) -> Tensor:
    """The inverse, of N rows alone; always a copy."""
    halves = strips[:, :, :2].reshape(*strips.shape[:2], STRIP_ROWS, 2)
    rows = torch.cat([halves, strips[:, :, 2:].transpose(2, 3)], dim=3)
    return rows.transpose(1, 2).flatten(0, 1)[:n].clone(memory_format=torch.contiguous_format)


def with_levels(halves: Tensor, codes: Tensor) -> Tensor:
    """float16 [..., B] and int8 [..., B, C] -> int8 [..., B, 2 + C]."""
    return torch.cat([halves.unsqueeze(-1).contiguous().view(LEVELS_DTYPE), codes], dim=-1)


def halves_of_levels(levels: Tensor) -> Tensor:
    """int8 [..., 2 + C] -> float16 [..., 1]."""
    return levels[..., :2].clone(memory_format=torch.contiguous_format).view(torch.float16)


def widen_levels(levels: Tensor) -> Tensor:
    """int8 [..., B, 2 + C] -> float32 [..., B C], exactly: 11 bits times 8."""
    return (halves_of_levels(levels).float() * levels[..., 2:].float()).flatten(-2)
