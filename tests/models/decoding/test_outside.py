"""Decoding steps where somebody outside changes the rules: windows, modes of torch, classes, swapped tensors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from qops import quantize_model
from qops.testing import assert_bitwise
from tests.support.models.block_runs import IDS
from tests.support.models.families import random_model


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode(False), torch.no_grad():
        yield


def pair(family: str = "llama", **changes: Any) -> tuple[Any, Any]:
    """A fused model, and the same quantised linears in Transformers' own layers."""
    return tuple(quantize_model(random_model(family, **changes), prove=False, fuse=fuse) for fuse in (True, False))


def warm(model: Any, tokens: int = 12, cache: Any = None) -> Any:
    """A cache of so many tokens, of which the last ones came one by one."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    model(IDS[:1, : tokens - 5], past_key_values=cache)
    for t in range(tokens - 5, tokens):
        model(IDS[:1, t : t + 1], past_key_values=cache)
    return cache


def step(model: Any, cache: Any, **arguments: Any) -> torch.Tensor:
    at = cache.get_seq_length()
    return model(IDS[:1, at : at + 1], past_key_values=cache, **arguments).logits


def check_close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


# Gemma 3's caches need some window.
@pytest.mark.parametrize("family, window", [("mistral", None), ("mistral", 64), ("mistral", 2), ("gemma3", 64)])
def test_a_window_that_is_changed_in_the_config(family, window):
    """Transformers' SDPA has none: masks and caches, which are made of the config, have."""
    ours, theirs = pair(family)
    logits = []
    for model in (ours, theirs):
        model.config.sliding_window = window
        cache = warm(model)
        logits.append([step(model, cache) for _ in range(4)])
    for got, want in zip(*logits, strict=True):
        check_close(got, want)


def test_no_mask_is_no_window():
    """Given by a caller, with caches that keep every token."""
    none = {"full_attention": None, "sliding_attention": None}
    logits = [step(model, warm(model, cache=DynamicCache()), attention_mask=none) for model in pair("gemma3")]
    check_close(*logits)


def test_a_graph_that_is_traced_from_a_step_takes_positions():
    model, _ = pair()
    held = [(layer.keys.clone(), layer.values.clone()) for layer in warm(model).layers]

    def run(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        for layer, (keys, values) in zip(cache.layers, held, strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        return model(inputs_embeds=x, position_ids=position, past_key_values=cache).logits

    x = model.model.embed_tokens(IDS[:1, 12:13])
    graph = make_fx(run)(x, torch.tensor([[12]]))
    for position in (12, 30):
        check_close(graph(x, torch.tensor([[position]])), run(x, torch.tensor([[position]])))


def test_layers_of_a_cache_whose_class_changes():
    class Halved(DynamicLayer):
        def update(self, keys, values, *args, **kwargs):
            return super().update(keys * 0.5, values * 0.5, *args, **kwargs)

    logits = []
    for model in pair():
        cache = warm(model)
        for layer in cache.layers:
            layer.__class__ = Halved
        logits.append(step(model, cache))
    check_close(*logits)


class Doubled(torch.Tensor):
    """Stands for twice its numbers in the operators of qops."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        def plain(x: Any) -> Any:
            return x.as_subclass(torch.Tensor) * 2 if isinstance(x, cls) else x

        return function(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


@pytest.mark.parametrize("part, name", [("input_layernorm", "weight"), ("self_attn.o_proj", "bias")])
def test_a_tensor_of_a_class_of_its_own_has_its_say(part, name):
    model, _ = pair()
    logits = []
    for make in (lambda t: t.as_subclass(Doubled), lambda t: t * 2):
        changed = copy.deepcopy(model)
        cache = warm(changed)
        parameters = changed.model.layers[1].get_submodule(part)._parameters
        parameters[name] = make(parameters[name].detach().clone())
        logits.append([step(changed, cache) for _ in range(3)])
    for got, want in zip(*logits, strict=True):
        check_close(got, want)


def test_a_state_that_is_swapped_in_after_decoding():
    model, _ = pair()
    other = quantize_model(random_model("llama", seed=5), prove=False)
    want = step(other, warm(other))
    warm(model)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(other.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_bitwise(step(model, warm(model)), want)


def test_embeddings_of_any_strides():
    model, _ = pair()
    x = model.model.embed_tokens(IDS[:1, 12:13])
    strided = torch.stack((x, x), dim=-1)[..., 0]
    assert strided.stride(-1) == 2
    want = model(inputs_embeds=x, past_key_values=warm(model)).logits
    check_close(model(inputs_embeds=strided, past_key_values=warm(model)).logits, want)


def test_a_tracer_in_the_place_of_every_call_sees_the_parts(monkeypatch):
    model, _ = pair()
    cache, called = warm(model), []
    call = nn.Module.__call__

    def traced(self, *args, **kwargs):
        called.append(type(self).__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", traced)
    step(model, cache)
    assert called.count("MLP") == len(model.model.layers)
