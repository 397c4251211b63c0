"""What the demo measures: decoding, rates, accuracy and tables, on tiny random models against direct computations."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from qops.demo import compare


@pytest.fixture(scope="module")
def pair():
    """Two tiny random models that differ a little, as a quantised and a dense one would."""
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    dense = LlamaForCausalLM(config).eval()
    ours = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for a, b in zip(ours.parameters(), dense.parameters(), strict=True):
            a.copy_(b + 0.03 * torch.randn_like(b))
    return ours, dense


def random_ids(count: int) -> list[int]:
    return torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def test_generate_equals_full_forwards(pair):
    model = pair[0]
    ids = random_ids(7)
    stream = compare.generate(model, ids)
    for _ in range(12):
        expected = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        assert next(stream) == expected
        ids.append(expected)


def test_generate_leaves_inference_mode_alone(pair):
    with torch.inference_mode(False):
        stream = compare.generate(pair[0], random_ids(3))
        next(stream)
        assert not torch.is_inference_mode_enabled()


def test_sampler_is_greedy_at_zero_and_reproducible_above():
    logits = torch.tensor([0.0, 2.0, 1.9, -5.0])
    assert {compare.sampler(0.0, seed)(logits) for seed in range(5)} == {1}

    def draws(seed: int) -> list[int]:
        draw = compare.sampler(1.0, seed)
        return [draw(logits) for _ in range(200)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert 60 < draws(3).count(1) < 140  # p = 0.478


@pytest.mark.parametrize("tokens", [2, 64, 65, 66, 200])
def test_accuracy_equals_a_direct_computation(pair, tokens):
    ours, dense = pair
    ids = random_ids(tokens)
    half_top = (torch.full((tokens,), -1), dense(input_ids=torch.tensor([ids])).logits[0].argmax(-1))
    half_top[1][0] += 1
    result = compare.accuracy(ids, lambda: ours, lambda: dense, half_top)

    a, b = (model(input_ids=torch.tensor([ids])).logits[0].double() for model in pair)
    for logits, shown in ((a, result.perplexity_ours), (b, result.perplexity_dense)):
        likelihoods = [torch.softmax(logits[t], -1)[ids[t + 1]].item() for t in range(tokens - 1)]
        assert shown == pytest.approx(math.prod(p ** (-1 / (tokens - 1)) for p in likelihoods), rel=1e-9)
    assert result.max_difference == (a - b).abs().max().item()
    assert result.agreeing == sum(int(x.argmax()) == int(y.argmax()) for x, y in zip(a, b, strict=True))
    assert 0 < result.agreeing < tokens or tokens == 2
    assert (result.tokens, result.flips_ours, result.flips_dense) == (tokens, tokens, 1)


def test_a_nan_logit_shows():
    broken = torch.zeros(130, 5)
    broken[129, 3] = float("nan")
    assert math.isnan(compare.largest_difference(broken, torch.zeros(130, 5)))


def test_float32_has_no_flips(pair):
    result = compare.accuracy(random_ids(5), lambda: pair[0], lambda: pair[1], None)
    assert result.flips_ours is None
    assert "flips" not in compare.accuracy_table("fp32", result)


def test_weight_bytes_count_tied_weights_once():
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    tied = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "tie_word_embeddings": True}))
    untied = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "tie_word_embeddings": False}))
    assert compare.weight_bytes(untied) - compare.weight_bytes(tied) == 64 * 16 * 4
    expected = sum(p.numel() * 4 for p in untied.parameters()) + sum(b.numel() * 4 for b in untied.buffers())
    assert compare.weight_bytes(untied) <= expected
    assert compare.weight_bytes(untied) >= sum(p.numel() * 4 for p in untied.parameters())


def test_rounds_interleave_after_a_warm_up():
    calls: list[str] = []

    def provider(name: str, values: list[float]):
        def call() -> float:
            calls.append(name)
            return values.pop(0)

        return call

    race = compare.interleave(provider("a", [0, 10, 30, 20]), provider("b", [0, 5, 10, 5]), 3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert race.ours == compare.Spread(20, 10, 30)
    assert race.dense == compare.Spread(5, 5, 10)
    assert race.ratio == compare.Spread(3, 2, 4)


def test_rates_count_tokens_not_the_prompt(pair, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(compare.time, "perf_counter", lambda: next(clock))
    assert compare.decode_rate(pair[0], random_ids(9), tokens=4) == 4
    assert compare.prefill_rate(pair[0], random_ids(9)) == 9


def test_tables():
    race = compare.Race(compare.Spread(90.04, 88, 1234.5), compare.Spread(30, 29, 31), compare.Spread(3, 2.9, 3.1))
    table = compare.speed_table("bf16", race, race, 256, (103_000_000, 269_000_000))
    lines = table.splitlines()
    assert lines[0].split("  ")[0] == "median (min-max)"
    assert "90.0 (88.0-1,234.5)" in lines[2] and "3.00x (2.90-3.10)" in lines[2]
    assert lines[4].split()[-4:] == ["MB", "103.0", "269.0", "0.38x"]
    starts = {line.index("30.0 (") for line in lines[2:4]}
    assert starts == {lines[0].index("dense bf16")}

    result = compare.Accuracy(1024, 1.5e-5, 1023, 12.34567, 12.34561, 10, 12)
    lines = compare.accuracy_table("bf16", result).splitlines()
    assert lines[2].split() == ["perplexity", "12.3457", "12.3456"]
    assert "1023 of 1024 (99.90 %)" in lines[3]
    assert "1.50e-05" in lines[4]
    assert "10 of 1024 (0.97 %)" in lines[5] and "12 of 1024 (1.17 %)" in lines[5]


def test_agreement_never_rounds_up_to_whole():
    table = compare.accuracy_table("bf16", compare.Accuracy(100_000, 0.0, 99_999, 1.0, 1.0, None, None))
    assert "100.00 %" not in table


def test_the_passage_ships_and_is_long_enough():
    text = compare.passage()
    assert text.startswith("In Congress, July 4, 1776\n\nThe unanimous Declaration")
    assert text.rstrip().endswith("our Lives, our Fortunes and our sacred Honor.")
    assert text.isascii()
    # No tokenizer in use spends fewer than one id on a word of this text.
    assert len(text.split()) >= compare.PASSAGE_TOKENS
