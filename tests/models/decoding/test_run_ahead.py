"""Layers that are computed before they are called: what a loop does in between shows as it would in turn."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref

import pytest
import torch
from torch.nn.utils import parametrize
from transformers import DynamicCache

from qops.models import blocks, rooms
from qops.nn import MLP
from qops.testing import assert_bitwise
from tests.support.models.block_runs import IDS, LAYERS, begun, check, contents, counted, leads, run_with, token

pytestmark = pytest.mark.usefixtures("mode")


def test_layers_run_ahead_from_the_third_forward(model):
    """The first two tell which layers follow one another, and the first makes room in the cache."""
    cache = DynamicCache(config=model.config)
    model(IDS[:, :9], past_key_values=cache)
    for layer in model.model.layers:
        layer.followers = ([], [])
    for t in range(5):
        with leads() as found:
            token(model, cache, 9 + t)
        assert found == [LAYERS] * (t >= 2)
    check(run_with(model, {}, {}))


def test_in_generate(model):
    with leads() as found:
        model.generate(IDS[:, :9], max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
        model.generate(IDS[:, :9], max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    # One of the eight comes from the prompt; another makes room.
    assert found[-6:] == [LAYERS] * 6


def in_place(index, x, layer):
    return x.mul_(1.5) if index == 2 else x


def by_index(index, x, layer):
    if index == 3:
        x[:, -1:, ::2] = 0.25
    return x


def of_a_view(index, x, layer):
    if index == 1:
        x.view(-1)[:3].add_(1)
    return x


def anew(index, x, layer):
    return x * 0.5 if index in (2, 4) else x


def same_values(index, x, layer):
    return x.clone() if index == 2 else x


@pytest.mark.parametrize("before", [in_place, by_index, of_a_view, anew, same_values])
def test_hidden_states_that_change_in_between(model, before):
    check(run_with(model, {"before": before}, {}, {"before": before}, {"before": before}, {}))


def test_hidden_states_written_after_the_next_layer_was_called(model):
    """Its input is no longer of interest; the next one's is."""
    seen = []

    def before(index, x, layer):
        if index == 0:
            seen.clear()
        seen.append(x)
        if index == 3:
            seen[2].zero_()
        return x

    check(run_with(model, {"before": before}, {}, {"before": before}))


def test_kept_hidden_states_stay_as_they_are(model):
    cache, _ = begun(model)
    seen, copies = [], []

    def before(index, x, layer):
        seen.append(x)
        copies.append(x.clone())
        return x

    for t in range(4):
        token(model, cache, 15 + t, before)
    for kept, copied in zip(seen, copies, strict=True):
        assert_bitwise(kept, copied)


@pytest.mark.parametrize(
    "order", [[0, 1], [0, 2, 4], [4, 3, 2, 1, 0], [1, 2, 3, 4], [0, 1, 1, 2], [3], [0, 1, 3, 2, 4]]
)
def test_other_layers_than_the_last_time(model, order):
    some = [model.model.layers[index] for index in order]
    check(run_with(model, {"layers": some}, {}, {"layers": some}, {"layers": some}, {"layers": some}, {}, {}))


def test_forwards_of_two_depths_compute_no_layer_in_vain(model):
    """Drafts by the first layers, and whole forwards."""
    short = list(model.model.layers)[:2]
    with counted() as counts:
        check(run_with(model, *[{"layers": short}, {"layers": short}, {}] * 3))
        cache, _ = begun(model)
        for t in range(9):
            before = counts[0]
            layers = short if t % 3 else None
            token(model, cache, 15 + t, layers=layers)
            if t > 1:  # nobody knew of the first short one
                assert counts[0] - before == (2 if layers else LAYERS), t


def test_layers_that_share_a_cache(made):
    """Each appends its own keys."""
    if made.family == "mistral":
        pytest.skip("Transformers makes masks for one token a call, which such windows have no row for")
    made.model.layers[3].self_attn.layer_idx = 2
    check(run_with(made, {}, {}, {}))


def test_a_layer_that_stands_twice(made):
    layers = list(made.model.layers)
    layers[3] = layers[2]
    check(run_with(made, *[{"layers": layers}] * 5))


def test_layers_that_are_removed(made):
    def run():
        layers = made.model.layers
        cache, results = begun(made)
        kept = layers[2]
        del layers[2]
        results += [token(made, cache, t) for t in range(15, 19)]
        layers.insert(1, kept)
        results += [token(made, cache, t) for t in range(19, 23)]
        layers.insert(2, layers.pop(1))
        return results + contents(cache)

    check(run)


def test_a_layer_that_nobody_keeps_goes(made):
    cache, _ = begun(made)
    gone = weakref.ref(made.model.layers[2])
    del made.model.layers[2]
    gc.collect()
    assert gone() is None
    token(made, cache, 15)


@pytest.mark.parametrize("change", ["replaced", "written", "a view of it written", "cropped"])
def test_caches_that_change_in_between(model, change):
    if change == "cropped" and model.family == "mistral":
        pytest.skip("Transformers crops no window that has dropped what would come back")

    def before(cache):
        def act(index, x, layer):
            if index == 2:
                later = cache.layers[4]
                if change == "replaced":
                    later.keys = later.keys * 0.5
                elif change == "written":
                    later.keys.mul_(0.5)
                elif change == "a view of it written":
                    later.values[:, 0, -1:].zero_()
                else:
                    later.crop(-1)
            return x

        return act

    def run():
        cache, results = begun(model)
        results.append(token(model, cache, 15, before(cache)))
        held = contents(cache)
        results += [] if change == "cropped" else [token(model, cache, t) for t in (16, 17)]
        return results + held

    check(run)


def test_layers_that_are_called_in_another_way(model):
    """With a keyword more, or with other tables, in some forwards or in all."""

    def run():
        cache, results = begun(model)
        for t in range(15, 22):
            x = model.model.embed_tokens(IDS[:, t : t + 1])
            tables = model.model.rotary_emb(x, torch.full((2, 1), cache.get_seq_length()))
            other = tables._replace(cos=tables.cos * 0.5)
            for index, layer in enumerate(model.model.layers):
                more = {"output_attentions": True} if index == 3 and t != 18 else {}
                given = other if index == 1 and t > 18 else tables
                x = layer(x, attention_mask=None, position_embeddings=given, **{layer.cache_keyword: cache}, **more)
            results.append(x)
        return results + contents(cache)

    check(run)


def test_caches_whose_update_is_another_one(model):
    """Of one cache, of one of its layers, of their class."""

    def halves(update):
        return lambda keys, *rest, **more: update(keys * 0.5, *rest, **more)

    def halves_of_self(update):
        return lambda self, keys, *rest, **more: update(self, keys * 0.5, *rest, **more)

    def run():
        results = []
        for where in ("cache", "layer", "class"):
            cache, begin = begun(model)
            with pytest.MonkeyPatch.context() as patch:
                if where == "cache":
                    patch.setattr(cache, "update", halves(cache.update))
                elif where == "layer":
                    patch.setattr(cache.layers[3], "update", halves(cache.layers[3].update))
                else:
                    patch.setattr(type(cache.layers[3]), "update", halves_of_self(type(cache.layers[3]).update))
                results += [*begin, *(token(model, cache, t) for t in (15, 16, 17))]
            results += [token(model, cache, 18), *contents(cache)]
        return results

    check(run)


def test_a_cache_that_asks_for_gradients_is_not_written_past_them(model, mode):
    def run():
        cache, results = begun(model)
        with torch.inference_mode(False), torch.enable_grad():
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.clone().requires_grad_(), layer.values.clone()
            with pytest.raises(RuntimeError, match="must not require grad"):
                token(model, cache, 15)
        return results

    check(run)


def test_pickled_caches_are_their_own(model):
    """What is written into a copy counts."""

    def run():
        cache, results = begun(model)
        copied = pickle.loads(pickle.dumps(cache))
        with torch.inference_mode(False), torch.no_grad():
            for layer in copied.layers:
                layer.keys = layer.keys.clone()
        results.append(token(model, copied, 15))
        with torch.inference_mode(False), torch.no_grad():
            again = pickle.loads(pickle.dumps(cache))
            for layer in again.layers:
                layer.keys[:, :, :1] = 0
        return [*results, *(token(model, again, t) for t in (15, 16)), *(token(model, cache, t) for t in (15, 16))]

    check(run)


def test_hidden_states_may_be_written_with_gradients(model, mode):
    cache, _ = begun(model)
    seen = []
    token(model, cache, 15, lambda index, x, layer: seen.append(x) or x)
    if mode == "inference_mode":
        return
    with torch.enable_grad():
        for x in seen[1:]:
            x += torch.nn.Parameter(torch.ones(x.shape[-1], dtype=x.dtype))
            assert x.requires_grad


def test_an_interrupt_leaves_no_row_that_is_half_there(model):
    """After each statement that tells a cache of its new rows."""

    class Stop(BaseException):
        pass

    for stop in range(1, 16):
        cache, _ = begun(model)
        before = [len(layer.keys[0, 0]) for layer in cache.layers]
        left = [stop]

        def trace(frame, event, argument, left=left):
            if frame.f_code is not rooms.Room.take.__code__:
                return trace if event == "call" else None
            if event == "line":
                left[0] -= 1
                if left[0] == 0:
                    raise Stop
            return trace

        sys.settrace(trace)
        try:
            token(model, cache, 15)
        except Stop:
            pass
        finally:
            sys.settrace(None)
        rows = [len(layer.keys[0, 0]) for layer in cache.layers]
        assert all(0 <= now - then <= 1 for now, then in zip(rows, before, strict=True))
        for layer in cache.layers:
            room = rooms._ROOMS.get(layer)
            if room is not None and room.last[0] is layer.keys and room.last[1] is layer.values:
                assert room.end - room.begin == len(layer.keys[0, 0])


def test_another_cache_for_some_layers(model):
    def run():
        cache, results = begun(model)
        other = copy.deepcopy(cache)
        layers = list(model.model.layers)
        x = model.model.embed_tokens(IDS[:, 15:16])
        at = torch.full((2, 1), cache.get_seq_length())
        tables = model.model.rotary_emb(x, at)
        for index, layer in enumerate(layers):
            given = other if index in (2, 3) else cache
            x = layer(x, attention_mask=None, position_embeddings=tables, **{layer.cache_keyword: given})
        return [*results, x, *contents(cache), *contents(other)]

    check(run)


def test_masks(model):
    """One for all layers; another object from some layer on; and one of other values."""
    rows = 16 if model.family != "mistral" else 4
    whole, some = torch.ones(2, 1, 1, rows, dtype=torch.bool), torch.ones(2, 1, 1, rows, dtype=torch.bool)
    some[1, :, :, :2] = False

    def masks(*of):
        return {"mask": lambda index: of[index % len(of)]}

    for of in ((whole,), (some,), (whole, some), (some, some, some, some.clone(), whole)):
        check(lambda of=of: run_with(model, masks(*of))())
    with leads() as found:
        run_with(model, masks(some))()
    assert found[-1] == LAYERS


def test_modules_that_are_replaced_in_between(made):
    later = made.model.layers[3]
    norm, o, own = later.input_layernorm, later.self_attn.o_proj, later.input_layernorm.eps
    with torch.inference_mode(False), torch.no_grad():
        other = copy.deepcopy(o)
        other.weight.scales.mul_(2)

    def eps(index, x, layer):
        norm.eps = 0.5 if index in (2, 3) else own
        return x

    def linear(index, x, layer):
        later.self_attn.o_proj = other if index in (2, 3) else o
        return x

    for before in (eps, linear):  # the first layer finds all as they were, and computes them ahead
        check(run_with(made, {"before": before}, {"before": before}, {"before": before}, {"layers": [later]}))


def test_hooks_that_come_in_between(made):
    seen = []

    def before(index, x, layer):
        if index == 2:
            attention = made.model.layers[3].self_attn
            handles.append(attention.register_forward_hook(lambda module, arguments, output: seen.append(output[0])))
        return x

    handles = []

    def run():
        seen.clear()
        results = run_with(made, {"before": before}, {})()
        for handle in handles:
            handle.remove()
        assert len(seen) == 2
        return [*results, *seen, *run_with(made, {})()]

    check(run)


def test_hooks_of_all_modules(made):
    def halve(module, arguments, output):
        return output * 0.5 if type(module).__name__ == "MLP" else None

    def run():
        cache, results = begun(made)
        handle = torch.nn.modules.module.register_module_forward_hook(halve)
        try:
            results += [token(made, cache, t) for t in (15, 16)]
        finally:
            handle.remove()
        return results + [token(made, cache, t) for t in (17, 18)]

    check(run)
    with leads() as found:
        run()
    assert found[-1] == LAYERS


def test_functions_of_classes_that_are_replaced(made):
    whole = MLP.forward

    def run():
        cache, results = begun(made)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MLP, "forward", lambda self, x, residual=None: 0.5 * whole(self, x, residual))
            results += [token(made, cache, t) for t in (15, 16)]
        return results + [token(made, cache, t) for t in (17, 18)]

    check(run)


def test_norms_whose_weight_is_no_parameter_any_more(made):
    norm = made.model.layers[2].input_layernorm

    class Twice(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    def run():
        cache, results = begun(made)
        parametrize.register_parametrization(norm, "weight", Twice())
        results += [token(made, cache, t) for t in (15, 16)]
        parametrize.remove_parametrizations(norm, "weight", leave_parametrized=False)
        return results + [token(made, cache, t) for t in (17, 18)]

    with torch.inference_mode(False), torch.no_grad():
        check(run)


def test_a_hook_on_one_layer_leaves_those_before_it(made):
    handle = made.model.layers[3].register_forward_hook(lambda module, arguments, output: output * 0.5)
    check(run_with(made, {}, {}))
    with leads() as found:
        run_with(made, {})()
    assert found == [3] * len(found)
    handle.remove()


def test_a_forward_that_fails(model):
    """The layers that were called have their keys, the others have not."""

    def before(index, x, layer):
        if index == 3:
            raise KeyError("stop")
        return x

    def run():
        cache, results = begun(model)
        for t in (15, 16):
            with pytest.raises(KeyError, match="stop"):
                token(model, cache, t, before)
            results += contents(cache)
        cache = DynamicCache(config=model.config)
        model(IDS[:, :9], past_key_values=cache)
        return results + [token(model, cache, t) for t in (9, 10, 11)]

    check(run)


def test_a_cache_that_was_copied_in_inference_mode(model):
    def run():
        with torch.inference_mode():
            cache, results = begun(model)
            other = copy.deepcopy(cache)
        with torch.inference_mode(False), torch.no_grad():
            for each in (other, cache):
                results += [token(model, each, t) for t in (15, 16, 17)]
        with torch.inference_mode():
            return [*results, token(model, other, 18), token(model, cache, 18)]

    check(run)


def test_what_is_kept_after_a_forward(model):
    """Neither results nor caches of layers that nobody has called."""
    cache, _ = begun(model)
    runs, init = [], blocks.Run.__init__

    def noted(self):
        init(self)
        runs.append(self.ahead)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks.Run, "__init__", noted)
        token(model, cache, 15)
        assert runs == [[]]
        runs.clear()
        token(model, cache, 16, layers=list(model.model.layers)[:2])
    outputs = [weakref.ref(ahead.output) for ahead in runs[0]]
    runs.clear()
    gc.collect()
    assert all(output() is None for output in outputs)
    last = weakref.ref(cache.layers[4].keys)
    del cache
    gc.collect()
    assert last() is None
