"""Integers into the tensors of a format, by its written definition: one code after the other, as slowly as that is."""

from __future__ import annotations

import torch
from torch import Tensor


def words(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Codes into int32, lowest bits first, neighbours along ``dim``."""
    in_word = 32 // bits
    codes = codes.long().movedim(dim, -1)
    codes = codes.reshape(*codes.shape[:-1], codes.shape[-1] // in_word, in_word)
    packed = sum(codes[..., i] << (bits * i) for i in range(in_word))
    assert isinstance(packed, Tensor)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed)
    return packed.to(torch.int32).movedim(-1, dim).contiguous()


def gptq(
    codes: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor | None = None, *, bits: int = 4, version: int = 1
) -> dict[str, Tensor]:
    """``codes`` and ``zeros`` [N, K] and [N, G], of version 1 as GPTQModel subtracts: from a word at once."""
    qzeros = words(zeros.T, bits, 1)
    if version == 1:
        qzeros = (qzeros.long() - sum(1 << shift for shift in range(0, 32, bits))).to(torch.int32)
    tensors = {"qweight": words(codes.T, bits, 0), "qzeros": qzeros, "scales": scales.T.contiguous()}
    return tensors | ({} if g_idx is None else {"g_idx": g_idx.int()})


def awq_gemm(codes: Tensor, zeros: Tensor | None, scales: Tensor) -> dict[str, Tensor]:
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(matrix: Tensor) -> Tensor:  # [A, N] -> [A, N/8]: nibble i is column order[i]
        return words(matrix.view(matrix.shape[0], -1, 8)[..., order].flatten(1), 4, 1)

    tensors = {"qweight": packed(codes.T.contiguous()), "scales": scales.T.contiguous()}
    return tensors if zeros is None else tensors | {"qzeros": packed(zeros.T.contiguous())}


def awq_width(columns: int, group_size: int) -> int:
    """Words of zero points a row, padded as AutoAWQ pads."""
    multiple = {32: 4, 64: 2}.get(group_size, 1)
    width = -(-(columns // group_size) // 8)
    return -(-width // multiple) * multiple


def awq_gemv(codes: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    groups = scales.shape[1]
    padding = 8 * awq_width(codes.shape[1], codes.shape[1] // groups) - groups
    pad = torch.nn.functional.pad
    return {
        "qweight": words(codes, 4, 1),
        "qzeros": words(pad(zeros, (0, padding)), 4, 1),
        "scales": pad(scales, (0, padding)),
    }


def awq_gemv_fast(codes: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    (rows, columns), groups = codes.shape, scales.shape[1]
    packed = torch.zeros(rows // 4, columns, dtype=torch.int64)
    for k in range(columns):
        # In 32 columns [4, 4, 2] become [4, 2, 4], first and second dimension exchanged.
        block, inside = divmod(k, 32)
        j, i, last = inside // 8, inside // 2 % 4, inside % 2
        shuffled = 32 * block + 8 * i + 4 * last + j
        chunk, column = divmod(shuffled, 64)
        for row in range(4):
            word, nibble = divmod(row * 64 + column, 4)
            packed[:, 64 * chunk + word] |= codes[row::4, k].long() << (4 * nibble)
    padding = 8 * awq_width(columns, columns // groups) - groups
    scaled = -(scales.float() * zeros.float()).to(scales.dtype)
    pad = torch.nn.functional.pad
    return {
        "qweight": torch.where(packed >= 2**15, packed - 2**16, packed).to(torch.int16),
        "qzeros": pad(scaled, (0, padding)).T.contiguous(),
        "scales": pad(scales, (0, padding)).T.contiguous(),
    }


def compressed_tensors(
    codes: Tensor, zeros: Tensor | None, scales: Tensor, g_idx: Tensor | None = None, *, bits: int = 4
) -> dict[str, Tensor]:
    """Of pack-quantized; unsigned ``codes`` and ``zeros``, as they are stored."""
    tensors = {
        "weight_packed": words(codes, bits, 1),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if zeros is not None:
        tensors["weight_zero_point"] = words(zeros, bits, 0)
    return tensors | ({} if g_idx is None else {"weight_g_idx": g_idx.int()})
