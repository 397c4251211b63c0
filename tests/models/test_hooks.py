"""Hooks before and after quantize_model: no probe fires one, none is lost, each sees Transformers' tensors."""

from __future__ import annotations

import pytest
import torch

from qops import quantize_model
from qops.models.decoder import DecoderLayer
from qops.models.replacement import is_fused
from tests.support.models.families import FUSED, IDS, PARTLY, random_model

SCHEMES = ("int4", "int8")
# Of a fused layer: q, k and v, like gate and up, are one product.
INSIDE = {
    "",
    "input_layernorm",
    "self_attn",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "mlp",
    "mlp.down_proj",
}


def names(model):
    """The modules that fused models share with others, by name."""
    inside = [
        f"model.layers.{index}.{name}".rstrip(".")
        for index, layer in enumerate(model.model.layers)
        for name, _ in layer.named_modules()
        if name in INSIDE
    ]
    return [*inside, "model.embed_tokens", "model.norm", "lm_head", "model"]


def tensor(value):
    return value[0] if isinstance(value, tuple) else value


def seen_by_hooks(model, which):
    """(input, output) of each module, for those whose input Transformers gives by position or as hidden_states."""
    seen, handles = {}, []
    for name in which:

        def hook(module, args, kwargs, output, name=name):
            given = args[0] if args else kwargs.get("hidden_states")
            seen[name] = (given, tensor(output) if isinstance(tensor(output), torch.Tensor) else None)

        handles.append(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
    logits = model(IDS).logits
    for handle in handles:
        handle.remove()
    return seen, logits


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", [*FUSED, *PARTLY])
def test_hooks_see_what_they_see_in_transformers_layers(family, scheme):
    fused = quantize_model(random_model(family), scheme)
    alone = quantize_model(random_model(family), scheme, fuse=False)
    assert is_fused(fused)
    which = names(fused)
    before = fused(IDS).logits
    found, logits = seen_by_hooks(fused, which)
    wanted, _ = seen_by_hooks(alone, which)
    assert found.keys() == wanted.keys() == set(which)
    assert torch.equal(logits, before)
    for name in which:
        for got, want in zip(found[name], wanted[name], strict=True):
            assert (got is None) == (want is None), name
            if got is not None:
                # Products by other sums of attention; an int8 code may fall to the other side of a half.
                assert got.shape == want.shape and got.dtype == want.dtype, name
                error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
                assert error < (1e-5 if scheme == "int4" else 2e-2), name


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("name", sorted(INSIDE))
def test_one_hook_is_enough(family, name):
    model = quantize_model(random_model(family), "int8")
    alone = quantize_model(random_model(family), "int8", fuse=False)
    name = f"model.layers.1.{name}".rstrip(".")
    if name not in names(model):
        pytest.skip("not in this family")
    (found, _), (wanted, _) = seen_by_hooks(model, [name]), seen_by_hooks(alone, [name])
    for got, want in zip(found[name], wanted[name], strict=True):
        torch.testing.assert_close(got, want, atol=0.02 * float(want.abs().max()), rtol=0)


@pytest.mark.parametrize("skip", [(), ("down_proj",), ("o_proj", "down_proj")])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_hook_that_changes_what_a_layer_returns(family, skip):
    """As steering does; in layers that end in a dense linear or in a norm too."""
    changed = []
    for fuse in (True, False):
        model = quantize_model(random_model(family), skip=skip, fuse=fuse)
        layer = model.model.layers[1]
        handles = [
            layer.register_forward_hook(lambda module, args, output: 1.5 * output),
            layer.mlp.register_forward_pre_hook(lambda module, args: (args[0] + 0.5,)),
            layer.self_attn.register_forward_hook(lambda module, args, output: (0.5 * output[0], output[1])),
        ]
        steered = model(IDS).logits
        for handle in handles:
            handle.remove()
        changed.append((steered, model(IDS).logits))
    (fused, after), (alone, plain) = changed
    torch.testing.assert_close(fused, alone, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(after, plain, atol=2e-5, rtol=2e-5)
    assert (fused - after).abs().max() > 0.1


@pytest.mark.parametrize(
    "part", ["mlp", "self_attn", "mlp.down_proj", "self_attn.o_proj", "input_layernorm", "self_attn.q_norm"]
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_forward_that_somebody_replaces_sees_what_it_sees_in_transformers_layers(family, part):
    outputs = []
    for fuse in (True, False):
        model = quantize_model(random_model(family), fuse=fuse)
        model(IDS)
        if f"model.layers.1.{part}" not in names(model):
            pytest.skip("not in this family")
        module = model.model.layers[1].get_submodule(part)
        original = module.forward

        def changed(*args, original=original, **kwargs):
            out = original(*args, **kwargs)
            # Not by a factor, which a norm behind it takes back.
            return (out[0].roll(1, -1), *out[1:]) if isinstance(out, tuple) else out.roll(1, -1)

        before = model(IDS).logits
        module.forward = changed
        outputs.append((before, model(IDS).logits))
        del module.forward
        assert torch.equal(model(IDS).logits, before)
    (before, fused), (_, alone) = outputs
    torch.testing.assert_close(fused, alone, atol=2e-5, rtol=2e-5)
    assert (fused - before).abs().max() > 1e-3


def test_layers_are_fused_again_when_their_hooks_are_gone():
    model = quantize_model(random_model("llama"), "int8")
    layer = model.model.layers[0]
    handle = layer.mlp.register_forward_hook(lambda *_: None)
    model(IDS)
    assert layer.watched and not layer.input_layernorm.int8
    assert not model.model.layers[1].watched
    handle.remove()
    model(IDS)
    assert not layer.watched and layer.input_layernorm.int8


def test_recorded_hidden_states_leave_layers_fused():
    model = quantize_model(random_model("llama"))
    states = model(IDS, output_hidden_states=True).hidden_states
    assert len(states) == 1 + 3 and not any(layer.watched for layer in model.model.layers)


def test_hooks_of_all_modules_see_every_call():
    from torch.nn.modules.module import register_module_forward_hook

    model = quantize_model(random_model("llama"))
    calls = []
    handle = register_module_forward_hook(lambda module, args, output: calls.append(type(module).__name__))
    try:
        model(IDS)
    finally:
        handle.remove()
    assert calls.count("FusedLlamaDecoderLayer") == 3 and calls.count("RMSNorm") == 7


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("where", ["lm_head", "model.norm", "model.embed_tokens", "model"])
def test_hooks_outside_the_layers_go_over_to_what_replaces_them(where, fuse):
    source = random_model("llama")
    calls = []
    handle = source.get_submodule(where).register_forward_hook(lambda module, args, output: calls.append(module))
    source.get_submodule(where).register_forward_pre_hook(lambda module, args: calls.append(args))
    model = quantize_model(source, skip_default=False, fuse=fuse)
    assert calls == [] and is_fused(model) == fuse
    model(IDS)
    assert len(calls) == 2 and calls[1] is model.get_submodule(where)
    handle.remove()
    model(IDS)
    assert len(calls) == 3


@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "kwargs"])
@pytest.mark.parametrize("where", ["", "self_attn.q_proj", "input_layernorm", "mlp.act_fn"])
def test_layers_that_have_hooks_already_are_not_fused(where, kind):
    source = random_model("llama")
    calls = []
    module = source.model.layers[1].get_submodule(where)
    register, hook = {
        "forward": (module.register_forward_hook, lambda module, args, output: calls.append(output)),
        "pre": (module.register_forward_pre_hook, lambda module, args: calls.append(args)),
        "backward": (module.register_full_backward_hook, lambda module, grad_input, grad_output: None),
        "kwargs": (
            lambda hook: module.register_forward_pre_hook(hook, with_kwargs=True),
            lambda module, args, kwargs: calls.append(args),
        ),
    }[kind]
    register(hook)
    name = f"model.layers.1.{where}".rstrip(".")
    with pytest.warns(
        UserWarning, match=rf"stay Transformers' own.*: {name} has hooks, which a fused layer would lose"
    ):
        model = quantize_model(source)
    assert calls == []
    assert not any(isinstance(layer, DecoderLayer) for layer in model.model.layers)
    model(IDS)
    assert len(calls) == (kind != "backward")


def test_recording_hooks_of_transformers_do_not_stand_in_the_way():
    source = random_model("llama")
    wanted = source(IDS, output_hidden_states=True).hidden_states
    model = quantize_model(source)
    assert is_fused(model)
    found = model(IDS, output_hidden_states=True).hidden_states
    assert len(found) == len(wanted)
