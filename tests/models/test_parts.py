"""Attention, MLP and residual stream are fused each where it is known."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qops
from qops import load_model, quantize_model, save_model
from qops.formats.folder import Folder
from qops.models import replacement
from qops.models.decoder import Attention, DecoderLayer, known_parts
from qops.nn import MLP, Int4Linear, RMSNorm
from qops.testing import assert_bitwise, generator
from tests.support.models.families import IDS, random_model

# Family -> whether attention, stream and the MLP of each layer are fused.
PARTS = {
    "llama": (True, True, (True, True, True)),
    "phi3": (True, True, (True, True, True)),
    "granite": (True, False, (True, True, True)),
    "mixtral": (True, True, (False, False, False)),
    "olmo2": (False, False, (True, True, True)),
    "qwen3_moe": (True, True, (False, True, False)),
}


@pytest.mark.parametrize("family", PARTS)
def test_known_parts_are_fused_and_the_others_said(family):
    attention, stream, mlps = PARTS[family]
    model = quantize_model(random_model(family))
    report = model.quantization_report
    assert report.not_fused is None and set(report.own) == {
        part for part, is_known in (("attention", attention), ("mlp", all(mlps)), ("stream", stream)) if not is_known
    }
    for part, reason in report.own.items():
        assert f", but not their {part}: {reason}" in str(report)
    for layer, is_known in zip(model.model.layers, mlps, strict=True):
        assert isinstance(layer, DecoderLayer) == stream
        assert isinstance(layer.self_attn, Attention) == attention
        assert isinstance(layer.mlp, MLP) == is_known
        # Norms and linears of other parts run on qops operators all the same.
        assert all(isinstance(module, RMSNorm) for name, module in layer.named_children() if "norm" in name)
        assert not attention or isinstance(layer.self_attn.o_proj, Int4Linear)
        assert attention or isinstance(layer.self_attn.q_proj, Int4Linear)


def test_a_part_of_another_class_stays_and_the_rest_is_fused():
    class Squared(type(random_model("llama").model.layers[0].mlp)):
        def forward(self, x):
            return super().forward(x) ** 2

    source = random_model("llama")
    source.model.layers[1].mlp.__class__ = Squared
    model, alone = quantize_model(copy.deepcopy(source)), quantize_model(source, fuse=False)
    assert model.qops_fusion.own == {"mlp": "Squared is not LlamaMLP"}
    layers = model.model.layers
    assert type(layers[1].mlp) is Squared and isinstance(layers[1].mlp.up_proj, Int4Linear)
    assert isinstance(layers[0].mlp, MLP) and isinstance(layers[1].self_attn, Attention)
    torch.testing.assert_close(model(IDS).logits, alone(IDS).logits, rtol=0, atol=2e-5 * alone(IDS).logits.abs().max())


def test_a_stream_with_more_than_known_parts_stays():
    source = random_model("phi3", resid_pdrop=0.5)
    known = known_parts(source)
    assert known.own == {"stream": "Phi3DecoderLayer has a part resid_attn_dropout that qops does not know"}
    model = quantize_model(source)
    assert isinstance(model.model.layers[0].self_attn, Attention) and not isinstance(
        model.model.layers[0], DecoderLayer
    )


@pytest.mark.parametrize("act_order", (False, True))
def test_a_merged_mlp_is_that_of_its_halves(act_order):
    rng = generator(0)
    gate, up = (nn.Linear(64, 96) for _ in range(2))
    merged = nn.Linear(64, 192)
    merged.weight.data, merged.bias.data = torch.cat((gate.weight, up.weight)), torch.cat((gate.bias, up.bias))
    canonical = qops.Int4Weight.quantize(torch.randn(64, 96, generator=rng), 32).canonical()
    perm = torch.randperm(96, generator=rng).int() if act_order else None
    down = Int4Linear(qops.Int4Weight.from_canonical(**canonical, kind="symmetric", perm=perm))
    x = torch.randn(5, 64, generator=rng)
    apart = MLP(Int4Linear.from_linear(gate, 32), Int4Linear.from_linear(up, 32), copy.deepcopy(down))
    given = Int4Linear.from_linear(merged, 32)
    state = copy.deepcopy(given.state_dict())
    whole = MLP.of_merged(given, down)
    assert whole.activates_in_gemm and whole.reordered == act_order
    assert_bitwise(whole(x), apart(x))
    assert "gate_up_proj.weight.qweight" in whole.state_dict()
    parts = whole.split()
    assert not parts["gate_up_proj"].weight.mixed_gate_up
    for linear, wanted in ((parts["gate_up_proj"], state), (parts["down_proj"], down.state_dict())):
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in linear.state_dict().items())


def test_gate_and_up_that_strips_cannot_mix_are_multiplied_after_the_product():
    merged, down = Int4Linear.from_linear(nn.Linear(64, 24), 32), nn.Linear(12, 64)
    mlp = MLP.of_merged(merged, down)
    x = torch.randn(3, 64, generator=generator(1))
    gate, up = merged(x).chunk(2, dim=-1)
    assert not mlp.activates_in_gemm
    assert_bitwise(mlp(x), down(qops.silu_mul(gate.contiguous(), up.contiguous())))


# Whose classes they are ----------------------------------------------------------------------------------------------


def namesake(original: type, **methods) -> type:
    """A subclass of a user's, with the name of Transformers' class."""
    return type(original.__name__, (original,), {"__module__": "elsewhere", **methods})


@pytest.mark.parametrize("part", ["self_attn", "mlp", ""])
def test_a_namesake_is_not_transformers_own(part):
    source = random_model("llama")
    found = source.model.layers[1].get_submodule(part)
    original = type(found)

    def forward(self, *args, **kwargs):
        out = original.forward(self, *args, **kwargs)
        return (-out[0], out[1]) if isinstance(out, tuple) else -out

    found.__class__ = namesake(original, forward=forward)
    model, alone = quantize_model(copy.deepcopy(source)), quantize_model(source, fuse=False)
    kind = {"self_attn": "attention", "mlp": "mlp", "": "stream"}[part]
    assert model.qops_fusion.own == {kind: f"elsewhere.{original.__name__} is not Transformers' own"}
    want = alone(IDS).logits
    torch.testing.assert_close(model(IDS).logits, want, rtol=0, atol=2e-5 * want.abs().max().item())


class Wrapper(nn.Module):
    """Around a layer, as those who steer or skip layers write them."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        return self.block(*args, **kwargs)


class Forwarding(Wrapper):
    def __getattr__(self, name):
        return super().__getattr__(name) if name == "block" else getattr(super().__getattr__("block"), name)


@pytest.mark.parametrize("kind", [Wrapper, Forwarding])
def test_layers_in_wrappers_stay(kind):
    source = random_model("llama")
    source.model.layers[1] = kind(source.model.layers[1])
    model, alone = quantize_model(copy.deepcopy(source)), quantize_model(source, fuse=False)
    assert set(model.qops_fusion.own) == {"attention", "mlp", "stream"}
    assert isinstance(model.model.layers[0].mlp, MLP) and type(model.model.layers[1]) is kind
    want = alone(IDS).logits
    torch.testing.assert_close(model(IDS).logits, want, rtol=0, atol=2e-5 * want.abs().max().item())


# What is recorded ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PARTS)
def test_what_was_recorded_before_is_recorded_once_after(family):
    source = random_model(family, attn_implementation="eager")
    kinds = ("hidden_states", "attentions", *(("router_logits",) if family in ("mixtral", "qwen3_moe") else ()))
    asked = {f"output_{kind}": True for kind in kinds}
    before = source(IDS, **asked)
    after, alone = (quantize_model(copy.deepcopy(source), fuse=fuse)(IDS, **asked) for fuse in (True, False))
    for kind in kinds:
        found, want = after[kind], alone[kind]
        assert len(found) == len(want) == len(before[kind]), kind
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * b.abs().max().item())


@pytest.mark.parametrize("changed", (False, True))
def test_frequencies_of_a_cast_model_are_its_owners(changed):
    source = random_model("llama")
    if changed:
        source.model.rotary_emb.inv_freq.mul_(0.3)
    want = source.model.rotary_emb.inv_freq.clone()
    model = quantize_model(source.bfloat16())
    found = model.model.rotary_emb.rotary.inv_freq
    assert found.dtype == (torch.bfloat16 if changed else torch.float32)
    torch.testing.assert_close(found.float(), want, rtol=2**-8 if changed else 0, atol=0)


# Nothing is looked at twice ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_each_norm_is_asked_once_what_it_computes(family, monkeypatch):
    source, asked = random_model(family), Counter()
    norms = [module for module in source.modules() if replacement.looks_like_norm(module)]

    def spy(module, original=replacement.norm_style):
        asked[id(module)] += 1
        return original(module)

    monkeypatch.setattr(replacement, "norm_style", spy)
    quantize_model(source, "int8")
    assert len(asked) == len(norms) and set(asked.values()) == {1}


def test_each_tensor_of_a_checkpoint_is_read_once(tmp_path, monkeypatch):
    save_model(quantize_model(random_model("llama", tie_word_embeddings=True), skip_default=False), tmp_path)
    read, tensor = Counter(), Folder.tensor

    def spy(self, name):
        read[name] += 1
        return tensor(self, name)

    monkeypatch.setattr(Folder, "tensor", spy)
    model = load_model(tmp_path)
    assert "relative error" in model.qops_fusion.proof
    assert set(read) == set(load_file(tmp_path / "model.safetensors")) and set(read.values()) == {1}


def test_each_linear_is_quantised_once(monkeypatch):
    source, quantize, count = random_model("llama"), qops.Int4Weight.quantize, Counter()
    own = {parameter.data_ptr() for parameter in source.parameters()}

    def spy(weight, *args, **kwargs):
        if weight.data_ptr() in own:  # and no trial of the device
            count[weight.data_ptr()] += 1
        return quantize(weight, *args, **kwargs)

    monkeypatch.setattr(qops.Int4Weight, "quantize", spy)
    quantize_model(source)
    assert len(count) == 21 and set(count.values()) == {1}


def tables_of(rotary, position, dtype=torch.bfloat16):
    return rotary(torch.zeros(1, 1, 64, dtype=dtype), torch.tensor([[position]]))


@pytest.mark.parametrize("change", ["none", "frequencies", "written", "scaling", "hook", "restored", "class"])
def test_tables_of_one_token_are_those_that_transformers_computes(change, monkeypatch):
    """Rows that were computed for other tokens, as long as what makes them is the same."""
    model = quantize_model(random_model("llama", dtype=torch.bfloat16))
    tables, plain = model.model.rotary_emb, copy.deepcopy(model.model.rotary_emb)
    plain._known = lambda position_ids: None
    for position in (0, 3, 255, 256, 257, 4000, 255, 70_000):
        got, want = tables_of(tables, position), tables_of(plain, position)
        assert_bitwise(got.cos, want.cos)
        assert_bitwise(got.sin, want.sin)
    assert tables.rows is not None and plain.rows is None
    calls, kind = Counter(), type(tables.rotary)
    if change == "class":
        whole = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, x, ids: [0.5 * table for table in whole(self, x, ids)])
    for each in (tables, plain):
        tables_of(each, 70_001)
        rotary, before = each.rotary, each.rotary.inv_freq.clone()
        if change == "frequencies":
            rotary.inv_freq = rotary.inv_freq * 0.5
        elif change in ("written", "restored"):
            rotary.inv_freq.mul_(0.5)
        elif change == "scaling":
            rotary.attention_scaling = 0.5
        elif change == "hook":
            rotary.register_forward_hook(lambda module, arguments, output: calls.update(["hook"]))
        if change == "restored":
            tables_of(each, 70_001)
            rotary.inv_freq.copy_(before)
    got, want = tables_of(tables, 70_001), tables_of(plain, 70_001)
    assert_bitwise(got.cos, want.cos)
    assert_bitwise(got.sin, want.sin)
    assert calls["hook"] == 2 * (change == "hook")


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_tables_that_grow_with_the_sequence_are_computed_for_each_token(rope_type):
    factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16} if rope_type == "longrope" else {}
    scaling = {
        "rope_type": rope_type,
        "rope_theta": 1e4,
        "factor": 2.0,
        "original_max_position_embeddings": 32,
        **factors,
    }
    model = quantize_model(random_model("llama", dtype=torch.bfloat16, head_dim=32, rope_parameters=scaling))
    tables = model.model.rotary_emb
    first, later = tables_of(tables, 40), tables_of(tables, 4000)
    assert tables.rows is None
    fresh = tables.rotary(torch.zeros(1), torch.tensor([[4000]]))[0][0, :, :16]
    assert_bitwise(later.cos, fresh)
    assert first.cos.shape == later.cos.shape
