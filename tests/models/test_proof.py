"""Fused layers against Transformers' own, where they are made: agreement, and one planted fault for each part."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import qops.models.proof
from qops import load_model, quantize_model, save_model
from qops.models.blocks import AttentionHalf, MlpHalf, Run
from qops.models.decoder import (
    ARCHITECTURES,
    Attention,
    DecoderLayer,
    _unknown_call,
    cache_keyword,
    fused_class,
    known_parts,
)
from qops.models.replacement import is_fused
from qops.models.rotary_tables import RotaryTables, Shared
from qops.nn import MLP, Int8Rows, MergedLinear, RMSNorm, frozen
from tests.support.models.families import FUSED, IDS, PARTLY, random_model

SCHEMES = ("int4", "int8")


@pytest.fixture(autouse=True)
def new_classes():
    """Transformers wraps the forward of a layer when its class is made, so a planted one needs a new class."""
    fused_class.cache_clear()
    yield
    fused_class.cache_clear()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", [*FUSED, *PARTLY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_installed_transformers_agrees(family, scheme, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = quantize_model(random_model(family, dtype=dtype), scheme)
    fusion = model.qops_fusion
    assert fusion.not_fused is None and is_fused(model)
    error, rounded = map(float, re.findall(r"(\d\S*e-\d+)", fusion.proof + (" 1e-9" if scheme == "int4" else "")))
    assert 0 < error < 3e-6 and 0 < rounded < 3e-2, fusion.proof


def test_activations_that_round_the_other_way_are_no_fault():
    """Of these random layers most rows then differ by 1e-2: proven is what does not round."""
    torch.manual_seed(5)
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=2, **wide)).bfloat16()
    assert quantize_model(model, "int8").qops_fusion.not_fused is None


def test_one_layer_of_each_kind_is_run(monkeypatch):
    built = []
    init = DecoderLayer.__init__

    def spy(self, original, *parts):
        init(self, original, *parts)
        built.append(original.self_attn.layer_idx)

    monkeypatch.setattr(DecoderLayer, "__init__", spy)
    # Layer 2 alone keeps a dense linear; layers 1 and 2 have sliding windows; layer 3 is like layer 1.
    model = random_model("qwen2", num_hidden_layers=4)
    quantize_model(model, skip=("model.layers.2.mlp.up_proj",))
    assert model.qops_fusion.proof.startswith("layer 0, 1, 2 of 4 in float32")
    assert built == [0, 1, 2, 0, 1, 2, 3]


def test_a_proof_changes_nothing(monkeypatch):
    source = random_model("llama", dtype=torch.bfloat16)
    before = {name: (tensor, tensor.clone()) for name, tensor in source.state_dict(keep_vars=True).items()}
    config = source.config.to_dict()

    def stop(self, *parts):
        raise KeyboardInterrupt

    monkeypatch.setattr(DecoderLayer, "__init__", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(source)
    after = source.state_dict(keep_vars=True)
    assert after.keys() == before.keys() and source.config.to_dict() == config
    for name, (tensor, copied) in before.items():
        assert after[name] is tensor and torch.equal(tensor, copied)


def test_without_proof_the_report_says_so(tmp_path):
    model = quantize_model(random_model("llama"), prove=False)
    assert is_fused(model) and "proof: not made: prove=False" in str(model.quantization_report)
    save_model(model, tmp_path)
    assert load_model(tmp_path, prove=False).qops_fusion.proof == "not made: prove=False"
    assert "relative error" in load_model(tmp_path).qops_fusion.proof


# Faults --------------------------------------------------------------------------------------------------------------


def attention_gets(change):
    """`change` acts on the keywords of attention, and may return others in their place."""

    def plant(monkeypatch):
        forward = Attention.forward

        def faulty(self, hidden_states, *args, residual=None, **kwargs):
            change(kwargs, hidden_states.q if hasattr(hidden_states, "q") else hidden_states)
            return forward(self, hidden_states, *args, residual=residual, **kwargs)

        monkeypatch.setattr(Attention, "forward", faulty)

    return plant


def without(name):
    return attention_gets(lambda kwargs, x: kwargs.pop(name, None))


def without_cache(kwargs, x):
    kwargs.update(dict.fromkeys(kwargs.keys() & {"cache", "past_key_values"}))


def no_mask(kwargs, x):
    kwargs["attention_mask"] = None


def without_mask_in_a_step(step):
    return lambda self, x, shared, mask, cache: step(self, x, shared, None, cache)


def scaled_in_a_step(step):
    """Of a half by its block operator."""
    return lambda self, x, *rest: None if (y := step(self, x, *rest)) is None else 1.01 * y


def mirrored_ahead(following):
    """Of a layer that was computed ahead; the final norm would take a factor away."""
    return lambda self, *rest: None if (y := following(self, *rest)) is None else y.flip(-1)


def tables(change):
    return attention_gets(lambda kwargs, x: kwargs.update(position_embeddings=change(kwargs["position_embeddings"])))


def built(change):
    """`change` acts on a layer that was just built."""

    def plant(monkeypatch):
        init = DecoderLayer.__init__

        def faulty(self, original, part):
            init(self, original, part)
            change(self)

        monkeypatch.setattr(DecoderLayer, "__init__", faulty)

    return plant


def scaled_norm(path):
    def change(layer):
        norm = layer.get_submodule(path)
        norm.weight = frozen(1.01 * norm.weight)

    return built(change)


def scaled_bias(path):
    def change(layer):
        linear = layer.get_submodule(path)
        linear.bias = frozen(0.9 * linear.bias)

    return built(change)


def method(owner, name, make):
    def plant(monkeypatch):
        monkeypatch.setattr(owner, name, make(getattr(owner, name)))

    return plant


def swapped(first, second):
    """The rows of two parts of a merged linear change places."""

    def make(init):
        def faulty(self, parts):
            if first in parts:
                parts = {**parts, first: parts[second], second: parts[first]}
            init(self, parts)

        return faulty

    return method(MergedLinear, "__init__", make)


def loses_residual(owner):
    def make(forward):
        def faulty(self, x, *args, residual=None, **kwargs):
            if args:
                residual, args = args[0], args[1:]
            lost = None if residual is None else torch.zeros_like(residual)
            return forward(self, x, *args, residual=lost, **kwargs)

        return faulty

    return method(owner, "forward", make)


def fails(self, *args, **kwargs):
    raise TypeError("forward() got an unexpected keyword argument 'layer_cache'")


FAULTS = {
    "attention_mask, prompt": ("llama", attention_gets(no_mask)),
    "attention_mask, one token": ("llama", method(AttentionHalf, "step", without_mask_in_a_step)),
    "attention, one token": ("llama", method(AttentionHalf, "step", scaled_in_a_step)),
    "MLP, one token": ("llama", method(MlpHalf, "step", scaled_in_a_step)),
    "layers ahead": ("llama", method(Run, "_taken", mirrored_ahead)),
    "cache": ("llama", attention_gets(without_cache)),
    "cache of another layer": ("llama", built(lambda layer: setattr(layer.self_attn, "layer_idx", 0))),
    "position_ids": ("llama", without("position_ids")),
    "use_cache": ("llama", without("use_cache")),
    "keywords that nobody knows": ("llama", without("qops_unknown_keyword")),
    "sliding_window": ("mistral", built(lambda layer: layer.self_attn.extras.pop("sliding_window"))),
    "another sliding_window": ("gemma3", built(lambda layer: layer.self_attn.extras.update(sliding_window=5))),
    "softcap": ("gemma2", built(lambda layer: layer.self_attn.extras.update(softcap=None))),
    "scaling": ("gemma2", built(lambda layer: setattr(layer.self_attn, "scaling", 1.01 * layer.self_attn.scaling))),
    "positions of a batch": ("llama", tables(lambda shared: shared._replace(positions=None))),
    "cos and sin": ("llama", tables(lambda shared: shared._replace(cos=shared.sin, sin=shared.cos))),
    "direction of rotation": ("llama", tables(lambda shared: shared._replace(sin=-shared.sin))),
    "rotation": ("llama", built(lambda layer: setattr(layer.self_attn, "rotates", False))),
    "rotation where there is none": ("smollm3", built(lambda layer: setattr(layer.self_attn, "rotates", True))),
    "input_layernorm": ("llama", scaled_norm("input_layernorm")),
    "post_attention_layernorm": ("llama", scaled_norm("post_attention_layernorm")),
    "post_attention_layernorm, gemma3": ("gemma3", scaled_norm("post_attention_layernorm")),
    "pre_feedforward_layernorm": ("gemma3", scaled_norm("pre_feedforward_layernorm")),
    "post_feedforward_layernorm": ("gemma3", scaled_norm("post_feedforward_layernorm")),
    "q_norm": ("qwen3", scaled_norm("self_attn.q_norm")),
    "k_norm": ("gemma3", scaled_norm("self_attn.k_norm")),
    "epsilon": ("llama", built(lambda layer: setattr(layer.input_layernorm, "eps", 1e-4))),
    "offset of Gemma's norms": ("gemma", built(lambda layer: setattr(layer.input_layernorm, "weight_offset", 0.99))),
    "k and v": ("llama", swapped("k_proj", "v_proj")),
    "gate and up": ("llama", swapped("gate_proj", "up_proj")),
    "bias of o": ("llama", scaled_bias("self_attn.o_proj")),
    "bias of down": ("llama", scaled_bias("mlp.down_proj")),
    "residual of attention": ("llama", loses_residual(Attention)),
    "residual of the MLP": ("llama", loses_residual(MLP)),
    "residual of Gemma 3": (
        "gemma3",
        method(RMSNorm, "add", lambda add: lambda self, x, residual: add(self, x, 0.99 * residual)),
    ),
    "activation": ("gemma", built(lambda layer: setattr(layer.mlp, "act", nn.functional.silu))),
    "query heads of a key/value head": (
        "llama",
        built(lambda layer: setattr(layer.self_attn, "num_key_value_groups", 1)),
    ),
    "rotary tables": (
        "llama",
        method(RotaryTables, "forward", lambda f: lambda self, *a, **k: f(self, *a, **k)._replace(is_sdpa=False)[:0]),
    ),
    "a keyword that raises": ("llama", method(DecoderLayer, "forward", lambda forward: fails)),
    "NaN": (
        "llama",
        method(
            DecoderLayer,
            "forward",
            lambda f: lambda self, *a, **k: f(self, *a, **k).index_fill(1, torch.tensor(0), torch.nan),
        ),
    ),
}


# Block operators take no 8-bit activations.
OF_BLOCKS = {name for name in FAULTS if name.endswith(", one token")}


@pytest.mark.parametrize(
    ("fault", "scheme"),
    [(fault, scheme) for fault in FAULTS for scheme in SCHEMES if scheme == "int4" or fault not in OF_BLOCKS],
)
def test_each_fault_is_noticed(fault, scheme, monkeypatch):
    family, plant = FAULTS[fault]
    alone = quantize_model(random_model(family), scheme, fuse=False)
    plant(monkeypatch)
    with pytest.warns(UserWarning, match="stay Transformers' own, with qops linears and norms") as seen:
        model = quantize_model(random_model(family), scheme)
    monkeypatch.undo()
    assert len([warning for warning in seen if warning.category is UserWarning]) == 1
    report = model.quantization_report
    assert not is_fused(model) and "failed" in report.proof
    assert report.not_fused in str(seen[0].message) and report.not_fused in str(report)
    assert torch.equal(model(IDS).logits, alone(IDS).logits)


def test_faults_of_rows_in_int8_alone_are_noticed(monkeypatch):
    """Which linears that do not round never see."""
    forward = RMSNorm.forward

    def doubled(self, x):
        rows = forward(self, x)
        return rows._replace(scale=2 * rows.scale) if isinstance(rows, Int8Rows) else rows

    monkeypatch.setattr(RMSNorm, "forward", doubled)
    with pytest.warns(UserWarning, match="the fused layers differ from Transformers' by"):
        model = quantize_model(random_model("llama"), "int8")
    monkeypatch.undo()
    assert not is_fused(model) and "failed" in model.quantization_report.proof


def test_the_difference_says_where_it_is(monkeypatch):
    FAULTS["attention_mask, one token"][1](monkeypatch)
    with pytest.warns(UserWarning, match=r"differ from Transformers' by .*first in: two sequences, cached step 1"):
        quantize_model(random_model("llama"))
    monkeypatch.undo()
    FAULTS["use_cache"][1](monkeypatch)
    with pytest.warns(UserWarning, match=r"attention function gets \[\{.*, from Transformers' layers \[\{.*use_cache"):
        quantize_model(random_model("llama"))
    monkeypatch.undo()
    fused_class.cache_clear()
    FAULTS["a keyword that raises"][1](monkeypatch)
    with pytest.warns(UserWarning, match=r"fused layers did not run: TypeError: .*layer_cache"):
        quantize_model(random_model("llama"))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_folder_of_fused_layers_is_loaded_right_when_they_differ(family, monkeypatch, tmp_path):
    model = quantize_model(random_model(family))
    save_model(model, tmp_path)
    FAULTS["cache"][1](monkeypatch)
    with pytest.warns(UserWarning, match="stay Transformers' own"):
        loaded = load_model(tmp_path, torch.float32)
    monkeypatch.undo()
    assert not is_fused(loaded) and loaded.qops_fusion.not_fused is not None
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=2e-5, rtol=2e-5)


def test_layers_that_do_not_run_are_not_fused(monkeypatch):
    """Transformers' own, in a proof: then nothing can be said of ours."""
    monkeypatch.setattr(qops.models.proof._Copy, "theirs", fails)
    with pytest.warns(UserWarning, match="Transformers' own layers did not run: TypeError"):
        model = quantize_model(random_model("llama"))
    assert not is_fused(model) and model.qops_fusion.proof.endswith("not made")


# Signatures ----------------------------------------------------------------------------------------------------------


class Known(nn.Module):
    def forward(self, hidden_states, attention_mask=None, cache=None, **kwargs): ...


class Older(nn.Module):
    def forward(self, hidden_states, past_key_values=None, **kwargs): ...


class WithBoth(nn.Module):
    def forward(self, hidden_states, cache=None, past_key_values=None, **kwargs): ...


class WithMore(nn.Module):
    def forward(self, hidden_states, cache=None, ring=None, *, depth=0, **kwargs): ...


class WithoutCache(nn.Module):
    def forward(self, hidden_states, state=None, **kwargs): ...


class WithoutFurther(nn.Module):
    def forward(self, hidden_states, cache=None): ...


@pytest.mark.parametrize(
    ("original", "cache", "reason"),
    [
        (Known, "cache", None),
        (Older, "past_key_values", None),
        (WithBoth, "cache", "WithBoth.forward takes past_key_values, which qops does not know"),
        (WithMore, "cache", "WithMore.forward takes ring, depth, which qops does not know"),
        (WithoutCache, None, "WithoutCache.forward takes neither cache nor past_key_values"),
        (WithoutFurther, "cache", "WithoutFurther.forward takes no further keywords"),
    ],
)
def test_a_keyword_is_known_or_its_layer_is_not_fused(original, cache, reason):
    assert cache_keyword(original) == cache
    assert _unknown_call(original, frozenset(("hidden_states", "attention_mask"))) == reason


def test_an_architecture_is_known_by_its_module_and_its_name():
    source = random_model("llama")
    namesake = type("LlamaForCausalLM", (type(source),), {"__module__": "elsewhere"})
    for kind in (namesake, LlamaForSequenceClassification):
        reason = known_parts(kind(source.config)).why_nothing
        assert reason == f"{kind.__name__} is not an architecture whose layers qops knows"


@pytest.mark.parametrize("part", ["layer", "attention"])
def test_models_whose_layers_take_another_keyword_are_not_fused(part, monkeypatch):
    source = random_model("llama")
    layer = source.model.layers[0]
    owner = type(layer if part == "layer" else layer.self_attn)

    def forward(self, hidden_states, cache=None, ring=None, **kwargs): ...

    assert known_parts(source).own == {}
    original = owner.forward
    monkeypatch.setattr(owner, "forward", forward)
    qops.models.decoder._named.cache_clear()
    qops.models.decoder.cache_keyword.cache_clear()
    try:
        known = known_parts(source)
        assert known.own == {
            "stream" if part == "layer" else part: f"{owner.__name__}.forward takes ring, which qops does not know"
        }
        assert (known.stream, known.attention, known.mlps) == (part != "layer", part == "layer", (True,) * 3)
    finally:
        monkeypatch.setattr(owner, "forward", original)
        qops.models.decoder._named.cache_clear()
        qops.models.decoder.cache_keyword.cache_clear()


def test_what_fused_layers_refuse():
    model = quantize_model(random_model("llama"))
    layer = model.model.layers[0]
    x = torch.randn(1, 2, 64)
    tables = model.model.rotary_emb(x, torch.arange(2)[None])
    assert isinstance(tables, Shared)
    with pytest.raises(
        ValueError, match="position_embeddings must come from the rotary_emb of the fused model, got tuple"
    ):
        layer(x, position_embeddings=(tables.cos, tables.sin))
    with pytest.raises(ValueError, match="got NoneType"):
        layer(x)
    with pytest.raises(TypeError, match=r"FusedLlamaDecoderLayer\.forward: got attention_mask twice"):
        layer(x, None, attention_mask=None, position_embeddings=tables)
    with pytest.raises(TypeError, match="got more"):
        layer(x, *[None] * 9)
    # By position as by name.
    names = layer.parameter_names[1:]
    by_position = layer(x, *[tables if name == "position_embeddings" else None for name in names])
    assert torch.equal(by_position, layer(x, position_embeddings=tables))


@pytest.mark.skipif(cache_keyword(type(random_model("llama").model)) != "cache", reason="Transformers before 5.24")
def test_the_older_name_of_a_cache_is_taken_and_warned_about():
    from transformers import DynamicCache

    model = quantize_model(random_model("llama"))
    layer = model.model.layers[0]
    x = torch.randn(1, 2, 64)
    tables = model.model.rotary_emb(x, torch.arange(2)[None])
    first, second = (DynamicCache(config=model.config) for _ in range(2))
    wanted = layer(x, position_embeddings=tables, cache=first)
    with pytest.warns(FutureWarning, match=r"`past_key_values` is deprecated for `FusedLlama.*Use `cache` instead"):
        found = layer(x, position_embeddings=tables, past_key_values=second)
    assert torch.equal(found, wanted) and second.get_seq_length() == first.get_seq_length() == 2


def test_a_cache_of_older_releases_gets_no_keywords():
    """Whichever is installed: the layer is called as they call it, with a cache as others wrote them then."""
    from transformers import DynamicCache

    class Older(DynamicCache):
        def update(self, key_states, value_states, layer_idx):
            return super().update(key_states, value_states, layer_idx)

    model = quantize_model(random_model("llama"))
    attention = model.model.layers[1].self_attn
    x = torch.randn(1, 2, 64)
    tables = model.model.rotary_emb(x, torch.arange(2)[None])
    wanted, _ = attention(x, position_embeddings=tables)
    attention.cache_keyword = "past_key_values"
    attention.parameter_names = ("hidden_states", "position_embeddings", "attention_mask", "past_key_values")
    cache = Older(config=model.config)
    found, _ = attention(x, position_embeddings=tables, past_key_values=cache)
    assert torch.equal(found, wanted) and cache.get_seq_length(1) == 2 and cache.get_seq_length(0) == 0


def test_every_known_architecture_is_tried():
    assert {*FUSED, *PARTLY} == set(ARCHITECTURES)


def test_tolerances_of_most_rows_are_not_above_those_of_all():
    for tolerance in (qops.models.proof.FLOAT32, qops.models.proof.INT8):
        assert 0 < tolerance.typical <= tolerance.largest < 1
