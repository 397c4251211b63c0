"""Folders of GPTQ, AWQ and compressed-tensors: whole models, and what is refused before anything is read."""

from __future__ import annotations

import copy
import json
import os
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qops
from qops import Int4Weight, Int8Weight, load_model
from qops.formats import load_tokenizer, open_checkpoint, read_checkpoint
from qops.nn import Int4Linear
from qops.testing import assert_bitwise
from tests.support.formats import folders
from tests.support.formats.checkpoints import checkpoint
from tests.support.formats.folders import INDEX, SINGLE, Written, write_as
from tests.support.models.families import FUSED, IDS

FORMATS = {
    "gptq": folders.gptq(),
    "gptq symmetric": folders.gptq(symmetric=True),
    "gptq version 2": folders.gptq(version=2),
    "gptq act-order": folders.gptq(act_order=True),
    "gptq 8 bits": folders.gptq(bits=8),
    "gptq 8 bits act-order": folders.gptq(bits=8, act_order=True, symmetric=True),
    "awq gemm": folders.awq(),
    "awq gemv": folders.awq("gemv"),
    "awq gemv_fast": folders.awq("gemv_fast"),
    "compressed-tensors": folders.compressed_tensors(),
    "compressed-tensors asymmetric": folders.compressed_tensors(symmetric=False),
    "compressed-tensors channel": folders.compressed_tensors(group_size=-1),
    "compressed-tensors 8 bits": folders.compressed_tensors(bits=8),
    "compressed-tensors integers": folders.compressed_tensors(bits=8, group_size=-1, packed=False),
}


def assert_is(loaded: Any, dense: Any, what: str) -> None:
    """In float32, by the tolerance of models."""
    wanted = copy.deepcopy(dense).double()(IDS).logits
    assert (loaded(IDS).logits - wanted).abs().max() <= 2e-5 * wanted.abs().max(), what


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_of_each_format_has_the_logits_of_its_exact_weights(tmp_path, name, shards):
    written = write_as(*FORMATS[name], intermediate_size=128)  # gemv_fast takes multiples of 64
    written.shards = shards
    model = load_model(written.write(tmp_path), torch.float32)
    assert model.qops_fusion.not_fused is None, model.qops_fusion
    assert_is(model, written.model, name)


# strategy, dynamic, symmetric
W8A8 = {
    ("token", True, True): ("int8_compressed_tensors", set[str]()),
    ("token", True, False): ("int8_asymmetric_compressed_tensors", set[str]()),
    ("tensor", False, True): ("int8_static_compressed_tensors", {"input_scale"}),
    ("tensor", False, False): ("int8_static_compressed_tensors", {"input_scale", "input_zero_point"}),
}


@pytest.mark.parametrize("how", W8A8)
def test_activations_of_compressed_tensors_are_quantised_as_its_config_says(tmp_path, how):
    inputs = {"num_bits": 8, "type": "int", **dict(zip(("strategy", "dynamic", "symmetric"), how, strict=True))}
    written = write_as(*folders.compressed_tensors(bits=8, group_size=-1, packed=False, inputs=inputs))
    path, (scheme, static) = written.write(tmp_path / "written"), W8A8[how]
    name = "model.layers.0.self_attn.q_proj"
    opened = open_checkpoint(path)
    linear: Any = opened.linear(name)
    assert linear.scheme == scheme and opened.activations(name).keys() == static
    for key in static:
        assert_bitwise(opened.activations(name)[key], written.tensors[f"{name}.{key}"])
    model = load_model(path, torch.float16)
    assert model.qops_fusion.not_fused is None and type(model.model.layers[0].mlp.down_proj) is linear
    layer = model.model.layers[1].self_attn.qkv_proj.split()["v_proj"]
    assert layer.activations().keys() == static
    for key in static:
        want = written.tensors[f"model.layers.1.self_attn.v_proj.{key}"]
        assert_bitwise(layer.activations()[key], want.to(layer.activations()[key].dtype).view(()))
    qops.save_model(model, tmp_path / "saved")
    assert_bitwise(load_model(tmp_path / "saved")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("family", FUSED)
def test_a_model_of_each_family(tmp_path, family):
    written = write_as(*folders.gptq(group_size=-1 if family == "qwen3" else 16), family)
    model = load_model(written.write(tmp_path), torch.float32)
    assert_is(model, written.model, family)


def test_every_weight_without_a_model(tmp_path):
    written = write_as(*folders.gptq(act_order=True))
    found = read_checkpoint(written.write(tmp_path))
    state = written.model.state_dict()
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            assert_bitwise(value, written.tensors[name], name)
            del state[name]
        else:
            assert isinstance(value, Int4Weight) and value.is_packed
            assert_bitwise(value.dequantize(), state.pop(f"{name}.weight"), name)
    assert not state


def test_read_checkpoint_reads_what_save_model_writes(tmp_path):
    model = load_model(write_as(*folders.awq()).write(tmp_path / "awq"), torch.float16)
    qops.save_model(model, tmp_path / "saved")
    first, second = (read_checkpoint(tmp_path / name) for name in ("awq", "saved"))
    assert first.keys() == second.keys()
    for name, value in first.items():
        other: Any = second[name]
        if isinstance(value, torch.Tensor):
            assert_bitwise(value, other, name)
        else:
            assert type(value) is type(other)
            assert_bitwise(value.dequantize(), other.dequantize(), name)


# Which dtype, which tokenizer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_is_the_checkpoint_s(tmp_path, dtype):
    written = write_as(*folders.gptq(), dtype=dtype)
    assert load_model(written.write(tmp_path / "said")).dtype == dtype
    for key in ("dtype", "torch_dtype"):
        written.config.pop(key, None)
    path = written.write(tmp_path / "not_said")
    assert open_checkpoint(path).dtype == dtype and load_model(path).dtype == dtype
    assert load_model(path, torch.float32).dtype == torch.float32


def test_generation_config_is_kept(tmp_path):
    written = write_as(*folders.gptq())
    written.files["generation_config.json"] = {"max_new_tokens": 3, "do_sample": False}
    model = load_model(written.write(tmp_path))
    assert model.generation_config.max_new_tokens == 3
    assert model.generate(IDS[:1]).shape[1] == IDS.shape[1] + 3
    assert not hasattr(model.config, "quantization_config")


# What is quantised is what the tensors say ---------------------------------------------------------------------------


def test_linears_of_the_config_s_silence_are_as_their_tensors_are(tmp_path):
    """A dense linear that the config does not except; a head that it does."""
    settings, encode = folders.gptq()
    written = write_as(settings, encode, but=("model.layers.1.mlp.down_proj",), tie_word_embeddings=False)
    model = load_model(written.write(tmp_path), torch.float32)
    assert isinstance(model.lm_head, Int4Linear)
    assert not isinstance(model.model.layers[1].mlp.down_proj, Int4Linear)
    assert_is(model, written.model, "mixed")


def test_biases_of_zeros_that_no_linear_has(tmp_path):
    written = write_as(*folders.gptq(), attention_bias=False, mlp_bias=False)
    for name in [name for name in written.tensors if name.endswith(".qweight")]:
        rows = written.tensors[name].shape[1]
        written.tensors[name.replace("qweight", "bias")] = torch.zeros(rows, dtype=torch.float16)
    assert_is(load_model(written.write(tmp_path / "zeros"), torch.float32), written.model, "zeros")
    written.tensors["model.layers.2.mlp.up_proj.bias"][5] = 1
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj\.bias has no place in LlamaForCausalLM"):
        load_model(written.write(tmp_path / "ones"))


def test_old_settings_files_and_computed_frequencies(tmp_path):
    written = write_as(*folders.gptq(symmetric=True))
    settings = written.config.pop("quantization_config")
    del settings["quant_method"], settings["checkpoint_format"]
    written.files["quantize_config.json"] = settings
    for layer in range(3):
        written.tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    assert_is(load_model(written.write(tmp_path), torch.float32), written.model, "old")


def test_bits_and_groups_are_those_of_the_tensors(tmp_path):
    """GPTQModel gives layers settings of their own ("dynamic")."""
    written = write_as(*folders.gptq())
    other = write_as(*folders.gptq(bits=8, group_size=16))
    name = "model.layers.0.mlp.up_proj"
    for key in ("qweight", "qzeros", "scales", "g_idx"):
        written.tensors[f"{name}.{key}"] = other.tensors[f"{name}.{key}"]
    found = read_checkpoint(written.write(tmp_path))
    weight = found[name]
    assert isinstance(weight, Int8Weight) and weight.group_size == 16
    assert_bitwise(weight.dequantize(), other.model.state_dict()[f"{name}.weight"])


def test_groups_that_share_the_module_s_name_and_pattern(tmp_path):
    """compressed-tensors: a name before a pattern, a pattern before the class."""
    written = write_as(*folders.compressed_tensors(group_size=32))
    eight = write_as(*folders.compressed_tensors(bits=8, group_size=16))
    channel = write_as(*folders.compressed_tensors(group_size=-1))
    groups = written.config["quantization_config"]["config_groups"]
    for index, (other, targets, module) in enumerate(
        [
            (eight, ["re:.*gate_proj$"], "model.layers.0.mlp.gate_proj"),
            (channel, ["model.layers.1.mlp.gate_proj"], "model.layers.1.mlp.gate_proj"),
        ]
    ):
        group = other.config["quantization_config"]["config_groups"]["group_0"]
        groups[f"group_{index + 1}"] = group | {"targets": targets}
        for key in ("weight_packed", "weight_scale", "weight_shape"):
            written.tensors[f"{module}.{key}"] = other.tensors[f"{module}.{key}"]
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.gate_proj: .*weight_shape must be \[N, K\]"):
        read_checkpoint(written.write(tmp_path / "wrong"))
    for key in ("weight_packed", "weight_scale", "weight_shape"):
        name = f"model.layers.2.mlp.gate_proj.{key}"
        written.tensors[name] = eight.tensors[name]
    found = read_checkpoint(written.write(tmp_path / "right"))
    sizes = [(type(found[f"model.layers.{i}.mlp.gate_proj"]), i) for i in range(3)]
    assert sizes == [(Int8Weight, 0), (Int4Weight, 1), (Int8Weight, 2)]


# What the user has to say --------------------------------------------------------------------------------------------


def test_zero_points_of_the_wrong_version_are_asked_about(tmp_path):
    written = write_as(*folders.gptq(symmetric=True, version=2))
    written.config["quantization_config"]["checkpoint_format"] = "gptq"
    path = written.write(tmp_path / "2 as 1")
    with pytest.raises(ValueError, match=r"_proj: .*every stored zero point is 8: 9 if version 1 .*8, as symmetric"):
        load_model(path)
    assert_is(load_model(path, torch.float32, zero_add="none"), written.model, "none")
    written = write_as(*folders.gptq(symmetric=True))
    written.config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    path = written.write(tmp_path / "1 as 2")
    with pytest.raises(ValueError, match=r"every stored zero point is 7, which version 1 .*zero_add=\"word\""):
        load_model(path)
    assert_is(load_model(path, torch.float32, zero_add="word"), written.model, "word")


def test_awq_without_zero_points_is_read_when_it_is_called_symmetric(tmp_path):
    written = write_as(*folders.awq(symmetric=True))
    path = written.write(tmp_path)
    with pytest.raises(ValueError, match=r"tensor qzeros is missing; .*symmetric=True says so"):
        load_model(path)
    assert_is(load_model(path, torch.float32, symmetric=True), written.model, "symmetric")


@pytest.mark.parametrize(
    ("settings", "said", "message"),
    [
        (folders.awq(), {"zero_add": "word"}, "zero_add has no meaning for checkpoints of AWQ, got zero_add='word'"),
        (folders.gptq(), {"symmetric": True}, "symmetric has no meaning for checkpoints of GPTQ"),
        (folders.compressed_tensors(), {"zero_add": "none"}, "no meaning for checkpoints of compressed-tensors"),
        (folders.awq(), {"symmetric": True}, "tensor qzeros is there, and symmetric=True says that there is none"),
        (folders.gptq(), {"zero_add": ""}, 'zero_add must be "word", "nibble" or "none", got \'\''),
        (folders.gptq(), {"zero_add": "both"}, 'zero_add must be "word", "nibble" or "none", got \'both\''),
    ],
)
def test_what_has_no_meaning_is_not_ignored(tmp_path, settings, said, message):
    path = write_as(*settings).write(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_model(path, **said)


# What is refused -----------------------------------------------------------------------------------------------------

_LAYER = "model.layers.1.mlp.down_proj"


def _changed(written: Written, name: str, change: Any) -> None:
    written.tensors[f"{_LAYER}.{name}"] = change(written.tensors[f"{_LAYER}.{name}"]).contiguous()


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({}, {"qweight": None}, "tensor qweight is missing"),
        ({}, {"qzeros": None}, "tensor qzeros is missing"),
        ({}, {"scales": None}, "tensor scales is missing"),
        ({"desc_act": True}, {"g_idx": None}, "tensor g_idx is missing, and desc_act says"),
        ({}, {"qweight": lambda t: t.short()}, r"tensor qweight must be int32 \[12, 64\], got int16"),
        ({}, {"scales": lambda t: t.double()}, "scales must be float16 or bfloat16 or float32"),
        ({}, {"qzeros": lambda t: t[:, :-1]}, r"codes must have 4 or 8 bits, got 3\.5"),
        ({}, {"qzeros": lambda t: t[:, :0]}, "codes must have 4 or 8 bits, got 0"),
        ({}, {"scales": lambda t: t[:, 0]}, "tensors must be matrices"),
        ({}, {"g_idx": lambda t: t[:-1]}, r"tensor g_idx must be int32 or int64 \[96\]"),
        ({}, {"g_idx": lambda t: t * 2}, r"down_proj: .*g_idx must be in 0 \.\.\. 2, got 0 \.\.\. 4"),
        ({}, {"scales": lambda t: t * torch.nan}, "down_proj: .*scales"),
        ({"group_size": 64}, {"g_idx": None}, "scales must have 2 rows where group_size is 64 and K = 96"),
        ({"checkpoint_format": "gptq_p"}, {}, "quantization_config: checkpoint_format must be one of .*'gptq_p'"),
        ({"is_marlin_format": True}, {}, "checkpoint_format must be one of gptq, gptq_v2, got 'marlin'"),
        ({"group_size": "32"}, {}, "group_size must be an integer, got '32'"),
        ({"quant_method": "exl2"}, {}, "quant_method must be one of gptq, awq, compressed-tensors.*'exl2'"),
        ({"quant_method": None}, {}, "quantization_config must be an object with a quant_method"),
    ],
)
def test_gptq_folders_that_are_refused(tmp_path, settings, change, message):
    written = write_as(*folders.gptq())
    written.config["quantization_config"] |= settings
    for name, changed in change.items():
        if changed is None:
            del written.tensors[f"{_LAYER}.{name}"]
        else:
            _changed(written, name, changed)
    path = written.write(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"version": "marlin"}, "version must be one of gemm, gemv, gemv_fast, got 'marlin'"),
        ({"bits": 3}, "bits must be 4, got 3"),
        ({"group_size": None}, "group_size must be an integer, got None"),
        ({"group_size": 64}, "group_size must divide K = 96, got 64"),
        ({"group_size": 16}, r"down_proj: tensor scales must be .* \[6, 64\], got float16 \[3, 64\]"),
        ({"version": "gemv"}, r"down_proj: tensor scales must be .* \[96, 64\], got float16 \[3, 64\]"),
    ],
)
def test_awq_folders_that_are_refused(tmp_path, settings, message):
    written = write_as(*folders.awq())
    written.config["quantization_config"] |= settings
    with pytest.raises(ValueError, match=message):
        load_model(written.write(tmp_path))


@pytest.mark.parametrize(
    ("settings", "group", "weights", "message"),
    [
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, {}, {}, "sparsity_config is not supported"),
        ({"transform_config": {"config_groups": {"a": 1}}}, {}, {}, "transform_config is not supported"),
        ({"kv_cache_scheme": {"num_bits": 8}}, {}, {}, "kv_cache_scheme is not supported"),
        ({"quantization_status": "frozen"}, {}, {}, "quantization_status must be compressed, got 'frozen'"),
        ({"config_groups": []}, {}, {}, "config_groups must map names to groups"),
        ({"format": "nvfp4-pack-quantized"}, {}, {}, "format must be one of pack-quantized.*'nvfp4-pack-quantized'"),
        ({}, {"output_activations": {"num_bits": 8}}, {}, "output_activations are not supported"),
        ({}, {"input_activations": {"num_bits": 8}}, {}, "input_activations of pack-quantized are not supported"),
        ({}, {"targets": ["re:.*gate_proj"]}, {}, "no target of config_groups is for it, and it is quantised"),
        ({}, {}, {"type": "float"}, "weights must be integers of 4 or 8 bits, got 4 of 'float'"),
        ({}, {}, {"num_bits": 3}, "weights must be integers of 4 or 8 bits, got 3"),
        ({}, {}, {"strategy": "block"}, "strategy of weights must be tensor, channel or group, got 'block'"),
        ({}, {}, {"group_size": 64}, "weight_scale must have K/G columns with K = (64|96), G = 64"),
        ({}, {}, {"symmetric": False}, "tensor weight_zero_point is missing"),
        ({"format": "int-quantized"}, {}, {}, "weights of int-quantized must have 8 bits, got 4"),
    ],
)
def test_compressed_tensors_folders_that_are_refused(tmp_path, settings, group, weights, message):
    written = write_as(*folders.compressed_tensors())
    config = written.config["quantization_config"]
    config["config_groups"]["group_0"] |= group
    config["config_groups"]["group_0"]["weights"] |= weights
    config |= settings
    with pytest.raises(ValueError, match=message):
        load_model(written.write(tmp_path))


def test_more_and_fewer_tensors_than_the_model_has(tmp_path):
    written = write_as(*folders.gptq())
    lost = dict(written.tensors)
    del lost["model.layers.1.input_layernorm.weight"]
    with pytest.raises(ValueError, match=r"tensor model\.layers\.1\.input_layernorm\.weight is missing"):
        load_model(Written(None, written.config, lost).write(tmp_path / "fewer"))
    more = written.tensors | {"model.layers.9.extra.weight": torch.ones(3)}
    with pytest.raises(
        ValueError, match=r"every tensor must have a place in LlamaForCausalLM .* 1 have none: model\.l"
    ):
        load_model(Written(None, written.config, more).write(tmp_path / "more"))
    experts = {name: tensor for name, tensor in written.tensors.items() if "layers.2" not in name}
    with pytest.raises(ValueError, match=r"layers\.2.* is missing"):
        load_model(Written(None, written.config, experts).write(tmp_path / "a layer"))


def test_a_dense_folder_is_told_apart(tmp_path):
    written = write_as(*folders.gptq())
    del written.config["quantization_config"]
    with pytest.raises(ValueError, match=r"config\.json: quantization_config is missing: the model is dense.*quant"):
        load_model(written.write(tmp_path / "nothing said"))
    written = write_as(*folders.gptq())
    dense = {f"{name}": value.contiguous() for name, value in written.model.state_dict().items()}
    with pytest.raises(ValueError, match="must hold weights of gptq, as its config says, got dense tensors"):
        load_model(Written(None, written.config, dense).write(tmp_path / "nothing there"))


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", 7, ""])
def test_an_index_names_files_of_its_own_folder(tmp_path, shard):
    written = write_as(*folders.gptq())
    written.shards = 2
    path = written.write(tmp_path / "model")
    shutil.copy(path / "model-00001-of-00002.safetensors", tmp_path / "model.safetensors")
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = shard
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"weight_map must name safetensors files of this folder, got .* for lm_head"):
        load_model(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "must be a JSON object, got list"),
        ("{}", "weight_map must map tensors to files, got NoneType"),
        ('{"weight_map": {}}', "weight_map must map tensors to files"),
        ("[" * 100_000, "not readable as JSON"),
    ],
)
def test_an_index_that_is_none(tmp_path, text, message):
    written = write_as(*folders.gptq())
    written.shards = 2
    path = written.write(tmp_path)
    (path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_an_index_and_its_shards_agree(tmp_path):
    written = write_as(*folders.gptq())
    written.shards = 2
    path = written.write(tmp_path)
    index = json.loads((path / INDEX).read_text())
    name, shard = "model.norm.weight", index["weight_map"]["model.norm.weight"]
    for changed, message in (
        ({**index["weight_map"], "more": shard}, "tensor more is missing"),
        ({key: value for key, value in index["weight_map"].items() if key != name}, f"tensor {name} is not in {INDEX}"),
        ({**index["weight_map"], "more": "gone.safetensors"}, "not a readable safetensors file"),
    ):
        (path / INDEX).write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(ValueError, match=message):
            load_model(path)


def test_files_that_are_none(tmp_path):
    path = write_as(*folders.gptq()).write(tmp_path)
    whole = (path / SINGLE).read_bytes()
    for text in (b"", b"\xff" * 8, whole[: len(whole) // 2], whole[:-1], whole + b"\0", b"\x80\x02" + whole):
        (path / SINGLE).write_bytes(text)
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            load_model(path)
    os.remove(path / SINGLE)
    (path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor .* pickled weights are not read"):
        load_model(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e5m2])
def test_codes_without_a_scale_are_no_dense_weight(tmp_path, dtype):
    written = write_as(*folders.gptq())
    written.tensors["model.norm.weight"] = written.tensors["model.norm.weight"].to(dtype)
    with pytest.raises(
        ValueError, match=r"tensor model\.norm\.weight must be of floating point where nothing scales it"
    ):
        load_model(written.write(tmp_path / "norm"))
    written = write_as(*folders.compressed_tensors(bits=8, group_size=-1, packed=False))
    del written.tensors[f"{_LAYER}.weight_scale"]
    with pytest.raises(ValueError, match=r"down_proj\.weight must be of floating point .* got int8 \[64, 96\]"):
        load_model(written.write(tmp_path / "linear"))


def test_code_of_a_folder_is_not_run(tmp_path, monkeypatch):
    written = write_as(*folders.gptq())
    written.config |= {"model_type": "their_own", "auto_map": {"AutoConfig": "theirs.Config"}}
    path = written.write(tmp_path)
    (path / "theirs.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match=r"config\.json: .*custom code"):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ["re:("]}, "missing \\), unterminated subpattern"),
        ({"weights": {"actorder": "group"}}, "tensor weight_g_idx is missing, and actorder says"),
    ],
)
def test_config_groups_that_cannot_be_followed(tmp_path, change, message):
    written = write_as(*folders.compressed_tensors())
    group = written.config["quantization_config"]["config_groups"]["group_0"]
    group |= {key: group[key] | value if isinstance(value, dict) else value for key, value in change.items()}
    path = written.write(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("source", [["x"], {}, 5, None, {"quant_method": []}])
def test_a_source_that_is_none(tmp_path, source):
    written = write_as(*folders.gptq())
    written.config["quantization_config"] = {"quant_method": "qops", "source": source}
    with pytest.raises(ValueError, match="quantization_config must be an object with a quant_method"):
        load_model(written.write(tmp_path))


@pytest.mark.parametrize(
    ("key", "change"), [("input_scale", lambda t: t.repeat(3)), ("input_zero_point", torch.Tensor.float)]
)
def test_what_activations_are_quantised_with_is_looked_at_before(tmp_path, key, change):
    inputs = {"dynamic": False, "strategy": "tensor", "symmetric": False, "num_bits": 8, "type": "int"}
    written = write_as(*folders.compressed_tensors(bits=8, group_size=-1, packed=False, inputs=inputs))
    written.tensors[f"{_LAYER}.{key}"] = change(written.tensors[f"{_LAYER}.{key}"])
    with pytest.raises(ValueError, match=f"down_proj: tensor {key} must be"):
        open_checkpoint(written.write(tmp_path))


def test_a_folder_is_not_called_by_its_parts(tmp_path):
    path = write_as(*folders.gptq()).write(tmp_path / "model")
    for name in (SINGLE, "config.json"):
        with pytest.raises(ValueError, match=f"{name}: a part of a checkpoint; its folder .*model is the whole"):
            load_model(path / name)
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"other: config\.json is missing$"):
        load_model(tmp_path / "other")
    (tmp_path / "other/m-Q4_K_M.gguf").touch()
    with pytest.raises(
        ValueError, match=r"config\.json is missing; m-Q4_K_M\.gguf is a file that can be loaded by its"
    ):
        load_model(tmp_path / "other")
    with pytest.raises(OSError, match="model: no tokenizer that can be loaded: "):
        load_tokenizer(path)


# Real ones -----------------------------------------------------------------------------------------------------------

REAL = {
    "gptq_v1_sym_g128": "logits_runtime",
    "gptq_v1_sym_g64_desc_act": "logits_runtime",
    "gptq_v2_asym_g32": "logits_runtime",
    "awq_gemm_asym_g32_autoround": "logits_runtime",
    "ct_w4a16_sym_g128": "logits_runtime",
    "ct_w8a8_int_dyn_token_sym": "",  # whose int8 activations flip: layer by layer, below
}


@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints_are_read_to_the_bit(name):
    path = checkpoint(name)
    wanted = load_file(path / "ref_dequant.safetensors")
    found = read_checkpoint(path / "checkpoint")
    assert len(wanted) == 14
    for key, value in wanted.items():
        weight: Any = found[key.removesuffix(".weight")]
        assert_bitwise(weight.dequantize(value.dtype), value, key)


@pytest.mark.parametrize("name", [name for name in REAL if REAL[name]])
def test_real_checkpoints_have_the_logits_of_their_runtime(name):
    path = checkpoint(name)
    model = load_model(path / "checkpoint", torch.float16)
    logits = load_file(path / "ref_logits.safetensors")
    difference = (model(logits["input_ids"]).logits.float() - logits[REAL[name]].float()).abs().max()
    assert model.qops_fusion.not_fused is None and difference <= 0.05
    assert load_model(path / "checkpoint").dtype == open_checkpoint(path / "checkpoint").config.dtype


def test_the_layers_of_a_real_w8a8_checkpoint_compute_what_their_runtime_does():
    """Its activations are equal as integers; its output is that of dequantised operands, in float16."""
    path = checkpoint("ct_w8a8_int_dyn_token_sym")
    opened, record = open_checkpoint(path / "checkpoint"), load_file(path / "ref_layer_io.safetensors")
    modules = [name.removesuffix(".x_q") for name in record if name.endswith(".x_q")]
    assert len(modules) == 4
    for module in modules:
        linear: Any = opened.linear(module)
        linear = linear(opened.weight(module), **opened.activations(module))
        linear.weight.pack()
        x = record[f"{module}.x"]
        q, scale, _ = linear._quantized(x)
        assert_bitwise(q, record[f"{module}.x_q"], module)
        assert_bitwise(scale, record[f"{module}.x_scale"].float().squeeze(-1), module)
        wanted = record[f"{module}.y"].float()
        assert (linear(x).float() - wanted).abs().max() <= 2**-5, module  # one place of float16 at 34


def test_a_tokenizer_stands_in_the_folder():
    path = checkpoint("gptq_v1_sym_g128") / "checkpoint"
    assert load_tokenizer(path).decode(load_tokenizer(path)("def")["input_ids"]).endswith("def")
