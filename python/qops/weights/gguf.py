"""Blocks of GGUF as the canonical tensors of a weight; every stored code, scale and offset keeps its value.

A block holds 32 consecutive elements of one row:

    Q4_0   fp16 d, 16 bytes               w = d * (q - 8)     Int4Weight, kind "symmetric"
    Q4_1   fp16 d, fp16 m, 16 bytes       w = d * q + m       Int4Weight, kind "offset"
    Q8_0   fp16 d, 32 int8                w = d * q           Int8Weight

Byte i of a 4-bit block holds element i in its low and element i + 16 in its high nibble; the canonical `qweight`
holds elements 2 i and 2 i + 1 in byte i.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 32
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


def _split(name: str, blocks: Tensor, qtype: str, types: tuple[str, ...]) -> Tensor:
    """uint8 [N, bytes per row] -> [N, K/32, bytes per block]."""
    if qtype not in types:
        raise ValueError(f"{name}: qtype must be {' or '.join(types)}, got {qtype!r}")
    block_bytes = BLOCK_BYTES[qtype]
    if blocks.dtype != torch.uint8 or blocks.dim() != 2 or blocks.shape[1] % block_bytes:
        raise ValueError(
            f"{name}: {qtype} blocks must be uint8 [N, a multiple of {block_bytes}], "
            f"got {blocks.dtype} {list(blocks.shape)}"
        )
    return blocks.reshape(blocks.shape[0], -1, block_bytes)


def _half(blocks: Tensor, offset: int) -> Tensor:
    """The fp16 number at byte `offset` of each block, [N, K/32]."""
    return blocks[..., offset : offset + 2].contiguous().view(torch.float16).squeeze(-1)


def int4_tensors(name: str, blocks: Tensor, qtype: str) -> dict[str, Any]:
    """The arguments of `Int4Weight.from_canonical`. A Q4_1 offset is widened there, to a float32 that holds it."""
    per_block = _split(name, blocks, qtype, ("Q4_0", "Q4_1"))
    nibbles = per_block[..., -BLOCK // 2 :]
    codes = torch.cat([nibbles & 0x0F, nibbles >> 4], dim=-1)
    qweight = (codes[..., 0::2] | (codes[..., 1::2] << 4)).reshape(blocks.shape[0], -1)
    found = {"qweight": qweight, "scales": _half(per_block, 0), "in_features": 2 * qweight.shape[1]}
    return found | ({"kind": "symmetric"} if qtype == "Q4_0" else {"kind": "offset", "zeros": _half(per_block, 2)})


def int8_tensors(name: str, blocks: Tensor, qtype: str) -> dict[str, Any]:
    """The arguments of `Int8Weight.from_canonical`."""
    per_block = _split(name, blocks, qtype, ("Q8_0",))
    qweight = per_block[..., 2:].contiguous().view(torch.int8).reshape(blocks.shape[0], -1)
    return {"qweight": qweight, "scales": _half(per_block, 0)}
