"""Random blocks of every type of GGUF that qops reads."""

from __future__ import annotations

import gguf
import numpy as np
import torch

# Where the float16 numbers of a block stand.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
TYPES = tuple(HALVES)


def sizes(kind: str) -> tuple[int, int]:
    """Elements and bytes of a block, by the gguf package."""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]


def random_blocks(kind: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    """Every code and small scale; float16 numbers over their whole range: subnormal, huge, negative, zeros of signs."""
    rng = np.random.default_rng(seed)
    elements, size = sizes(kind)
    blocks = rng.integers(0, 256, (rows, columns // elements, size), dtype=np.uint8)
    for at in HALVES[kind]:
        numbers = rng.integers(0, 1 << 16, blocks.shape[:2], dtype=np.uint16)
        # An exponent of all ones is infinity or NaN; of all zeros, a subnormal number.
        numbers[(numbers & 0x7C00) == 0x7C00] &= 0x8000
        numbers[rng.random(numbers.shape) < 0.1] &= 0x83FF
        numbers[rng.random(numbers.shape) < 0.1] &= 0x8000
        blocks[..., at : at + 2] = numbers[..., None].view(np.uint8)
    blocks[rng.random(blocks.shape[:2]) < 0.05, max(HALVES[kind]) + 2 :] = 128
    return torch.from_numpy(blocks.reshape(rows, columns // elements * size))


def dequantised(blocks: torch.Tensor, kind: str) -> torch.Tensor:
    """By the gguf package."""
    values = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(values.astype(np.float32))


def modest_blocks(kind: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    """Blocks whose values are about as large as a model's weights: 1 / sqrt(columns)."""
    blocks = random_blocks(kind, rows, columns, seed).numpy().copy()
    elements, size = sizes(kind)
    per_block = blocks.reshape(rows, columns // elements, size)
    rng = np.random.default_rng(seed)
    for at in HALVES[kind]:
        per_block[..., at : at + 2] = np.ones((*per_block.shape[:2], 1), np.float16).view(np.uint8)
    largest = dequantised(torch.from_numpy(blocks), kind).std() * columns**0.5
    numbers = (rng.uniform(0.5, 1.5, per_block.shape[:2]) / float(largest)).astype(np.float16)
    for at in HALVES[kind]:
        per_block[..., at : at + 2] = numbers[..., None].view(np.uint8)
    return torch.from_numpy(blocks)
