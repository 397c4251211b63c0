"""A quantised model on a GPU, and in the emulator, by the code path that it has on a CPU."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qops
from qops.models import quantize_model
from qops.nn import Int4Int8Linear, Int4Linear, Int8WeightOnlyLinear
from qops.testing import assert_bitwise, generator
from tests.support.cuda.cuda_backend import gpu
from tests.support.models.gguf_files import llama_file
from tests.support.models.layerwise import assert_layers_accurate, hidden_states

VOCAB = 96


def random_llama() -> LlamaForCausalLM:
    """Two layers, with sizes that are no multiples of a block of 64 columns or of a tile."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=96,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval().bfloat16()


def test_a_quantised_model_says_what_it_says_on_a_cpu(backend):
    """Each layer is as accurate as Transformers' own, for a prompt (tiled kernel) and for tokens (decode kernel)."""
    ids = torch.randint(3, VOCAB, (2, 20), generator=generator(1))
    more = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    want = quantize_model(random_llama(), qops.Int4(16)).generate(ids, **more)
    with gpu(backend):
        model = quantize_model(random_llama().to(backend.device), qops.Int4(16))
        assert sum(isinstance(module, Int4Linear) for module in model.modules()) >= 8
        assert model.qops_fusion.not_fused is None and "in float32" in model.qops_fusion.proof, model.qops_fusion
        ids = backend.on_device(ids)
        got = model.generate(ids, **more).cpu()
        assert_layers_accurate(model, ids)
        assert_layers_accurate(model, ids[:1, :3])
    assert torch.equal(got, want)


def test_every_layer_of_a_w4a8_model_has_the_bits_of_the_cpu(backend):
    """Norms and SiLU-mul hand it rows of int8."""
    here = quantize_model(random_llama(), qops.W4A8(16))
    with gpu(backend):
        there = quantize_model(random_llama().to(backend.device), qops.W4A8(16))
    assert sum(isinstance(module, Int4Int8Linear) for module in there.modules()) >= 8
    assert there.qops_fusion.not_fused is None, there.qops_fusion
    for tokens in (1, 9, 33):
        ids = torch.arange(2 * tokens).view(2, tokens) * 7 % VOCAB
        want = [*hidden_states(here, ids), here(ids).logits]
        with gpu(backend):
            ids = backend.on_device(ids)
            got = [*hidden_states(there, ids), there(ids).logits]
        if backend.device == "cpu":  # a GPU's attention is torch's own
            for index, (a, b) in enumerate(zip(got, want, strict=True)):
                assert_bitwise(a, b, f"{tokens} tokens, layer {index}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("weights", "output"), [("Q8_0", "Q8_0"), ("Q5_1", "Q4_1")])
def test_a_file_with_weights_of_8_bits_runs_on_a_gpu(backend, tmp_path, weights, output, dtype):
    """Its output layer computes in float32, whatever the others do."""
    path = llama_file(weights=weights, table="Q8_0", output=output).write(tmp_path / "model.gguf")
    here = qops.load_model(path, dtype)
    prompts = [torch.arange(2 * tokens).view(2, tokens) * 7 % here.config.vocab_size for tokens in (3, 20)]
    wanted = [here(ids).logits for ids in prompts]
    with gpu(backend):
        there = qops.load_model(path, dtype, device=backend.device)
        assert there.qops_fusion.not_fused is None and "in float32" in there.qops_fusion.proof, there.qops_fusion
        kinds = {type(module) for module in there.modules()}
        assert Int8WeightOnlyLinear in kinds and there.lm_head.float32_output
        for ids, want in zip(map(backend.on_device, prompts), wanted, strict=True):
            assert_layers_accurate(there, ids)
            got = there(ids).logits.cpu()
            assert got.dtype == torch.float32
            error = (got - want).norm(dim=-1) / want.norm(dim=-1)
            assert error.max() < (2e-5 if dtype == torch.float32 else 4e-2), error
