"""Decoding by block operators: the bits of the chain, whatever happens to model and cache between two steps."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
import transformers
from packaging.version import parse
from transformers import DynamicCache, GenerationConfig

from qops import quantize_model
from qops.testing import assert_bitwise
from tests.support.models.block_runs import chain_of, check, counted
from tests.support.models.families import VOCAB, random_model

FAMILIES = ("llama", "qwen3", "gemma3", "mistral", "phi3", "smollm3", "qwen2")
MODELS = [(family, "int4", torch.bfloat16) for family in FAMILIES]
MODELS += [(family, "int8_weight_only", torch.float32) for family in ("llama", "mistral")]
MODELS += [("llama", "int8", torch.bfloat16), ("gemma3", "int8", torch.float32)]
MODELS += [("qwen3", "w4a8", torch.float32), ("phi3", "w4a8", torch.bfloat16)]
IDS = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=MODELS, ids=lambda of: f"{of[0]}-{of[1]}")
def model(request):
    family, scheme, dtype = request.param
    with torch.inference_mode(False), torch.no_grad():
        # What random layers make of activations of 8 bits differs with every rounding before them.
        found = quantize_model(random_model(family, dtype=dtype), scheme, prove=scheme not in ("int8", "w4a8"))
    found.family = family
    return found


@pytest.fixture
def made(model):
    """A model that a test may change."""
    with torch.inference_mode(False), torch.no_grad():
        return copy.deepcopy(model)


def generate(model, ids=IDS[:, :9], mask=None, assistant_model=None, **changes):
    greedy = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    greedy |= {"return_dict_in_generate": True, "output_logits": True}
    torch.manual_seed(0)
    more = {} if assistant_model is None else {"assistant_model": assistant_model}
    mask = torch.ones_like(ids) if mask is None else mask
    found = model.generate(ids, attention_mask=mask, generation_config=GenerationConfig(**greedy | changes), **more)
    return [found.sequences, *(found.logits or ())]


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 12])
def test_prompts(model, tokens):
    """Of up to 8 tokens, the chain reads the prompt and the block operators of the MLPs."""
    check(lambda: generate(model, IDS[:1, :tokens]), model=model)
    check(lambda: generate(model, IDS[:, :tokens]), model=model)


WAYS = {
    "sampling": {"do_sample": True, "temperature": 1.3},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_generate(model, way):
    check(lambda: generate(model, **WAYS[way]), model=model)


def padding(rows=9):
    mask = torch.ones(2, rows, dtype=torch.long)
    mask[1, :3] = 0
    return mask


def test_left_padding(model):
    check(lambda: generate(model, mask=padding()), model=model)
    check(lambda: generate(model, mask=padding(), num_beams=2), model=model)

    def run():
        cache = DynamicCache(config=model.config)
        results = [forward(model, IDS[:, :6], cache, attention_mask=padding(6))]
        for t in range(6, 14):
            results.append(forward(model, IDS[:, t : t + 1], cache, attention_mask=padding(t + 1)))
        return results

    check(run, model=model)


def test_drafted_tokens(model):
    """A sliding cache that keeps what a draft may go back to is left to the chain."""
    assistant = quantize_model(random_model(model.family, seed=1, dtype=model.dtype))
    all_slide = model.family in ("mistral", "phi3")
    ways = [{"prompt_lookup_num_tokens": 4}, {"assistant_model": assistant}, {"assistant_model": model}]
    slides = any(layer.is_sliding for layer in DynamicCache(config=model.config).layers)
    if slides and parse(transformers.__version__) < parse("5.22"):
        ways = ways[:1]  # Transformers' own assisted decoding fails on sliding caches there
    for how in ways:
        check(lambda how=how: generate(model, IDS[:1, :9], output_logits=False, **how), attention=not all_slide)


def test_caches_that_do_not_grow_are_left_to_the_chain(model):
    for how in ({"cache_implementation": "static"}, {"use_cache": False}):
        check(lambda how=how: generate(model, **how), attention=False)


# Caches --------------------------------------------------------------------------------------------------------------


def forward(model, ids, cache, **more):
    return model(ids, past_key_values=cache, use_cache=True, **more).logits


def begun(model, prompt=6, until=9):
    """A cache, and the logits of its tokens."""
    cache = DynamicCache(config=model.config)
    results = [forward(model, IDS[:, :prompt], cache)]
    return cache, results + steps(model, cache, range(prompt, until))


def steps(model, cache, tokens, ids=IDS):
    return [forward(model, ids[:, t : t + 1], cache) for t in tokens]


def test_a_cache_goes_on_after_a_long_prefill(model):
    check(lambda: begun(model, 20, 40)[1], model=model)


def test_pieces_of_any_size(model):
    def run():
        cache, at, results = DynamicCache(config=model.config), 0, []
        for tokens in (3, 1, 5, 2, 8, 1, 1, 9, 1, 4):
            results.append(forward(model, IDS[:, at : at + tokens], cache))
            at += tokens
        return results

    check(run, model=model)


def deep(cache):
    return copy.deepcopy(cache)


def saved(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def shallow(cache):
    """Other layers with the same tensors."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


@pytest.mark.parametrize("copied", [deep, saved, shallow])
def test_copies_of_a_cache_in_turn(model, copied):
    def run():
        cache, results = begun(model)
        other = copied(cache)
        for t in range(9, 18):
            results += steps(model, cache, [t]) + steps(model, other, [t + 10])
        third = copied(other)
        return results + steps(model, third, range(4)) + steps(model, other, range(4, 8))

    check(run, model=model)


def test_two_caches_in_turn(model):
    def run():
        (one, results), other = begun(model), DynamicCache(config=model.config)
        results.append(forward(model, IDS[:1, :12], other))
        for t in range(12, 20):
            results += steps(model, one, [t]) + steps(model, other, [t], IDS[:1])
        return results

    check(run, model=model)


def test_two_models_on_one_cache(model, made):
    def run():
        cache, results = begun(model)
        for t in range(9, 17):
            results += steps((model, made)[t % 2], cache, [t])
        return results

    check(run, model=model)


def test_views_that_somebody_keeps_stay_as_they_are(model):
    """And may be put back."""

    def run():
        cache, results = begun(model)
        kept = [(layer.keys, layer.values, getattr(layer, "cumulative_length", None)) for layer in cache.layers]
        held = [keys.clone() for keys, _, _ in kept]
        results += steps(model, cache, range(9, 15))
        for (keys, _, _), copied in zip(kept, held, strict=True):
            assert_bitwise(keys, copied)
        for layer, (keys, values, length) in zip(cache.layers, kept, strict=True):
            layer.keys, layer.values = keys, values
            if length is not None:
                layer.cumulative_length = length
        return results + steps(model, cache, range(20, 26))

    check(run, model=model)


def test_what_transformers_does_to_a_cache(model):
    def run():
        cache, results = begun(model)
        cache.reorder_cache(torch.tensor([1, 0]))
        results += steps(model, cache, range(12, 16))
        cache.batch_repeat_interleave(2)
        results += steps(model, cache, range(16, 19), IDS.repeat_interleave(2, 0))
        cache.batch_select_indices(torch.tensor([0, 3]))
        return results + steps(model, cache, range(19, 22))

    check(run, model=model)


def test_crop(model):
    if any(layer.is_sliding for layer in begun(model)[0].layers):
        pytest.skip("Transformers crops no window that has dropped what would come back")

    def run():
        cache, results = begun(model, 6, 14)
        cache.crop(-5)
        return results + steps(model, cache, range(20, 26))

    check(run, model=model)


@pytest.mark.parametrize("which", ["keys", "values"])
def test_keys_or_values_that_somebody_has_changed(model, which):
    def run():
        cache, results = begun(model)
        for layer in cache.layers:
            setattr(layer, which, 0.5 * getattr(layer, which))
        return results + steps(model, cache, range(20, 24))

    check(run, model=model)


def test_reset():
    model = quantize_model(random_model("llama"))
    model.family = "llama"

    def run():
        cache, results = begun(model)
        cache.reset()
        if cache.get_seq_length() == 0:  # older releases keep rows of zeros
            results.append(forward(model, IDS[:, :5], cache))
        return results + steps(model, cache, range(5, 9))

    check(run, model=model)


def test_inference_mode_in_turn(model):
    def run():
        with torch.inference_mode():
            cache, first = begun(model)
        with torch.inference_mode(False), torch.no_grad():
            second = steps(model, cache, range(9, 14))
        with torch.inference_mode():
            return first + second + steps(model, cache, range(14, 18))

    check(run, model=model)


def test_grad_mode(model):
    with torch.inference_mode(False), torch.enable_grad():
        check(lambda: [logits.detach() for logits in begun(model)[1]], model=model)


def test_python_threads(model):
    def run():
        results = [torch.empty(0)] * 4

        def work(index):
            with torch.inference_mode():
                results[index] = torch.cat(begun(model, 6 + index, 20)[1], 1)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    check(run, model=model)


# Models --------------------------------------------------------------------------------------------------------------


def first_linear(model):
    found = model.model.layers[0].self_attn.qkv_proj
    return getattr(found, "merged", found)


def test_what_is_replaced_is_noticed_at_the_next_step(made):
    layer = made.model.layers[1]
    norm, attention, o = layer.input_layernorm, layer.self_attn, layer.self_attn.o_proj
    with torch.inference_mode(False), torch.no_grad():
        other_norm, other_o = copy.deepcopy(norm), copy.deepcopy(o)
        other_norm.weight.data.mul_(3)
        other_o.weight.scales.mul_(2)
        other_weight = torch.nn.Parameter(norm.weight * 2, requires_grad=False)
    changes = (
        (norm, "weight", other_weight),
        (norm, "eps", 0.5),
        (layer, "input_layernorm", other_norm),
        (attention, "o_proj", other_o),
        (o, "weight", other_o.weight),
        (attention, "scaling", 1.0),
    )

    def run():
        cache, results = begun(made)
        for index, (owner, name, value) in enumerate(changes):
            before = getattr(owner, name)
            setattr(owner, name, value)
            changed = steps(made, cache, [9 + 2 * index])
            setattr(owner, name, before)
            results += changed + steps(made, cache, [10 + 2 * index])
        return results

    check(run, model=made)
    with counted() as counts:
        steps(made, begun(made, 6, 6)[0], [6])
    assert counts[0] == 3, "a half that stayed with the chain"


def test_errors_name_the_layer():
    """That is wrong, by the number that the model gives it, whatever layers are called; and what of it."""
    with torch.inference_mode(False), torch.no_grad():
        model = quantize_model(random_model("llama", dtype=torch.bfloat16, num_hidden_layers=5), "int4")
    layers = model.model.layers
    for called, wrong in (([0, 1, 2, 3, 4], 2), ([1, 2, 4], 4)):
        model.model.layers = torch.nn.ModuleList([layers[index] for index in called])
        cache, _ = begun(model)
        buffers = layers[wrong].mlp.down_proj.weight._buffers
        scales = buffers["scales"]
        buffers["scales"] = scales.double()
        text = rf"^qops\.decoder_layers: layer {wrong}: down_scales must have dtype float32, .*, got float64$"
        with pytest.raises(RuntimeError, match=text):
            steps(model, cache, [9])
        buffers["scales"] = scales


def test_norms_changed_in_place(made):
    weight = made.model.layers[1].input_layernorm.weight

    def run():
        cache, results = begun(made)
        before = weight.clone()
        for values in (1.5 * before, before):
            weight.copy_(values)
            results += steps(made, cache, range(cache.get_seq_length(), cache.get_seq_length() + 2))
        return results

    with torch.inference_mode(False), torch.no_grad():
        check(run, model=made)


def test_hooks(made):
    def run():
        cache, results = begun(made)
        seen = []
        layers = made.model.layers
        handles = [
            module.register_forward_hook(lambda module, arguments, output: seen.append(output))
            for module in (layers[1].self_attn, layers[0].mlp, layers[2].input_layernorm)
        ]
        results += steps(made, cache, range(9, 11))
        for handle in handles:
            handle.remove()
        assert len(seen) == 6
        tensors = [output[0] if isinstance(output, tuple) else output for output in seen]
        return results + steps(made, cache, range(11, 13)) + tensors

    check(run, model=made)


def test_what_a_forward_gives_besides(made):
    def run():
        cache, results = begun(made, 6, 6)
        for t in range(6, 9):
            found = made(IDS[:, t : t + 1], past_key_values=cache, output_hidden_states=True)
            results += [*found.hidden_states, found.logits]
        return results

    check(run, model=made)
    with counted() as counts:
        made(IDS[:, :1], past_key_values=begun(made, 9, 9)[0], output_attentions=True)
    assert counts[0] == 0


def test_autocast_and_training_take_the_chain(made):
    def run():
        cache = begun(made, 9, 9)[0]
        with torch.autocast("cpu", torch.bfloat16):
            results = steps(made, cache, range(9, 12))
        made.train()
        results += steps(made, cache, range(12, 14))
        made.eval()
        return results

    check(run, attention=False)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_compiled_models_take_the_chain(family):
    """Of the first step sizes are constants in the graph, of the second symbols. Each costs seconds."""
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)  # inductor does not know the poisoned torch.empty
    with torch.inference_mode(False), torch.no_grad():
        model = quantize_model(random_model(family, num_hidden_layers=2))
        compiled = torch.compile(model, backend="aot_eager")

        cache, want = begun(model, 9, 9)[0], chain_of(lambda: begun(model, 9, 11)[1][1:])
        with counted() as counts:
            got = steps(compiled, cache, range(9, 11))
        assert counts == [0, 0]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)  # AOT writes some of Transformers' operators in others


def test_weights_in_their_other_form(made):
    """An unpacked weight is none for the block operators, which do not keep the packed one alive."""
    linear = first_linear(made)

    def run():
        cache, results = begun(made)
        packed = weakref.ref(linear.weight.packed)
        with torch.inference_mode(False), torch.no_grad():
            linear.weight.unpack()
        gc.collect()
        assert packed() is None
        with torch.inference_mode(False), torch.no_grad():
            linear.weight.pack()
        return results + steps(made, cache, range(9, 12))

    check(run, model=made)
    with counted() as counts:
        steps(made, begun(made, 6, 6)[0], [6])
    assert counts[0] == 3


def test_state_dict_round_trip(made):
    def run():
        cache, results = begun(made)
        with torch.inference_mode(False), torch.no_grad():
            state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
            results += steps(made, cache, [9])
            made.load_state_dict(state)
            results += steps(made, cache, [10])
            made.load_state_dict(state, assign=True)
        return results + steps(made, cache, [11, 12])

    check(run, model=made)


def test_copies_of_a_model(made):
    begun(made)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        check(lambda other=other: begun(other)[1], model=made)
    with torch.inference_mode(False), torch.no_grad():
        made.to(torch.float16)
    check(lambda: begun(made)[1], model=made)


def test_memory_of_a_cache_that_grows(model):
    """Room for more is made seldom, and what a layer shows is what it holds."""
    cache, _ = begun(model, 6, 6)
    addresses = set()
    for t in range(6, 40):
        steps(model, cache, [t])
        addresses.add(cache.layers[0].keys.untyped_storage().data_ptr())
        shown = cache.layers[0].keys.shape[2]
        assert shown == (min(t + 1, 3) if cache.layers[0].is_sliding else t + 1)
    assert len(addresses) == 1
