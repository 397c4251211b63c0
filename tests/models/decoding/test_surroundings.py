"""Decoding steps leave what is around them as it was: callers' tensors, modes of torch, lists of layers, memory."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from transformers import DynamicCache

from qops import quantize_model
from qops.testing import assert_bitwise
from tests.support.models.block_runs import IDS, LAYERS, begun
from tests.support.models.families import random_model


def quantized(layers=LAYERS, family="llama"):
    with torch.inference_mode(False), torch.no_grad():
        return quantize_model(random_model(family, num_hidden_layers=layers), prove=False)


@pytest.fixture(scope="module")
def model():
    """That no test changes."""
    return quantized()


@pytest.fixture
def made(model):
    """A model that a test may change, which knows no tables, caches or plans."""
    with torch.inference_mode(False), torch.no_grad():
        return copy.deepcopy(model)


@pytest.fixture
def no_grad():
    with torch.inference_mode(False), torch.no_grad():
        yield


def steps(model, tokens=12, prompt=1):
    """Logits of one sequence, a prompt and then a token a step."""
    cache = DynamicCache(config=model.config)
    logits = [model(IDS[:1, :prompt], past_key_values=cache).logits]
    return logits + [model(IDS[:1, t : t + 1], past_key_values=cache).logits for t in range(prompt, tokens)]


def check_same(got, want):
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_bitwise(a, b, f"step {index}")


# Tables --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [lambda t: t.mul_(2), lambda t: t[0, 1:].zero_(), lambda t: t.view(-1).add_(1)])
def test_tables_that_a_caller_writes_are_the_callers(made, mode, write):
    """At positions that later forwards take as well, once and once more."""
    want = steps(made)
    for name in ("cos", "sin"):
        shared = made.model.rotary_emb(made.model.embed_tokens(IDS[:1, :1]), torch.tensor([[5]]))
        write(getattr(shared, name))
        check_same(steps(made), want)


@pytest.mark.parametrize("position", [2**40 + 1, 2**62, 2**63 - 1, -1, -(2**63)])
def test_positions_of_which_nobody_keeps_tables(model, no_grad, position):
    """The bits are those of a batch, whose tables are computed in each step."""
    cache, several = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for t in range(4):
        ids, at = IDS[:1, t : t + 1], torch.tensor([[position]])
        got = model.model(ids, position_ids=at, past_key_values=cache)[0]
        want = model.model(ids.expand(2, -1), position_ids=at.expand(2, -1), past_key_values=several)[0]
        assert_bitwise(got, want[:1])


# Modes of torch ------------------------------------------------------------------------------------------------------


def test_another_default_device(made, mode):
    """What decoding makes by itself, tables and room in caches, is on the CPU as the model is."""
    with torch.device("meta"):
        got = steps(made)
        position = torch.tensor([[3]], device="cpu")
        got.append(made(IDS[:1, 3:4], position_ids=position, use_cache=False).logits)
    want = steps(copy.deepcopy(made))
    want.append(made(IDS[:1, 3:4], position_ids=position, use_cache=False).logits)
    check_same(got, want)


@pytest.mark.parametrize("layers", [1, LAYERS])
def test_tangents_are_refused(layers, no_grad):
    """By one layer's blocks, and by layers that are computed ahead."""
    model = quantized(layers)
    cache, _ = begun(model)
    embedded = model.model.embed_tokens(IDS[:, 15:16])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(embedded, torch.ones_like(embedded))
        with pytest.raises(RuntimeError, match="tangent"):
            model(inputs_embeds=dual, past_key_values=cache)


def test_a_traced_step_computes_its_tables(made, no_grad):
    """At any position. Its attention is torch's, so the bits are other ones."""

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = made

        def forward(self, ids, positions):
            cache = DynamicCache(config=made.config)
            made(IDS[:1, :9], past_key_values=cache)
            return made(ids, position_ids=positions, past_key_values=cache).logits

    step = Step()
    steps(made)
    traced = torch.jit.trace(step, (IDS[:1, :1], torch.tensor([[9]])), check_trace=False)
    for ids, position in ((IDS[:1, :1], 9), (IDS[:1, 3:4], 10), (IDS[:1, 9:10], 100)):
        want = step(ids, torch.tensor([[position]]))
        apart, bound = (traced(ids, torch.tensor([[position]])) - want).abs().max(), 2e-5 * want.abs().max()
        assert apart <= bound < (step(ids, torch.tensor([[20]])) - want).abs().max() / 100


def test_fake_tensors(model, no_grad):
    steps(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        cache = DynamicCache(config=model.config)
        for t in range(3):
            logits = model(fakes.from_tensor(IDS[:1, t : t + 1]), past_key_values=cache).logits
            assert logits.shape == (1, 1, model.config.vocab_size)
    steps(model)


# Lists of layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [slice(None), slice(LAYERS), slice(0, LAYERS, 1), slice(-LAYERS, 99)], ids=str)
def test_slices_of_all_layers_are_copies(made, mode, part):
    want = steps(made)
    for _ in range(2):
        layers = made.model.layers
        own = list(layers)
        taken = layers[part]
        assert isinstance(taken, nn.ModuleList)
        assert list(taken) == own
        del taken[3]
        taken.append(own[0])
        del layers[part][0]
        assert list(layers) == list(made.model.layers[part]) == own
        check_same(steps(made), want)
        assert list(taken) == [*own[:3], *own[4:], own[0]]
    assert layers[part] is not taken


def test_two_copies_that_are_held_are_two(model):
    layers = model.model.layers
    first, second = layers[:], layers[:]
    assert first is not second
    assert list(first) == list(second) == list(layers)


def test_a_copy_that_nobody_holds_is_given_again(model, mode, monkeypatch):
    layers = model.model.layers
    kept = weakref.ref(layers[:])
    again = layers[:]
    assert kept() is again
    del again
    cache, _ = begun(model)
    lists, init = [], nn.ModuleList.__init__

    def noting(self, *given):
        lists.append(self)
        init(self, *given)

    monkeypatch.setattr(nn.ModuleList, "__init__", noting)
    model(IDS[:, 15:16], past_key_values=cache)
    assert lists == []


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda of: pickle.loads(pickle.dumps(of))])
def test_copies_of_a_model_have_no_list_but_their_own(made, no_grad, copied):
    steps(made)
    layers = copied(made).model.layers if copied is not copy.copy else copied(made.model.layers)
    assert not any(isinstance(value, nn.ModuleList) for value in vars(layers).values())


def test_parts_of_a_list_of_layers(model):
    layers = model.model.layers
    own = list(layers)
    for part in (slice(2), slice(1, 3), slice(None, None, 2), slice(None, None, -1), slice(4, 1), slice(-2, None)):
        assert isinstance(layers[part], nn.ModuleList)
        assert list(layers[part]) == own[part]
    assert layers[-1] is own[-1]
    with pytest.raises(IndexError):
        layers[LAYERS]


def test_layers_that_are_added_show_in_the_next_slice(made, no_grad):
    layers = made.model.layers
    steps(made)
    layers.append(copy.deepcopy(layers[1]))
    layers[0] = copy.deepcopy(layers[0])
    assert list(layers[:]) == list(layers)
    assert len(layers[: LAYERS + 1]) == LAYERS + 1


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [1, 9])
def test_room_behind_the_rows_of_a_cache_holds_zeros(model, mode, prompt):
    """Who saves a cache saves all of it."""
    cache, _ = begun(model, prompt=prompt)
    for layer in cache.layers:
        for held in (layer.keys, layer.values):
            storage = held.untyped_storage()
            whole = torch.empty(0, dtype=held.dtype).set_(storage)
            assert storage.nbytes() > 10 * held.numel() * held.element_size()
            assert whole.count_nonzero() == held.count_nonzero() > 0


def test_memory_of_caches_that_went_is_used_again(no_grad):
    """Whatever allocates it: 4 layers of 64 columns took 80 KB more with each cache."""
    model = quantized(4)

    def resident():
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    def generations(count):
        for _ in range(count):
            cache = DynamicCache(config=model.config)
            model(IDS[:1, :9], past_key_values=cache)
            model(IDS[:1, 9:10], past_key_values=cache)

    generations(100)
    before = resident()
    generations(300)
    assert resident() - before < 2 << 20
