"""What quantize_model decides before it changes anything: of models that mix, wrap, share and adapt their parts."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.rwkv.modeling_rwkv import RwkvBlock

from qops import quantize_model
from qops.models.quantize import _classes
from qops.models.replacement import is_fused
from qops.nn import Int4Linear, Int8Linear, RMSNorm
from qops.weights import Int4Weight, Int8Weight
from tests.support.models.families import IDS, SIZES, VOCAB, random_model

SCHEMES = ("int4", "int8")


def tiny(prefix: str, head: str = "ForCausalLM", config: str | None = None, **changes):
    torch.manual_seed(0)
    settings = getattr(transformers, config or f"{prefix}Config")(**(SIZES | changes))
    return getattr(transformers, prefix + head)(settings).eval()


def assert_near(found, wanted, scheme="int8"):
    """Of random weights four bits are far away, but nearer than a model whose part is missing or doubled."""
    assert torch.isfinite(found).all()
    assert (found - wanted).norm() < (0.2 if scheme == "int8" else 0.75) * wanted.norm()


def accounted(parameters, report):
    """Each parameter of the dense model, or its module, stands in the report."""
    known = {*report.replaced, *report.kept}
    return [name for name in parameters if not {name, name.rpartition(".")[0]} & known]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "olmo2", "phi3"])
@pytest.mark.parametrize("skip_default", [True, False])
def test_every_parameter_is_in_the_report(family, skip_default):
    source = random_model(family)
    parameters = dict.fromkeys(name for name, _ in source.named_parameters())
    report = quantize_model(source, skip_default=skip_default).quantization_report
    assert accounted(parameters, report) == []
    assert report.kept_bytes.keys() == report.kept.keys()


# Norms ---------------------------------------------------------------------------------------------------------------

GATED = {
    "Mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16},
    "Bamba": {
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "attn_layer_indices": [1],
    },
    "GraniteMoeHybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "shared_intermediate_size": 64,
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "NemotronH": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 16,
        "head_dim": 16,
        "layers_block_type": ["mamba", "attention"],
        "num_hidden_layers": 2,
    },
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("prefix", GATED)
def test_norms_that_take_more_than_x_stay(prefix, scheme):
    source = tiny(prefix, **GATED[prefix])
    gated = [name for name, module in source.named_modules() if "Gated" in type(module).__name__]
    assert gated
    wanted = source(IDS).logits
    model = quantize_model(source, scheme)
    for name in gated:
        assert not isinstance(model.get_submodule(name), RMSNorm)
        assert "takes more than x: hidden_states, gate" in model.quantization_report.kept[name]
    assert any(isinstance(module, RMSNorm) for module in model.modules())
    assert_near(model(IDS).logits, wanted, scheme)


def segformer():
    config = transformers.SegformerConfig(
        hidden_sizes=[16, 32, 32, 64],
        num_attention_heads=[1, 2, 2, 4],
        depths=[1, 1, 1, 1],
        sr_ratios=[4, 2, 1, 1],
        decoder_hidden_size=32,
        num_labels=8,
        initializer_range=0.2,
    )
    return transformers.SegformerForSemanticSegmentation(config)


def detr():
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=5,
        num_labels=7,
        init_std=0.2,
    )
    return transformers.DetrForObjectDetection(config)


@pytest.mark.parametrize("build", [segformer, detr])
def test_models_whose_linears_see_transposed_images(build):
    torch.manual_seed(0)
    source = build().eval()
    pixels = torch.randn(1, 3, 64, 64)
    wanted = source(pixel_values=pixels).logits
    model = quantize_model(source, "int8")
    assert len(model.quantization_report.replaced) >= 16
    assert_near(model(pixel_values=pixels).logits, wanted)


# Wrapped, adapted, shared --------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """What an adapter library puts in the place of a linear."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return 2 * self.base_layer(x)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_wrapped_linear_is_found_before_anything_is_replaced(scheme):
    source = random_model("llama")
    source.model.layers[1].self_attn.q_proj = Wrapped(source.model.layers[1].self_attn.q_proj)
    wanted = source(IDS).logits
    with pytest.warns(UserWarning, match=r"layers\.1\.self_attn\.q_proj.* fused layer does not have"):
        model = quantize_model(source, scheme)
    assert not is_fused(model)
    assert isinstance(model.model.layers[1].self_attn.q_proj, Wrapped)
    # Who asks the wrapper for a weight wants a tensor.
    kept = model.quantization_report.kept["model.layers.1.self_attn.q_proj.base_layer"]
    assert kept.startswith("Wrapped") and type(model.model.layers[1].self_attn.q_proj.base_layer) is nn.Linear
    assert isinstance(model.model.layers[1].self_attn.k_proj, (Int4Linear, Int8Linear))
    assert_near(model(IDS).logits, wanted, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_adapters_stay_dense(scheme):
    peft = pytest.importorskip("peft")
    source = random_model("llama")
    settings = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=8, init_lora_weights=False)
    peft.inject_adapter_in_model(settings, source)
    source.eval()
    wanted = source(IDS).logits
    with pytest.warns(UserWarning, match="stay Transformers' own"):
        model = quantize_model(source, scheme)
    report = model.quantization_report
    adapters = {name: reason for name, reason in report.kept.items() if ".lora_" in name}
    assert len(adapters) == 3 * 2 * 2 and set(adapters.values()) == {"part of an adapter, Linear"}
    layer = model.model.layers[0]
    assert isinstance(layer.self_attn.q_proj.base_layer, (Int4Linear, Int8Linear))
    assert isinstance(layer.self_attn.q_proj.lora_A["default"], nn.Linear)
    found = model(IDS).logits
    assert_near(found, wanted, scheme)
    for module in model.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.enable_adapters(False)
    assert not torch.equal(model(IDS).logits, found)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("what", ["layer", "mlp", "down_proj", "norm"])
def test_a_part_that_stands_in_two_places_is_replaced_in_both(what, fuse):
    source = random_model("llama")
    first, second = source.model.layers[0], source.model.layers[1]
    if what == "layer":
        source.model.layers[1] = first
    elif what == "mlp":
        second.mlp = first.mlp
    elif what == "down_proj":
        second.mlp.down_proj = first.mlp.down_proj
    else:
        second.input_layernorm = second.post_attention_layernorm
    wanted = source(IDS, use_cache=False).logits
    model = quantize_model(source, "int8", fuse=fuse)
    first, second = model.model.layers[0], model.model.layers[1]
    places = {
        "layer": (first, second),
        "mlp": (first.mlp.down_proj, second.mlp.down_proj),
        "down_proj": (first.mlp.down_proj, second.mlp.down_proj),
        "norm": (second.input_layernorm, second.post_attention_layernorm),
    }
    assert not is_fused(model) and places[what][0] is places[what][1]
    assert [name for name, module in model.model.named_modules() if type(module) is nn.Linear] == []
    assert_near(model(IDS, use_cache=False).logits, wanted)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("fuse", [True, False])
def test_linears_that_compute_more_stay(fuse):
    source = random_model("llama")
    layer = source.model.layers[0]
    layer.self_attn.o_proj.__class__ = Doubled
    nn.utils.parametrizations.weight_norm(layer.mlp.gate_proj)
    nn.utils.weight_norm(source.model.layers[1].mlp.up_proj)
    patched = source.model.layers[2].mlp.up_proj
    patched.forward = lambda x: 3 * nn.functional.linear(x, patched.weight, patched.bias)
    wanted = copy.deepcopy(source)(IDS).logits
    model = quantize_model(source, "int8", fuse=fuse)
    kept = model.quantization_report.kept
    assert not is_fused(model)
    assert kept["model.layers.0.self_attn.o_proj"] == "Doubled is a linear of another kind"
    assert kept["model.layers.0.mlp.gate_proj"] == "ParametrizedLinear is a linear of another kind"
    assert kept["model.layers.1.mlp.up_proj"] == "its weight is made of weight_g, weight_v"
    assert kept["model.layers.2.mlp.up_proj"] == "its forward was replaced by its owner"
    assert_near(model(IDS).logits, wanted)


def test_a_linear_of_another_dtype_stays():
    source = random_model("llama")
    source.model.layers[1].mlp.down_proj.double()
    model = quantize_model(source, fuse=False)
    assert model.quantization_report.kept["model.layers.1.mlp.down_proj"] == "its weight is torch.float64"
    assert type(model.model.layers[1].mlp.down_proj) is nn.Linear


def test_a_layer_with_a_forward_of_its_own_is_not_fused():
    source = random_model("llama")
    layer = source.model.layers[1]
    original = layer.forward
    layer.forward = lambda *args, **kwargs: 0.5 * original(*args, **kwargs)
    wanted = source(IDS).logits
    with pytest.warns(UserWarning, match=r"the forward of model\.layers\.1 was replaced by its owner"):
        model = quantize_model(source, "int8")
    assert_near(model(IDS).logits, wanted)


def test_a_parameter_more_is_not_forgotten():
    source = random_model("llama")
    source.model.layers[2].self_attn.sinks = nn.Parameter(torch.zeros(4))
    with pytest.warns(
        UserWarning, match=r"layers\.2\.self_attn\.sinks is a parameter that a fused layer does not have"
    ):
        model = quantize_model(source)
    assert not is_fused(model) and "model.layers.2.self_attn.sinks" in model.quantization_report.kept


JAMBA = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 4,
    "expert_layer_offset": 3,
    "num_experts": 2,
    "mamba_d_state": 8,
    "mamba_dt_rank": 16,
    "use_mamba_kernels": False,
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_that_its_owner_reads_stays_a_tensor(scheme):
    source = tiny("Jamba", **JAMBA)
    wanted = source(IDS).logits
    model = quantize_model(source, scheme)
    kept = model.quantization_report.kept
    assert kept["model.layers.0.mamba.dt_proj"] == "JambaMambaMixer reads its weight itself"
    assert isinstance(model.model.layers[0].mamba.in_proj, (Int4Linear, Int8Linear))
    found = model(IDS).logits
    assert torch.isfinite(found).all()
    if scheme == "int8":
        assert (found - wanted).norm() < 0.5 * wanted.norm()  # states add up what rounding does to random weights


def test_a_model_of_ones_own_is_read_too():
    """A class inside a function, and a linear that is a part of no part."""

    class Scorer(transformers.LlamaForCausalLM):
        def norms(self):
            return self.lm_head.weight.norm(dim=1)

    model = quantize_model(Scorer(random_model("llama").config), skip_default=False)
    assert model.quantization_report.kept["lm_head"] == "Scorer reads its weight itself"
    assert model.norms().shape == (VOCAB,)


def test_sources_of_classes_are_those_that_inspect_finds():
    for kind in (RwkvBlock, LlamaMLP):
        assert _classes(kind.__module__)[kind.__name__] == inspect.getsource(kind).rstrip("\n")


@pytest.mark.parametrize("module", ["made.up", "builtins", "__main__"])
def test_classes_without_a_source_are_converted(module):
    model = tiny("Llama")
    made = type("Made", (LlamaMLP,), {"__module__": module})
    model.model.layers[0].mlp.__class__ = made
    wanted = copy.deepcopy(model)(IDS).logits
    assert_near(quantize_model(model, "int8", fuse=False)(IDS).logits, wanted)


def test_weights_that_the_model_reads_from_afar_stay_tensors():
    """RWKV rescales those of its blocks."""
    torch.manual_seed(0)
    config = transformers.RwkvConfig(vocab_size=VOCAB, hidden_size=64, attention_hidden_size=64, num_hidden_layers=8)
    source = transformers.RwkvForCausalLM(config).eval()
    wanted = copy.deepcopy(source)(IDS).logits
    model = quantize_model(source, "int8")
    assert model.quantization_report.kept["rwkv.blocks.3.attention.output"] == "its model reads its weight"
    assert isinstance(model.rwkv.blocks[3].attention.key, Int8Linear)
    assert_near(model(IDS).logits, wanted)


@pytest.mark.parametrize("prefix", ["ModernBert", "Mpt"])
def test_norms_of_another_kind_without_a_bias_stay(prefix):
    torch.manual_seed(0)
    sizes = {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": VOCAB} if prefix == "Mpt" else SIZES
    config = getattr(transformers, f"{prefix}Config")(**sizes)
    source = getattr(transformers, f"{prefix}ForCausalLM" if prefix == "Mpt" else f"{prefix}ForMaskedLM")(config).eval()
    norms = [name for name, module in source.named_modules() if type(module) is nn.LayerNorm]
    wanted = source(IDS).logits
    model = quantize_model(source, "int8")
    assert all(type(model.get_submodule(name)) is nn.LayerNorm for name in norms) and norms
    assert_near(model(IDS).logits, wanted)


def test_a_weight_that_is_read_only_where_it_is_a_tensor_is_quantised():
    source = tiny("T5", "ForConditionalGeneration", d_model=64, d_kv=16, d_ff=128, num_heads=4, num_layers=1)
    model = quantize_model(source)
    assert isinstance(model.encoder.block[0].layer[1].DenseReluDense.wo, Int4Linear)
    assert torch.isfinite(model(input_ids=IDS, decoder_input_ids=IDS).logits).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_device_without_kernels_is_an_error_that_changes_nothing(scheme, monkeypatch):
    def without_kernels(weight):
        pack = weight._pack_codes

        def packed(qweight):
            if qweight.is_meta:
                return pack(qweight)
            raise NotImplementedError("Could not run 'qops::int8_pack'")

        monkeypatch.setattr(weight, "_pack_codes", staticmethod(packed))

    model = random_model("llama")
    before, logits = {name: type(part) for name, part in model.named_modules()}, model(IDS).logits
    for weight in (Int4Weight, Int8Weight):
        without_kernels(weight)
    weight, operator = {"int4": ("Int4Weight", "int4_gemm"), "int8": ("Int8Weight", "int8_gemm")}[scheme]
    named = r"qops\.quantize_model: model\.layers\.0\.self_attn\.q_proj and 20 more linears"
    why = rf"no {operator} on cpu: qops\.{weight}: this build of qops has no kernels for device cpu"
    with pytest.raises(RuntimeError, match=f"^{named}: {why}"):
        quantize_model(model, scheme)
    assert {name: type(part) for name, part in model.named_modules()} == before
    assert torch.equal(model(IDS).logits, logits)


# Heads and other senses ----------------------------------------------------------------------------------------------


def test_skip_adds_to_what_stays_by_default():
    model = quantize_model(random_model("llama", tie_word_embeddings=True), "int8", skip=("down_proj",))
    assert type(model.lm_head) is nn.Linear and type(model.get_input_embeddings()) is nn.Embedding
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert all(type(layer.mlp.down_proj) is nn.Linear for layer in model.model.layers)
    model = quantize_model(random_model("llama"), "int8", skip=("down_proj",), skip_default=False)
    assert isinstance(model.lm_head, Int8Linear)
    assert all(type(layer.mlp.down_proj) is nn.Linear for layer in model.model.layers)


HEADS = [
    ("Llama", "ForSequenceClassification", {"num_labels": 8}, "score"),
    ("Llama", "ForTokenClassification", {"num_labels": 8}, "score"),
    ("Llama", "ForQuestionAnswering", {}, "qa_outputs"),
    ("Bert", "ForMaskedLM", {}, "cls.predictions.decoder"),
    ("Bert", "ForSequenceClassification", {"num_labels": 8}, "classifier"),
    ("Llama", "ForCausalLM", {}, "lm_head"),
]


@pytest.mark.parametrize(("prefix", "head", "changes", "name"), HEADS)
def test_heads_stay_dense_by_default(prefix, head, changes, name):
    model = quantize_model(tiny(prefix, head, **changes))
    assert type(model.get_submodule(name)) is nn.Linear
    assert model.quantization_report.kept[name] == "a head; skip_default=False quantises it"
    if name != "qa_outputs":  # of two rows
        model = quantize_model(tiny(prefix, head, **changes), skip_default=False)
        assert isinstance(model.get_submodule(name), Int4Linear)


def test_vision_towers_stay_dense_unless_they_are_asked_for():
    def llava():
        torch.manual_seed(0)
        vision = transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
        config = transformers.LlavaConfig(
            vision_config=vision, text_config=transformers.LlamaConfig(**SIZES), image_token_index=VOCAB - 1
        )
        return transformers.LlavaForConditionalGeneration(config).eval()

    model = quantize_model(llava())
    kept, replaced = model.quantization_report.kept, model.quantization_report.replaced
    outside = [name for name, reason in kept.items() if reason.startswith("outside the language model")]
    assert any("vision_tower" in name for name in outside) and any("projector" in name for name in outside)
    assert replaced and all("language_model" in name for name in replaced if "norm" not in name)
    assert "outside the language model; skip_default=False quantises it (" in str(model.quantization_report)
    assert torch.isfinite(model(input_ids=IDS).logits).all()
    model = quantize_model(llava(), skip_default=False)
    assert any("vision_tower" in name for name in model.quantization_report.replaced)
    assert any("projector" in name for name in model.quantization_report.replaced)
