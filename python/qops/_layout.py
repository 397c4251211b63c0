"""How weights are packed: strips of rows, columns by device; groups, and scales and zeros in strips."""

from __future__ import annotations

import torch
from torch import Tensor

STRIP_ROWS = 16
# Quantising and dequantising hold a few float64 temporaries of this many elements: 1 MiB each, inside L2.
CHUNK_ELEMENTS = 1 << 17


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


def chunk_rows(in_features: int) -> int:
    """Rows that make about CHUNK_ELEMENTS, in whole strips."""
    return max(CHUNK_ELEMENTS // max(in_features, 1) // STRIP_ROWS, 1) * STRIP_ROWS


def into_strips(rows: Tensor, paired: bool) -> Tensor:
    """[N, C] -> [S, C, 16], zeros for the rows that fill the last strip; always a copy. Paired: rows r and r + 8 of a
    strip side by side."""
    n, columns = rows.shape
    strips = strips_of(n)
    padded = rows.new_zeros(strips * STRIP_ROWS, columns)
    padded[:n] = rows
    if paired:
        return padded.view(strips, 2, STRIP_ROWS // 2, columns).permute(0, 3, 2, 1).flatten(2).contiguous()
    return padded.view(strips, STRIP_ROWS, columns).transpose(1, 2).contiguous()


def out_of_strips(strips: Tensor, n: int, paired: bool) -> Tensor:
    """[S, C, 16] -> [N, C]; always a copy, of N rows alone."""
    if paired:
        strips = strips.unflatten(2, (STRIP_ROWS // 2, 2)).transpose(2, 3).flatten(2)
    return strips.transpose(1, 2).flatten(0, 1)[:n].clone(memory_format=torch.contiguous_format)
