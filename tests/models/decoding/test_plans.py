"""What fused layers know from the forward before is true, or looked for anew."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from qops import quantize_model
from qops.nn import RMSNorm
from tests.support.models.block_runs import IDS, LAYERS, begun, check, token
from tests.support.models.families import random_model

pytestmark = pytest.mark.usefixtures("mode")


def puts(owner, name, value):
    """What undoes it."""
    before = dict(owner)
    owner[name] = value

    def undo():
        owner.clear()
        owner.update(before)

    return undo


def other_modules(made):
    """Changes behind the back of modules: nobody sets an attribute."""
    layer = made.model.layers[3]
    with torch.inference_mode(False), torch.no_grad():
        norm, o, mlp = map(copy.deepcopy, (layer.input_layernorm, layer.self_attn.o_proj, layer.mlp))
        norm.weight.mul_(0.5)
        o.weight.scales.mul_(2)
        mlp.gate_up_proj.merged.weight.scales.mul_(0.5)
    attention, gate_up = layer.self_attn, layer.mlp.gate_up_proj
    return {
        "norm": (layer._modules, "input_layernorm", norm),
        "linear": (attention._modules, "o_proj", o),
        "mlp": (layer._modules, "mlp", mlp),
        "merged": (gate_up._modules, "merged", mlp.gate_up_proj.merged),
        "weight": (attention.o_proj._modules, "weight", o.weight),
        "parameter": (layer.input_layernorm._parameters, "weight", norm.weight),
        "buffer": (attention.o_proj.weight._buffers, "scales", o.weight.scales),
    }


@pytest.mark.parametrize("what", ["norm", "linear", "mlp", "merged", "weight", "parameter", "buffer"])
def test_what_is_replaced_between_two_forwards_without_an_attribute_that_is_set(made, what):
    place = other_modules(made)[what]

    def run():
        cache, results = begun(made)
        undo = puts(*place)
        results += [token(made, cache, t) for t in (15, 16)]
        undo()
        return results + [token(made, cache, t) for t in (17, 18)]

    check(run)
    cache, _ = begun(made)
    plain = token(made, copy.deepcopy(cache), 15)
    undo = puts(*place)
    assert not torch.equal(token(made, cache, 15), plain)
    undo()


@pytest.mark.parametrize("name", ["eps", "rounding"])
def test_attributes_that_are_set_between_two_forwards(made, name):
    norms = [module for module in made.model.layers.modules() if type(module) is RMSNorm]
    values = {"eps": 0.5, "rounding": "fp32"}

    def run():
        cache, results = begun(made)
        before = getattr(norms[0], name)
        for value in (values[name], before):
            for norm in norms:
                setattr(norm, name, value)
            results += [token(made, cache, len(results) + 9) for _ in range(2)]
        return results

    check(run)


def test_a_hook_on_a_layer_sees_what_it_gives(made):
    """Between two forwards, and while layers are computed ahead; one that records, too."""
    seen = []

    def hook(module, arguments, output):
        seen.append(output.clone())

    def run():
        seen.clear()
        cache, results = begun(made)
        handle = made.model.layers[3].register_forward_hook(hook)
        results += [token(made, cache, t) for t in (15, 16)]
        handle.remove()

        def before(index, x, layer):
            if index == 1:
                handles.append(made.model.layers[3].register_forward_pre_hook(lambda *given: seen.append(given[1][0])))
            return x

        handles = []
        results.append(token(made, cache, 17, before))
        handles[0].remove()
        given = {made.model.layers[0].cache_keyword: cache, "use_cache": True, "output_hidden_states": True}
        for t in (18, 19):
            results += made.model(IDS[:, t : t + 1], **given).hidden_states
        results += [token(made, cache, 20), *seen]
        assert len(seen) == 3
        return results

    check(run)


def test_layers_know_nothing_of_one_that_went(made):
    """Neither it nor its weights stay."""
    begun(made)
    gone = weakref.ref(made.model.layers[3].mlp.down_proj.weight)
    assert gone() is not None
    made.model.layers[3] = copy.deepcopy(made.model.layers[2])
    assert gone() is None


def test_a_model_that_nobody_keeps_goes_at_once(mode):
    """Without a search for cycles."""
    with torch.inference_mode(False), torch.no_grad():
        model = quantize_model(random_model("llama", dtype=torch.bfloat16, num_hidden_layers=LAYERS))
    begun(model)
    weights = [weakref.ref(layer.mlp.down_proj.weight) for layer in model.model.layers]
    gc.collect()
    gc.disable()
    try:
        layers = list(model.model.layers)
        del model, layers
        kept = sum(weight() is not None for weight in weights)
    finally:
        gc.enable()
    assert kept == 0
