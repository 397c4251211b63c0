"""Schemes as objects, their names, and mappings of patterns to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qops
from qops import quantize_model
from qops.models.schemes import NAMED, matches
from qops.nn import Int4Int8Linear, Int4Linear, Int8Linear, Int8WeightOnlyLinear, QuantizedLinear
from qops.nn.linears import LINEARS
from qops.testing import assert_bitwise
from tests.support.models.families import IDS, random_model
from tests.support.models.layerwise import assert_layers_accurate


def linears(model: Any) -> dict[str, Any]:
    """What the linears became, by their names, in a model that is not fused."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@pytest.mark.parametrize("name", NAMED)
def test_a_name_stands_for_the_default_settings(name):
    by_name, by_object = (quantize_model(random_model("llama"), scheme) for scheme in (name, NAMED[name]))
    assert by_name.quantization_report == by_object.quantization_report
    assert by_name.quantization_report.scheme == name
    assert_bitwise(by_name(IDS).logits, by_object(IDS).logits)
    kinds = {type(linear) for linear in linears(by_name).values()}
    assert kinds == {LINEARS[name]}


def test_schemes_are_equal_by_their_settings():
    assert qops.Int4() == qops.Int4(None, True) != qops.Int4(64) and len({qops.Int8(), qops.Int8()}) == 1
    assert str(qops.Int4(64, symmetric=False)) == "int4(group_size=64, symmetric=False)"
    assert qops.W4A8(64) == qops.W4A8(64) != qops.Int4(64) and str(qops.W4A8(64)) == "w4a8(group_size=64)"
    assert repr(qops.Int8WeightOnly(32)) == "Int8WeightOnly(group_size=32)" and str(qops.Int8()) == "int8"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: qops.Int4("64"), "qops.Int4: group_size must be an integer, got '64'"),
        (lambda: qops.Int4(True), "qops.Int4: group_size must be an integer, got True"),
        (lambda: qops.Int4(symmetric=0), "qops.Int4: symmetric must be True or False, got 0"),
        (lambda: qops.W4A8("64"), "qops.W4A8: group_size must be an integer, got '64'"),
        (lambda: qops.W4A8(symmetric=0), "qops.W4A8: symmetric must be True or False, got 0"),
        (lambda: qops.Int8WeightOnly(32.0), r"qops.Int8WeightOnly: group_size must be an integer, got 32\.0"),
    ],
)
def test_settings_of_another_type_are_refused(make, message):
    with pytest.raises(TypeError, match=f"^{message}$"):
        make()


def test_a_device_without_the_product_changes_nothing(monkeypatch):
    """As a GPU has no kernel of int8_weight_only_gemm: asked before anything is replaced."""

    def refuse(self, x):
        raise RuntimeError("qops.int8_weight_only_gemm: x must be on a CPU")

    monkeypatch.setattr(Int8WeightOnlyLinear, "forward", refuse)
    source = random_model("llama")
    with pytest.raises(RuntimeError, match="must be on a CPU"):
        quantize_model(source, {"down_proj": "int8_weight_only", "*": "int4"})
    assert not linears(source) and type(source.model.layers[0].mlp.down_proj) is torch.nn.Linear


def test_settings_reach_the_weights():
    model = quantize_model(random_model("llama"), qops.Int4(32, symmetric=False), fuse=False)
    weights = [linear.weight for linear in linears(model).values()]
    assert {(w.group_size, w.kind) for w in weights} == {(32, "zero_point")}
    model = quantize_model(random_model("llama"), qops.Int8WeightOnly(16), fuse=False)
    assert {linear.weight.group_size for linear in linears(model).values()} == {16}


def test_weight_only_models_are_accurate_and_come_back(tmp_path):
    model = quantize_model(random_model("llama"), "int8_weight_only")
    assert model.qops_fusion.not_fused is None
    assert_layers_accurate(model, IDS)
    qops.save_model(model, tmp_path)
    loaded = qops.load_model(tmp_path)
    assert {type(linear) for linear in linears(loaded).values()} == {Int8WeightOnlyLinear}
    assert_bitwise(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("architecture", ("llama", "qwen3"))
@pytest.mark.parametrize("scheme", (qops.W4A8(), qops.W4A8(16, symmetric=False)), ids=str)
def test_models_with_int8_activations_are_fused_and_come_back(tmp_path, architecture, scheme):
    """Norms hand 8-bit rows over; the weights are those of int4."""
    model = quantize_model(random_model(architecture), scheme)
    assert model.qops_fusion.not_fused is None
    layer = model.model.layers[0]
    assert layer.input_layernorm.int8 == layer.post_attention_layernorm.int8 == "127"
    assert type(layer.mlp.gate_up_proj.merged) is type(layer.mlp.down_proj) is Int4Int8Linear
    alone = quantize_model(random_model(architecture), scheme, fuse=False)
    weights = quantize_model(random_model(architecture), qops.Int4(scheme.group_size, scheme.symmetric), fuse=False)
    for name, linear in linears(weights).items():
        assert_bitwise(alone.get_submodule(name).weight.dequantize(), linear.weight.dequantize(), name)
    assert (model(IDS).logits - alone(IDS).logits).norm() < 2e-2 * alone(IDS).logits.norm()
    qops.save_model(model, tmp_path)
    loaded = qops.load_model(tmp_path)
    assert {type(linear) for linear in linears(loaded).values()} == {Int4Int8Linear}
    assert_bitwise(loaded(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match="compressed-tensors has no scheme for an Int4Int8Linear"):
        qops.save_model(alone, tmp_path / "other", format="compressed-tensors")


# Mappings ------------------------------------------------------------------------------------------------------------


def test_the_first_pattern_that_fits_decides(tmp_path):
    scheme = {
        "model.layers.0.mlp.*": None,
        "down_proj": qops.Int8(),
        "*.self_attn.?_proj": "int8_weight_only",
        "*": qops.Int4(group_size=32),
    }
    model = quantize_model(random_model("llama"), scheme, fuse=False)
    found = {name.removeprefix("model.layers."): type(linear) for name, linear in linears(model).items()}
    assert not any(name.startswith("0.mlp") for name in found)
    assert found["1.mlp.down_proj"] is found["2.mlp.down_proj"] is Int8Linear
    assert found["1.mlp.gate_proj"] is found["1.mlp.up_proj"] is Int4Linear
    assert found["0.self_attn.q_proj"] is found["2.self_attn.o_proj"] is Int8WeightOnlyLinear
    report = model.quantization_report
    assert report.kept["model.layers.0.mlp.up_proj"] == "its scheme is None, or there is none for it"
    assert "down_proj: int8, *.self_attn.?_proj: int8_weight_only, *: int4(group_size=32)" in str(report)
    qops.save_model(model, tmp_path)
    assert_bitwise(qops.load_model(tmp_path)(IDS).logits, model(IDS).logits)


def test_linears_without_a_pattern_stay_dense():
    model = quantize_model(random_model("llama"), {"*.q_proj": "int4", "up_proj": "int8"}, fuse=False)
    assert {name.rpartition(".")[2] for name in linears(model)} == {"q_proj", "up_proj"}
    # Heads stay dense where nothing asks for them by skip_default=False.
    assert type(model.lm_head) is torch.nn.Linear
    model = quantize_model(random_model("llama"), {"lm_head": qops.Int8(), "*": "int4"}, skip_default=False)
    assert isinstance(model.lm_head, Int8Linear) and model.lm_head.float32_output


def test_a_head_is_quantised_where_a_pattern_names_it():
    for scheme, is_quantised in (
        ({"lm_head": "int8", "*": "int4"}, True),
        ({"lm_*": "int8", "*": "int4"}, False),
        ({"*": "int4"}, False),
        ({"lm_head": None, "*": "int4"}, False),
    ):
        model = quantize_model(random_model("llama"), scheme)
        assert isinstance(model.lm_head, Int8Linear) == is_quantised, scheme


def test_every_kind_of_linear_stands_in_the_report():
    scheme = {"v_proj": "int8", "*.mlp.*": "int8_weight_only", "*": "int4"}
    for fuse in (True, False):
        source = random_model("llama")
        names = {name for name, _ in source.named_parameters() if not name.endswith("bias")}
        report = quantize_model(source, scheme, fuse=fuse).quantization_report
        assert {*report.replaced, *(name.removesuffix(".weight") for name in report.kept)} == {
            name.removesuffix(".weight") for name in names
        }
        assert "Int8WeightOnlyLinear (group size 96)" in report.replaced["model.layers.0.mlp.down_proj"]
        assert report.replaced["model.layers.0.self_attn.v_proj"].endswith("Int8Linear")


def test_mixed_layers_are_fused_and_have_the_bits_of_linears_alone():
    scheme = {"*.down_proj": qops.Int8(), "v_proj": qops.Int4(16), "*": qops.Int4()}
    fused, alone = (quantize_model(random_model("qwen3"), scheme, fuse=fuse) for fuse in (True, False))
    assert fused.qops_fusion.not_fused is None
    mlp, attention = fused.model.layers[0].mlp, fused.model.layers[0].self_attn
    assert isinstance(mlp.down_proj, Int8Linear) and isinstance(mlp.gate_up_proj.merged, Int4Linear)
    assert attention.qkv_proj.merged is None  # two group sizes
    assert (fused(IDS).logits - alone(IDS).logits).norm() < 2e-2 * alone(IDS).logits.norm()


def test_kinds_of_layers_by_their_schemes_are_each_proven():
    scheme = {"model.layers.2.*": "int8", "*": "int4"}
    assert quantize_model(random_model("llama"), scheme).qops_fusion.proof.startswith("layer 0, 2 of 3")


def test_smoothing_goes_where_activations_are_quantised():
    model = random_model("llama")
    scales = {f"model.layers.0.mlp.{name}_proj": torch.full((64,), 2.0) for name in ("gate", "up")}
    scheme = {"*.mlp.*": "int8", "*": "int4"}
    report = quantize_model(model, scheme, smoothing=scales).quantization_report
    assert set(report.smoothed) == set(scales)


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("*.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("*", "lm_head", True),
        ("lm_head", "lm_head", True),
        ("layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", False),
        ("Q_PROJ", "model.layers.0.self_attn.q_proj", False),
        ("self_attn.*", "model.layers.0.self_attn.q_proj", False),
    ],
)
def test_what_a_pattern_fits(pattern, name, fits):
    assert matches(pattern, name) == fits
