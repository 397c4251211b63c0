"""Every block type, bit for bit what the gguf package makes of it: values and the signs of zeros."""

from __future__ import annotations

import struct
from typing import Any

import gguf
import pytest
import torch

from qops.formats.gguf import blocks as gguf_blocks
from qops.formats.gguf.blocks import BLOCK_TYPES, dequantize, int4_weight, int8_weight
from qops.testing import assert_bitwise
from qops.weights import Int4Weight, Int8Weight
from tests.support.formats.checkpoints import checkpoint
from tests.support.models.gguf_blocks import HALVES, TYPES, dequantised, random_blocks, sizes


def read(blocks: torch.Tensor, kind: str) -> Int4Weight | Int8Weight:
    return (Int4Weight if BLOCK_TYPES[kind].bits == 4 else Int8Weight).from_gguf(blocks, kind)


def test_types_are_those_of_the_gguf_package():
    assert set(BLOCK_TYPES) == set(TYPES)
    for kind in TYPES:
        assert (BLOCK_TYPES[kind].elements, BLOCK_TYPES[kind].bytes) == sizes(kind)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("rows", "columns"), [(8, 256), (24, 768), (40, 2048), (256, 2560)])
def test_blocks_are_exact(kind, rows, columns):
    for seed in range(4):
        blocks = random_blocks(kind, rows, columns, seed)
        weight = read(blocks, kind)
        assert (weight.out_features, weight.in_features) == (rows, columns)
        assert weight.group_size == (16 if kind in ("Q2_K", "Q3_K", "Q6_K") else 32)
        assert weight.is_packed
        assert_bitwise(weight.dequantize(), dequantised(blocks, kind), kind)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("rows", [0, 1, 3, 8, 9])
def test_any_number_of_rows_becomes_dense(kind, rows):
    blocks = random_blocks(kind, rows, 512, seed=rows)
    found = dequantize(blocks, kind)
    assert found.shape == (rows, 512) and found.dtype == torch.float32
    if rows:
        assert_bitwise(found, dequantised(blocks, kind), kind)


@pytest.mark.parametrize("kind", TYPES)
def test_chunks_of_rows_are_exact(kind, monkeypatch):
    blocks = random_blocks(kind, 40, 512, seed=5)
    whole = read(blocks, kind).canonical()
    monkeypatch.setattr(gguf_blocks, "_CHUNK_ELEMENTS", 3 * 512)
    for name, tensor in read(blocks, kind).canonical().items():
        assert_bitwise(tensor, whole[name], name)


def test_decoding_holds_few_temporaries():
    # Of Q6_K, whose codes and scales take 1.25 bytes an element.
    blocks = random_blocks("Q4_K", 8, 256, seed=0).repeat(512, 16)
    largest = []

    def decode(chunk):
        largest.append(chunk.numel())
        return BLOCK_TYPES["Q4_K"].decode(chunk)

    types = dict(BLOCK_TYPES, Q4_K=BLOCK_TYPES["Q4_K"]._replace(decode=decode))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_blocks, "BLOCK_TYPES", types)
        int4_weight(blocks, "Q4_K")
    assert len(largest) > 8 and max(largest) <= 1 << 20


def test_q4_nibbles_are_halves_of_a_block():
    # Byte i holds element i low and i + 16 high: with these bytes the elements count 0 ... 15, 15 ... 0.
    codes = bytes(i | (15 - i) << 4 for i in range(16))
    block = struct.pack("<e", 1.0) + codes
    canonical = Int4Weight.from_gguf(torch.tensor(list(block), dtype=torch.uint8).repeat(8, 1), "Q4_0").canonical()
    elements = [*range(16), *range(15, -1, -1)]
    assert canonical["qweight"][0].tolist() == [elements[i] | elements[i + 1] << 4 for i in range(0, 32, 2)]


def test_q8_0_codes_reach_minus_128():
    block = struct.pack("<e", 0.5) + bytes([128]) * 32
    weight = Int8Weight.from_gguf(torch.tensor(list(block), dtype=torch.uint8).repeat(8, 1))
    assert weight.canonical()["qweight"].unique().tolist() == [-128]
    assert weight.dequantize().unique().tolist() == [-64.0]


@pytest.mark.parametrize("kind", TYPES)
def test_numbers_keep_their_stored_precision(kind):
    blocks = random_blocks(kind, 16, 256, seed=1)
    canonical = read(blocks, kind).canonical()
    two_levels = kind.endswith("_K")
    per_block = blocks.view(16, 1 if two_levels else 8, -1)
    halves = [per_block[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1) for at in HALVES[kind]]
    if two_levels:
        halves[1:] = [-dmin for dmin in halves[1:]]
    for name, stored in zip(("scales", "zeros"), halves, strict=False):
        numbers = canonical[name]
        assert numbers.dtype == (torch.int8 if two_levels else torch.float16)
        found = numbers[..., :2].contiguous().view(torch.float16).squeeze(-1) if two_levels else numbers
        assert_bitwise(found, stored)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q2_K", "Q3_K", "Q6_K"])
def test_scales_of_two_levels_are_those_of_the_block(kind):
    """Exactly the products that ggml computes in float32, and no more bytes than a code for each group."""
    weight = read(random_blocks(kind, 16, 512, seed=3), kind)
    assert weight.has_levels and weight.scales.shape[2] == 2 + 256 // weight.group_size
    wide = weight.widened()
    assert wide.scale_dtype == torch.float32 and weight.scales.nbytes < 0.36 * wide.scales.nbytes
    assert_bitwise(wide.dequantize(), weight.dequantize())


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00, 0xFDFF])
def test_infinity_and_nan_are_refused(kind, bits):
    for at in HALVES[kind]:
        blocks = random_blocks(kind, 8, 256, seed=2)
        blocks[3, at], blocks[3, at + 1] = bits & 255, bits >> 8
        for convert in (read, dequantize):
            with pytest.raises(ValueError, match=r"(scales|zeros) must be finite"):
                convert(blocks, kind)


@pytest.mark.parametrize("kind", TYPES)
def test_bad_blocks_are_refused(kind):
    size = BLOCK_TYPES[kind].bytes
    for blocks in (
        torch.zeros(8, size + 1, dtype=torch.uint8),
        torch.zeros(8, size, dtype=torch.int8),
        torch.zeros(8 * size, dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match=rf"{kind} blocks must be uint8 \[N, a multiple of {size}\]"):
            read(blocks, kind)
    array: Any = torch.zeros(8, size, dtype=torch.uint8).numpy()
    with pytest.raises(TypeError, match="from_gguf: blocks must be a tensor, got ndarray"):
        read(array, kind)


@pytest.mark.parametrize("kind", ["Q6_0", "IQ4_NL", "MXFP4", "F16", ""])
def test_other_types_are_refused(kind):
    blocks = torch.zeros(8, 18, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"Int4Weight.from_gguf: qtype must be one of Q4_0, .*, got '{kind}'"):
        int4_weight(blocks, kind)
    with pytest.raises(ValueError, match=rf"Int8Weight.from_gguf: qtype must be one of Q5_0, .*, got '{kind}'"):
        int8_weight(blocks, kind)


def test_the_producers_fixture_is_exact():
    from safetensors.torch import load_file

    fixture = checkpoint("gguf_q4_0_q4_1_q8_0")
    produced = load_file(fixture / "tensors.safetensors")
    stored = {t.name: t.data for t in gguf.GGUFReader(fixture / "tiny.gguf").tensors}
    for kind in ("Q4_0", "Q4_1", "Q8_0"):
        blocks = torch.from_numpy(stored[f"w.{kind}"].copy())
        assert torch.equal(blocks, produced[f"{kind}.raw"])
        assert_bitwise(read(blocks, kind).dequantize(), produced[f"{kind}.dequant"])
