"""Codes in 32-bit words, lowest bits first: how GPTQ, AWQ and compressed-tensors pack them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qops.weights import Int8Weight
from qops.weights.requirements import require_dtype, require_matrix, require_tensor


def require_words(name: str, label: str, words: Any) -> None:
    """Raises unless it is a matrix of int32."""
    require_matrix(name, label, words)
    require_dtype(name, label, words, torch.int32)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Codes, one in a byte, of which neighbours along a row share a word.

    Args:
        words: int32 [A, B].
        bits: 4 or 8, of a code.

    Returns:
        uint8 [A, B * 32 / bits].
    """
    # Bytes from the lowest bits on, on a little-endian machine: a quarter of what shifted words would move.
    codes = words.contiguous().view(torch.uint8)
    return codes if bits == 8 else torch.stack((codes & 15, codes >> 4), -1).flatten(1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`unpack`, on columns: uint8 [A, B] -> int32 [ceil(A * bits / 32), B], zeros at the end."""
    in_word = 32 // bits
    rows = nn.functional.pad(codes.int(), (0, 0, 0, -codes.shape[0] % in_word)).unflatten(0, (-1, in_word))
    words = torch.zeros_like(rows[:, 0])
    for index in range(in_word):
        words |= rows[:, index] << (bits * index)
    return words


def order_of_groups(name: str, g_idx: Tensor, in_features: int, groups: int) -> Tensor | None:
    """Which column of w each stored column is, where columns are stored group by group.

    Args:
        g_idx: [K], the group of each column of w.
        in_features: K.
        groups: how many there are.

    Returns:
        int32 [K]; None where the columns of a group are neighbours in their order.

    Raises:
        ValueError: not K groups; one out of range; groups of different sizes.
    """
    require_tensor(name, "g_idx", g_idx)
    if list(g_idx.shape) != [in_features] or g_idx.is_floating_point():
        raise ValueError(f"{name}: g_idx must be integers [K] = [{in_features}], got {g_idx.dtype} {list(g_idx.shape)}")
    if in_features == 0:
        return None
    low, high = (int(value) for value in torch.aminmax(g_idx))
    if low < 0 or high >= groups:
        raise ValueError(f"{name}: g_idx must be in 0 ... {groups - 1}, got {low} ... {high}")
    sizes = torch.bincount(g_idx.long(), minlength=groups)
    if int(sizes.min()) != int(sizes.max()):
        raise ValueError(
            f"{name}: g_idx must give each of {groups} groups {in_features // groups} columns, "
            f"got {int(sizes.min())} to {int(sizes.max())}"
        )
    perm = torch.sort(g_idx, stable=True).indices.int()
    return None if torch.equal(perm, torch.arange(in_features, dtype=torch.int32, device=perm.device)) else perm


def int8_from_unsigned(
    name: str, codes: Tensor, zeros: Tensor | None, scales: Tensor, perm: Tensor | None, *, pack: bool
) -> Int8Weight:
    """``w = s * (q - z)`` with q and z in 0 ... 255, exactly.

    Args:
        codes: uint8 [N, K].
        zeros: uint8 [N, K/G]; None for 128.
        scales: [N, K/G].
        perm: as in :meth:`Int8Weight.from_canonical`.

    Raises:
        ValueError: an offset, ``s * (128 - z)``, that no float32 holds.
    """
    codes = (codes ^ 128).view(torch.int8)
    if zeros is None or bool((zeros == 128).all()):
        return Int8Weight.from_canonical(codes, scales, perm=perm, pack=pack)
    # What rounding.move_zeros_to_offsets does of any zeros; here every code moves alike, and needs no second look.
    exact = scales.double() * (128 - zeros.double())
    offsets = exact.float()
    if bool(((offsets != exact) & exact.isfinite()).any()):
        raise ValueError(f"{name}: scale * (128 - zero) must fit in float32, for the weight to be exact")
    return Int8Weight.from_canonical(codes, scales, kind="offset", zeros=offsets, perm=perm, pack=pack)
