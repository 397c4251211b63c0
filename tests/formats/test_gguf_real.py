"""Files that llama.cpp's own quantiser made, against its own dequantisation.

Some of its blocks lie in tests/data, so that every type is compared everywhere; the rest needs a package.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import gguf
import pytest
import torch

from qops.formats.gguf.blocks import BLOCK_TYPES
from qops.formats.gguf.file import GGUFFile
from qops.models import dense_model, load_model
from qops.testing import assert_bitwise
from qops.weights import Int4Weight, Int8Weight
from tests.support.models import llama_quantize
from tests.support.models.gguf_blocks import TYPES, dequantised, random_blocks

FIXTURE = Path(__file__).parents[1] / "data" / "gguf_blocks.gguf"


def read(blocks: torch.Tensor, kind: str) -> torch.Tensor:
    return (Int4Weight if BLOCK_TYPES[kind].bits == 4 else Int8Weight).from_gguf(blocks, kind).dequantize()


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_of_the_fixture_are_exact(kind):
    file = gguf.GGUFReader(FIXTURE)
    (blocks,) = (torch.from_numpy(t.data.copy()) for t in file.tensors if t.name == kind)
    found = read(blocks, kind)
    assert found.std() > 0.01
    assert_bitwise(found, dequantised(blocks, kind), kind)
    digest = file.fields[f"sha256.{kind}"].contents()
    assert hashlib.sha256(found.numpy().tobytes()).hexdigest() == digest  # of what libggml makes of it


needs_llama_quantize = pytest.mark.skipif(llama_quantize.missing() is not None, reason=str(llama_quantize.missing()))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return llama_quantize.seeded_file(tmp_path_factory.mktemp("seeded") / "f32.gguf")


@needs_llama_quantize
@pytest.mark.parametrize("kind", TYPES)
def test_random_blocks_are_what_libggml_makes_of_them(kind):
    for seed in range(3):
        blocks = random_blocks(kind, 64, 4096, seed)
        assert_bitwise(read(blocks, kind), llama_quantize.dequantised_by_libggml(blocks, kind), kind)


@needs_llama_quantize
@pytest.mark.parametrize("file_type", llama_quantize.FILE_TYPES)
def test_files_of_llama_quantize(file_type, source, tmp_path):
    path = llama_quantize.quantise(source, tmp_path / "m.gguf", file_type)
    tensors = llama_quantize.tensors_of(path)
    kinds = {kind for kind, _ in tensors.values()} - {"F32"}
    assert kinds == llama_quantize.FILE_TYPES[file_type]
    opened, dense = GGUFFile(path), {}
    for name, (kind, rows) in tensors.items():
        if kind != "F32":
            dense[name] = llama_quantize.dequantised_by_libggml(rows, kind)
            assert_bitwise(read(rows, kind), dense[name], name)
    assert_bitwise(opened.weight("lm_head").dequantize(), dense["output.weight"])
    assert_bitwise(opened.weight("model.layers.1.mlp.down_proj").dequantize(), dense["blk.1.ffn_down.weight"])

    model = load_model(path, torch.float32)
    ids = torch.randint(0, llama_quantize.VOCAB, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = model(ids).logits, dense_model(model, torch.float32)(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=0)


@needs_llama_quantize
@pytest.mark.parametrize("file_type", ["IQ4_XS", "IQ4_NL", "Q6_0", "IQ4_K"])
def test_other_types_of_llama_quantize_are_refused_by_name(file_type, source, tmp_path):
    path = llama_quantize.quantise(source, tmp_path / "m.gguf", file_type, "--pure")
    with pytest.raises(ValueError, match=rf"m\.gguf: .*tensor \S+ has type {file_type}, supported"):
        GGUFFile(path)
