"""What is put into a fused layer, or done to its modules, after a forward counts as if it had been there before any."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from qops import quantize_model
from qops.nn import Int4Linear, RMSNorm
from qops.nn.linears import dense_linear
from qops.testing import assert_bitwise
from qops.weights.noticed import Noticed
from tests.support.models.block_runs import IDS, LAYERS, begun, chain_of, contents, leads, token
from tests.support.models.families import random_model


@pytest.fixture(autouse=True)
def no_grad():
    """Weights that are none of inference mode's may be copied, and written."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def quantized(scheme="int4", layers=LAYERS):
    dense = random_model("llama", dtype=torch.bfloat16, num_hidden_layers=layers)
    return quantize_model(dense, scheme, prove=False)


@pytest.fixture(scope="module")
def model():
    """That no test changes; its linears have biases."""
    with torch.inference_mode(False), torch.no_grad():
        return quantized()


def results_of(model):
    """Of a prompt and five steps, and what the cache holds then."""
    cache, results = begun(model, tokens=5)
    return results + contents(cache)


STEPS = 5


def check_change(given, change):
    """`change` after decoding gives the bits of the chain on a model that was changed before its first forward.

    It changes the model that it gets, and returns what has been noted since. Between the two are more than those bits:
    the results without it differ.
    """
    before, after = copy.deepcopy(given), copy.deepcopy(given)
    change(before)
    want = chain_of(lambda: results_of(before))
    plain = results_of(after)
    change(after)
    got = results_of(after)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_bitwise(a, b, f"result {index}")
    assert not torch.equal(got[0], plain[0]) and not torch.equal(got[STEPS], plain[STEPS])
    return after


def watched(module, how, calls):
    """A copy that gives twice as much, and notes that it was called."""
    made = copy.deepcopy(module)

    def twice(y):
        calls.append(y.shape)
        return 2 * y

    if how == "hook":
        made.register_forward_hook(lambda module, given, y: twice(y))
    else:
        own = made.forward
        made.forward = lambda *given, **more: twice(own(*given, **more))
    return made


@pytest.mark.parametrize("way", ["attribute", "entry"])
@pytest.mark.parametrize("how", ["hook", "forward"])
@pytest.mark.parametrize("name", ["mlp", "mlp.down_proj", "self_attn.o_proj", "input_layernorm"])
def test_a_module_that_is_watched_already_is_put_in(model, name, how, way):
    """The newest hook of the process is older than the last look."""
    calls = []
    parent, _, leaf = name.rpartition(".")
    others = iter([watched(model.model.layers[1].get_submodule(name), how, calls) for _ in range(2)])

    def change(model):
        owner = model.model.layers[1].get_submodule(parent)
        if way == "attribute":
            setattr(owner, leaf, next(others))
        else:
            owner._modules[leaf] = next(others)
        calls.clear()

    check_change(model, change)
    assert calls == [(2, 9, 64), *[(2, 1, 64)] * STEPS]


class Zero(nn.Module):
    def forward(self, x, *more):
        return torch.zeros_like(x)


@pytest.mark.parametrize("scheme", ["int8", "w4a8"])
@pytest.mark.parametrize("name", ["mlp", "self_attn.qkv_proj"])
def test_what_reads_int8_rows_is_replaced(scheme, name):
    """The norm before it gives floats from then on."""
    given = quantized(scheme, layers=2)
    norm = given.model.layers[1].post_attention_layernorm if name == "mlp" else given.model.layers[1].input_layernorm
    assert norm.int8 == "127"
    weight = torch.randn(128, 64, generator=torch.Generator().manual_seed(0)).bfloat16()

    def change(model):
        model.model.layers[1].set_submodule(name, Zero() if name == "mlp" else dense_linear(weight))

    check_change(given, change)


def test_a_norm_of_int8_rows_in_a_layer_of_floats():
    """Where two layers have one norm, each gets what its linears read."""
    int4, int8 = quantized(layers=2), quantized("int8", layers=2)
    norm = copy.deepcopy(int8.model.layers[0].post_attention_layernorm)
    plain = RMSNorm(norm.weight, norm.eps)

    def change(model):
        model.model.layers[1].input_layernorm = plain

    want = check_change(int4, change)
    results_of(int4)
    of_int8 = results_of(int8)
    int4.model.layers[1].input_layernorm = int8.model.layers[0].post_attention_layernorm
    for expected, found in ((results_of(want), int4), (of_int8, int8), (results_of(want), int4)):
        for index, (a, b) in enumerate(zip(results_of(found), expected, strict=True)):
            assert_bitwise(a, b, f"result {index}")


class HalfNorm(RMSNorm):
    def forward(self, x):
        return 0.5 * super().forward(x)


class HalfLinear(Int4Linear):
    def forward(self, x, residual=None):
        return 0.5 * super().forward(x, residual)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("input_layernorm", HalfNorm),
        ("post_attention_layernorm", HalfNorm),
        ("self_attn.qkv_proj.merged", HalfLinear),
        ("self_attn.o_proj", HalfLinear),
        ("mlp.gate_up_proj.merged", HalfLinear),
        ("mlp.down_proj", HalfLinear),
    ],
    ids=lambda of: of if isinstance(of, str) else "",
)
def test_another_class(model, name, kind):
    def change(model):
        model.model.layers[2].get_submodule(name).__class__ = kind

    after = check_change(model, change)
    after.model.layers[2].get_submodule(name).__class__ = kind.__base__
    for index, (a, b) in enumerate(zip(results_of(after), results_of(model), strict=True)):
        assert_bitwise(a, b, f"result {index} of the class as it was")


class Twice(nn.Module):
    def forward(self, bias):
        return 2 * bias


BIASES = ("self_attn.qkv_proj.merged", "self_attn.o_proj", "mlp.gate_up_proj.merged", "mlp.down_proj")


@pytest.mark.parametrize("name", BIASES)
def test_a_parametrized_bias(model, name):
    """One that changes nothing keeps the bits, and one that doubles it counts."""
    after, want = copy.deepcopy(model), results_of(model)
    results_of(after)
    linear = after.model.layers[1].get_submodule(name)
    parametrize.register_parametrization(linear, "bias", nn.Identity())
    for index, (a, b) in enumerate(zip(results_of(after), want, strict=True)):
        assert_bitwise(a, b, f"result {index}")
    parametrize.remove_parametrizations(linear, "bias", leave_parametrized=False)
    for index, (a, b) in enumerate(zip(results_of(after), want, strict=True)):
        assert_bitwise(a, b, f"result {index} of the bias as it was")

    def change(model):
        parametrize.register_parametrization(model.model.layers[1].get_submodule(name), "bias", Twice())

    check_change(model, change)


@pytest.mark.parametrize("name", BIASES)
def test_a_pruned_bias(model, name):
    linear = model.model.layers[1].get_submodule(name)
    mask = torch.arange(linear.out_features) % 2

    def pruned(model):
        prune.custom_from_mask(model.model.layers[1].get_submodule(name), "bias", mask)

    def written(model):
        model.model.layers[1].get_submodule(name).bias.mul_(mask)

    after, want = check_change(model, pruned), results_of(check_change(model, written))
    for index, (a, b) in enumerate(zip(results_of(after), want, strict=True)):
        assert_bitwise(a, b, f"result {index}")


@pytest.mark.parametrize("of", ["layer", "attention"])
def test_a_class_gets_another_forward(model, monkeypatch, of):
    """It is called in each step, and layers are computed ahead again when the class has its own."""
    model = copy.deepcopy(model)
    want = results_of(model)
    calls = []

    def noting(self, *given, **more):
        calls.append(None)
        return forward(self, *given, **more)

    layer = model.model.layers[0]
    kind = type(layer) if of == "layer" else type(layer.self_attn)
    forward = kind.forward
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", noting)
        got = results_of(model)
        assert len(calls) == LAYERS * (1 + STEPS)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_bitwise(a, b, f"result {index}")
    with leads() as found:
        results_of(model)
    assert found[-1] == LAYERS
    assert len(calls) == LAYERS * (1 + STEPS)


def test_a_class_gets_another_forward_amid_steps(model, monkeypatch):
    model = copy.deepcopy(model)
    for kind in (type(model.model.layers[0]), type(model.model.layers[0].self_attn)):
        cache, _ = begun(model)
        forward, calls = kind.forward, []

        def noting(self, *given, forward=forward, calls=calls, **more):
            calls.append(None)
            return forward(self, *given, **more)

        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", noting)
            token(model, cache, 15)
        assert len(calls) == LAYERS


def test_steps_change_nothing(model):
    """What counts as a change makes every layer look at all of its modules anew."""
    cache, _ = begun(model)
    before = Noticed.changes
    with leads() as found:
        token(model, cache, 15)
        model(IDS[:, 16:17], past_key_values=cache)
    assert Noticed.changes == before
    assert found == [LAYERS] * 2


def other_weight(linear):
    linear.weight = copy.deepcopy(linear.weight)


def other_entry(linear):
    linear._modules["weight"] = copy.deepcopy(linear.weight)


def other_tensor(linear):
    linear.weight._buffers["packed"] = linear.weight._buffers["packed"].clone()


@pytest.mark.parametrize("change", [other_weight, other_entry, other_tensor])
def test_what_is_known_keeps_no_weight_that_was_replaced(model, change):
    """Of the first layer, which knows those behind it, or of another one."""
    after = copy.deepcopy(model)
    for index in (0, 3):
        begun(after)
        assert after.model.layers[0].plan is not None
        linear = after.model.layers[index].mlp.down_proj
        packed = weakref.ref(linear.weight._buffers["packed"])
        gc.disable()
        try:
            change(linear)
            assert packed() is None
        finally:
            gc.enable()


def test_a_compiled_model_sees_what_is_put_in_the_place_of_a_parameter():
    """One graph of a model that has had a forward, and another one then."""
    model = quantized(layers=2)
    plain = model(IDS).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_bitwise(compiled(IDS).logits, plain)
    norm = model.model.layers[1].input_layernorm
    norm._parameters["weight"] = nn.Parameter(0.5 * norm.weight, requires_grad=False)
    got = compiled(IDS).logits
    assert_bitwise(got, model(IDS).logits)
    assert not torch.equal(got, plain)
    torch.compiler.reset()


def test_modules_that_another_thread_changes_meanwhile(model):
    """Those of another model: what this one found goes at any moment, and is found again."""
    want, other, stop = results_of(model), RMSNorm(torch.ones(8), 1e-6), threading.Event()

    def change():
        while not stop.is_set():
            other.eps = 1e-6

    changing = threading.Thread(target=change)
    changing.start()
    try:
        for _ in range(20):
            for got, expected in zip(results_of(model), want, strict=True):
                assert_bitwise(got, expected)
    finally:
        stop.set()
        changing.join()
