"""Decoding by block operators where linears multiply int8: which of them have blocks, and the bits of the chain."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

import qops
from qops import nn, quantize_model
from qops.ops.quantize_int8 import quantize_int8_static_ref
from qops.testing import assert_bitwise
from tests.support.models.block_runs import check, counted
from tests.support.models.families import VOCAB, random_model

IDS = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
BY_RULE = (
    nn.Int8CompressedTensorsLinear,
    nn.Int8TorchaoLinear,
    nn.Int8AsymmetricLinear,
    nn.Int8AsymmetricCompressedTensorsLinear,
)


@pytest.fixture(autouse=True)
def no_grad():
    """Weights that are none of inference mode's may be packed again, and moved."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def made(scheme, family="llama", dtype=torch.bfloat16):
    model = quantize_model(random_model(family, dtype=dtype), scheme, prove=False)
    model.family = family
    return model


def generate(model, ids=IDS[:, :9], tokens=24):
    """The tokens, and their logits."""
    given = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    given |= {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": tokens}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=GenerationConfig(**given))
    return [found.sequences, *found.logits]


def steps(model, cache, tokens):
    return [model(IDS[:, t : t + 1], past_key_values=cache).logits for t in tokens]


def begun(model):
    """A cache of 6 tokens, and their logits."""
    cache = DynamicCache(config=model.config)
    return cache, [model(IDS[:, :6], past_key_values=cache).logits]


def with_linears(model, make):
    """Its W8A8 linears replaced."""
    for name, linear in list(model.model.layers.named_modules()):
        if type(linear) is nn.Int8Linear:
            model.model.layers.set_submodule(name, make(linear))
    return model


@pytest.mark.parametrize("kind", BY_RULE)
def test_rules_of_checkpoints(kind):
    for dtype in (torch.bfloat16, torch.float32):
        model = with_linears(made("int8", dtype=dtype), lambda linear: kind(linear.weight, linear.bias))
        check(lambda model=model: generate(model), model=model)
        rules = {layer.input_layernorm.int8 for layer in model.model.layers}
        assert rules == {kind.rows_rule}


def test_one_scale_for_all_tokens_is_left_to_the_chain():
    scale, zero_point = torch.tensor(0.05), torch.tensor(3)
    for given in ({"input_scale": scale}, {"input_scale": scale, "input_zero_point": zero_point}):
        static = lambda linear, given=given: nn.Int8StaticLinear(linear.weight, linear.bias, **given)  # noqa: E731
        model = with_linears(made("int8"), static)
        with counted() as counts:
            want = generate(model)
        assert counts == [0, 0]
        seen = products_of(model, nn.Int8StaticLinear)
        for got, expected in zip(generate(model), want, strict=True):
            assert_bitwise(got, expected, "what hooks see")
        assert len(seen) > 24 * 4
        for linear, x, y in seen:
            q = quantize_int8_static_ref(x, scale, given.get("input_zero_point"))
            points = torch.full(x.shape[:-1], 3, dtype=torch.int32) if len(given) == 2 else None
            product = {"zero_point": points, "out_dtype": x.dtype, "silu_mul": linear.weight.mixed_gate_up}
            assert_bitwise(y, qops.int8_gemm(q, scale.expand(x.shape[:-1]), linear.weight, linear.bias, **product))


def products_of(model, kind):
    """Linears of a class with what goes into them and comes out, as the model is called."""
    seen = []
    for module in model.model.layers.modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda linear, given, y: seen.append((linear, given[0].clone(), y.clone())))
    return seen


SCHEMES = ("int4", "int8_weight_only", "w4a8", "int8")


def test_linears_of_all_kinds_in_one_layer():
    for family, (first, last) in itertools.product(("llama", "phi3"), itertools.product(SCHEMES, SCHEMES)):
        model = made({"o_proj": last, "down_proj": last, "*": first}, family)
        check(lambda model=model: generate(model, tokens=6), model=model)


def test_parts_of_a_product_that_differ_are_left_to_the_chain():
    """q beside k of another kind; gate beside up: no half of a layer. The other halves stay blocks."""
    model = made({"q_proj": "int4", "*": "int8"})
    check(lambda: generate(model), attention=False)
    model = made({"up_proj": "w4a8", "*": "int8"})
    with counted() as counts:
        generate(model)
    assert counts[0] > 0 and counts[1] == 0
    check(lambda: generate(model))


@pytest.mark.parametrize("scheme", ["int8", qops.W4A8(group_size=16, symmetric=False)], ids=str)
def test_several_sequences_and_tokens(scheme):
    model = made(scheme)
    for rows, tokens in itertools.product((1, 2, 8), (1, 3, 8)):
        ids = IDS[:1, :tokens].expand(rows, -1).contiguous()
        check(lambda ids=ids: generate(model, ids, tokens=5), model=model)


@pytest.mark.parametrize("scheme", ["int8", "w4a8"])
def test_norms_that_give_floats_or_another_rule(scheme):
    """The linear then quantises by itself; what it cannot read is an error, by blocks as by the chain."""
    model = made(scheme)
    layer = model.model.layers[1]
    assert layer.input_layernorm.int8 == "127"

    def run():
        cache, results = begun(model)
        for rule in (None, "127"):
            layer.input_layernorm.int8 = layer.post_attention_layernorm.int8 = rule
            results += steps(model, cache, range(cache.get_seq_length(), cache.get_seq_length() + 2))
        return results

    check(run, model=model)
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        cache, _ = begun(model)
        norm.int8 = "torchao"
        with pytest.raises(ValueError, match='must be dense or Int8Rows of rule "127", got Int8Rows of rule "torchao"'):
            steps(model, cache, [12])
        norm.int8 = "127"


@pytest.mark.parametrize("scheme", ["int8", "w4a8"])
def test_hooks_see_floats_and_the_bits_stay(scheme):
    model = made(scheme)
    want = generate(model)
    seen = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with counted() as counts:
        got = generate(model)
    assert counts[0] > 0 and len(seen) == 24
    handle.remove()
    for a, b in zip(got, want, strict=True):
        assert_bitwise(a, b)
