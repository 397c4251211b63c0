"""Fused models in Transformers' ways to generate: paged caches, attention functions of others, unknown keywords."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qops import quantize_model
from qops.models.replacement import is_fused
from tests.support.models.families import FUSED, IDS, PARTLY, random_model

PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12]]


def greedy(tokens):
    return GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral"])
def test_continuous_batching_gives_the_tokens_of_generate(family):
    # Its thread is not in inference mode, so nothing that it writes may be of one.
    with torch.inference_mode(False), torch.no_grad():
        model = quantize_model(random_model(family))
        assert is_fused(model)
        found = continuous(model)
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        wanted = model.generate(torch.tensor([prompt]), generation_config=greedy(6))[0, len(prompt) :]
        assert tokens == wanted.tolist() and len(tokens) == 6


def continuous(model):
    # By default Transformers takes what memory there is.
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    outputs = model.generate_batch(
        inputs=PROMPTS, generation_config=greedy(6), continuous_batching_config=small, progress_bar=False
    )
    assert not any(output.error for output in outputs.values()), outputs
    return [output.generated_tokens for output in outputs.values()]


@pytest.mark.parametrize("family", [*FUSED, *PARTLY])
def test_generate_gives_the_tokens_of_transformers_layers(family):
    fused, alone = (quantize_model(random_model(family), fuse=fuse) for fuse in (True, False))
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    wanted = alone.generate(IDS, attention_mask=mask, generation_config=greedy(12))
    assert torch.equal(fused.generate(IDS, attention_mask=mask, generation_config=greedy(12)), wanted)
    for changes in ({"cache_implementation": "static"}, {"num_beams": 2}, {"use_cache": False}):
        both = [
            model.generate(IDS, generation_config=GenerationConfig(**greedy(6).to_diff_dict() | changes))
            for model in (fused, alone)
        ]
        assert torch.equal(*both), changes


def recorder(calls):
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module, query, key, value, attention_mask, **kwargs):
        calls.append((query.shape[2], kwargs.get("mark"), kwargs.get("sliding_window")))
        kwargs.pop("mark", None)
        return plain(module, query, key, value, attention_mask, **kwargs)

    return attention


@pytest.mark.parametrize("tokens", [1, 3])
def test_an_attention_function_of_somebody_else_is_called(tokens, monkeypatch):
    """Registered in the place of Transformers' own, whose shortcut for one token then is none."""
    model = quantize_model(random_model("mistral"))
    wanted = model(IDS[:1, :tokens]).logits
    calls = []
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", recorder(calls))
    found = model(IDS[:1, :tokens]).logits
    assert calls == 3 * [(tokens, None, 4)]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3])
def test_unknown_keywords_reach_the_attention_function(tokens, monkeypatch):
    model = quantize_model(random_model("llama"))
    calls = []
    # Not in the place of "sdpa": with its own function the shortcut must stand back for the keyword alone.
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setattr("qops.models.decoder.ALL_ATTENTION_FUNCTIONS", Recording(original, calls))
    model(IDS[:1, :tokens], mark="kept")
    assert calls == 3 * [(tokens, "kept")]


class Recording:
    def __init__(self, original, calls):
        self.original, self.calls = original, calls

    def __getitem__(self, name):
        return self.original

    def get_interface(self, name, default):
        def attention(module, query, *rest, mark=None, **kwargs):
            self.calls.append((query.shape[2], mark))
            return self.original(module, query, *rest, **kwargs)

        return attention


def test_dropout_of_attention_is_trainings_alone():
    model = quantize_model(random_model("llama", attention_dropout=0.5))
    for ids in (IDS, IDS[:1, :1]):
        wanted = model(ids).logits
        assert torch.equal(model(ids).logits, wanted)
        model.train()
        # One token has one weight a head to lose: some of the draws lose another one.
        draws = [model(ids).logits for _ in range(8)]
        assert any(not torch.equal(draw, wanted) for draw in draws)
        assert any(not torch.equal(draw, draws[0]) for draw in draws)
        model.eval()
        assert torch.equal(model(ids).logits, wanted)
