"""Transformers' own from_pretrained: what it loads is what load_model loads, and no argument is ignored."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, CompileConfig, GenerationConfig, LlamaForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import qops
from qops import load_model, quantize_model
from qops.formats.open import load_tokenizer
from qops.integrations.transformers import QopsConfig, config_for
from qops.models.replacement import is_fused
from qops.testing import assert_bitwise
from tests.support.formats import folders
from tests.support.formats.folders import write_as
from tests.support.models.families import FUSED, IDS, random_model

AutoModelForCausalLM: Any = transformers.AutoModelForCausalLM
FORMATS = {
    "gptq": folders.gptq(),
    "gptq act-order": folders.gptq(act_order=True),
    "gptq 8 bits": folders.gptq(bits=8, symmetric=True),
    "awq": folders.awq(),
    "compressed-tensors": folders.compressed_tensors(),
    "compressed-tensors integers": folders.compressed_tensors(bits=8, group_size=-1, packed=False),
}
FIXTURES = (
    "awq_gemm_asym_g32_autoround",
    "ct_w4a16_sym_g128",
    "gptq_v1_sym_g128",
    "gptq_v1_sym_g64_desc_act",
    "gptq_v2_asym_g32",
)


def from_pretrained(folder: Path, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **({"config": config_for(folder)} | arguments))


def assert_same_model(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted) and found.qops_fusion == wanted.qops_fusion
    state, other = found.state_dict(), wanted.state_dict()
    assert state.keys() == other.keys()
    for name, value in state.items():
        assert torch.equal(value, other[name]), name
    assert {str(buffer.dtype) for buffer in found.buffers()} == {str(buffer.dtype) for buffer in wanted.buffers()}
    assert_bitwise(found(IDS).logits, wanted(IDS).logits)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_as(*FORMATS["gptq"]).write(tmp_path)


# What is quantised already -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_of_each_format_becomes_the_model_of_load_model(tmp_path, name, shards, caplog):
    written = write_as(*FORMATS[name])
    written.shards = shards
    path = written.write(tmp_path)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        model, info = from_pretrained(path, output_loading_info=True)
    assert not any(info.values()) and not caplog.records
    assert model.dtype == torch.float16 and is_fused(model)
    assert_same_model(model, load_model(path))


@pytest.mark.parametrize("family", FUSED)
def test_each_family_becomes_the_model_of_load_model(tmp_path, family):
    path = write_as(*FORMATS["compressed-tensors"], family=family).write(tmp_path)
    assert_same_model(from_pretrained(path, dtype=torch.float32), load_model(path, torch.float32))


@pytest.mark.parametrize("dtype", ["float32", torch.bfloat16, "auto", None])
def test_the_dtype_is_that_of_from_pretrained(folder, dtype):
    model = from_pretrained(folder, dtype=dtype)
    wanted = {"float32": torch.float32, torch.bfloat16: torch.bfloat16}.get(dtype, torch.float16)
    assert model.dtype == wanted
    assert_same_model(model, load_model(folder, wanted))


def test_without_a_dtype_in_the_config_the_scales_do_not_decide(tmp_path):
    written = write_as(*FORMATS["gptq"], dtype=torch.bfloat16)
    del written.config["dtype"]
    assert from_pretrained(written.write(tmp_path)).dtype == torch.bfloat16


def test_another_dtype_is_refused(folder):
    with pytest.raises(
        ValueError, match=r"must be torch\.float32, torch\.bfloat16 or torch\.float16, got torch\.float64"
    ):
        from_pretrained(folder, dtype=torch.float64)


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_a_map_of_one_device(folder, device_map):
    pytest.importorskip("accelerate")
    assert_same_model(from_pretrained(folder, device_map=device_map), load_model(folder))


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential", {"model": "cpu", "lm_head": "disk"}])
@pytest.mark.parametrize("dense", [False, True])
def test_a_map_of_several_devices_is_refused(tmp_path, device_map, dense):
    pytest.importorskip("accelerate")
    random_model("llama").save_pretrained(tmp_path / "dense")
    path = write_as(*FORMATS["gptq"]).write(tmp_path / "gptq")
    with pytest.raises(ValueError, match="device_map must name one device"):
        if dense:
            arguments: Any = {"quantization_config": QopsConfig(), "device_map": device_map}
            AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **arguments)
        else:
            from_pretrained(path, device_map=device_map)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_kernels": True}, "use_kernels must be False"),
        ({"key_mapping": {"^model": "other"}}, "key_mapping must be None"),
        ({"fusion_config": {"patch_embeddings": True}}, "fusion_config must be None"),
        ({"variant": "fp16"}, r"qops reads \['model\.safetensors'\], got \['model\.fp16\.safetensors'\]"),
    ],
)
def test_what_the_reader_would_not_follow_is_refused(folder, arguments, message):
    (folder / "model.fp16.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder, **arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tp_size": 2}, "distributed_config must be an argument of from_pretrained"),
        ({"fsdp_size": 2}, "distributed_config must have nothing but tp_size and tp_plan=.*got {.*'fsdp_size': 2"),
        ({"tp_size": 2, "tp_plan": {"lm_head": "colwise"}}, "distributed_config must have nothing but tp_size"),
        ({"tp_size": 2, "tp_plan": {}}, "distributed_config must have nothing but tp_size"),
    ],
)
def test_what_several_processes_are_not_for_is_refused(folder, settings, message):
    config = config_for(folder)
    config.distributed_config = DistributedConfig(**settings)
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder, config=config)


def test_a_state_dict_and_another_class_are_refused(folder):
    with pytest.raises(ValueError, match="must be given a folder"):
        LlamaForCausalLM.from_pretrained(None, config=config_for(folder), state_dict={})
    with pytest.raises(ValueError, match="class of the model must be LlamaForCausalLM, got LlamaModel"):
        AutoModel.from_pretrained(folder, config=config_for(folder))


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.up_proj.scales", "model.embed_tokens.weight"]
)
def test_a_missing_tensor_is_an_error(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=name.rpartition(".")[0].replace(".", r"\.")):
        from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.more.weight", "model.layers.7.mlp.up_proj.weight"])
def test_a_tensor_too_many_is_an_error(folder, name):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: torch.ones(3)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"1 have none: {name}"):
        from_pretrained(folder, ignore_mismatched_sizes=True)


def test_a_config_that_does_not_fit_is_refused_before_anything_is_allocated(folder):
    config = config_for(folder)
    config.intermediate_size = 1 << 40
    with pytest.raises(ValueError, match=rf"^{folder}: .* must have shape .*{1 << 40}"):
        from_pretrained(folder, config=config)


def test_settings_of_the_config_are_kept(folder):
    GenerationConfig(max_new_tokens=3, eos_token_id=7).save_pretrained(folder)
    model = from_pretrained(folder, attn_implementation="eager")
    assert model.config._attn_implementation == model.model.config._attn_implementation == "eager"
    assert model.config is model.model.config
    assert model.generation_config.eos_token_id == 7
    assert model.generate(IDS, do_sample=False).shape[1] == IDS.shape[1] + 3
    given = GenerationConfig(max_new_tokens=2, eos_token_id=9)
    assert from_pretrained(folder, generation_config=given).generation_config.eos_token_id == 9


@pytest.mark.parametrize("zero_add", ["nibble", "none"])
def test_what_the_user_says_of_a_folder_is_followed(folder, zero_add):
    config = config_for(folder, zero_add=zero_add, prove=False)
    model = from_pretrained(folder, config=config)
    assert model.qops_fusion.proof == "not made: prove=False"
    assert_same_model(model, load_model(folder, prove=False, zero_add=zero_add))


def test_a_config_that_is_saved_makes_the_folder_enough(folder):
    wanted = load_model(folder)
    config_for(folder).save_pretrained(folder)
    assert_same_model(AutoModelForCausalLM.from_pretrained(folder), wanted)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"zero": 1}, "quantization_config must hold a source and options alone, got zero"),
        ({"symmetric": True}, "symmetric has no meaning for checkpoints of GPTQ"),
        ({"source": {"quant_method": "exl2"}}, "quant_method must be one of gptq, awq, compressed-tensors"),
    ],
)
def test_a_config_that_was_edited(folder, spoil, message):
    config = config_for(folder)
    config.quantization_config |= spoil
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder, config=config)


def test_what_has_no_config_for_from_pretrained(tmp_path):
    random_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the model is dense"):
        config_for(tmp_path)
    with pytest.raises(ValueError, match="must be a folder, got a file"):
        config_for(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError):
        config_for(tmp_path / "nothing")


def test_a_folder_of_another_method_is_not_taken_over(folder):
    # Transformers' rule, and why there is config_for.
    with pytest.raises(ValueError, match="quantized with GPTQConfig but you are passing a QopsConfig"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=QopsConfig())


# What is dense -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "arguments"),
    [
        ("int4", {}),
        ("int8", {"skip": ("down_proj",)}),
        (qops.Int4(32, symmetric=False), {"skip_default": False, "fuse": False}),
        ({"*.down_proj": "int8", "o_proj": None, "*": qops.Int4(16)}, {"prove": False}),
    ],
)
def test_a_dense_folder_is_quantised_on_load(tmp_path, scheme, arguments):
    random_model("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QopsConfig(scheme, **arguments))
    wanted = quantize_model(AutoModelForCausalLM.from_pretrained(tmp_path), scheme, **arguments)
    assert str(model.quantization_report) == str(wanted.quantization_report)
    assert_same_model(model, wanted)
    # What Transformers writes of a config.
    said = json.loads(model.config.to_json_string())["quantization_config"]
    assert said["quant_method"] == "qops" and said["skip_default"] == arguments.get("skip_default", True)


def test_smoothing_is_folded_on_load(tmp_path):
    random_model("llama").save_pretrained(tmp_path)
    scales = {"model.layers.0.mlp.down_proj": torch.full((96,), 2.0)}
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=QopsConfig("int8", smoothing=scales), dtype=torch.float32
    )
    wanted = quantize_model(AutoModelForCausalLM.from_pretrained(tmp_path), "int8", smoothing=scales)
    assert found.quantization_report.smoothed == wanted.quantization_report.smoothed != {}
    assert_same_model(found, wanted)


def test_an_unknown_scheme_is_refused_before_anything_is_read():
    with pytest.raises(ValueError, match=r"QopsConfig: scheme must be one of .*got 'int3'"):
        QopsConfig("int3")


def test_settings_of_a_folder_are_none_for_a_dense_one(tmp_path):
    random_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a QopsConfig, got the settings of a quantised folder"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config={"quant_method": "qops", "source": {}})


# What is done with it ------------------------------------------------------------------------------------------------


def test_a_static_cache_and_a_compiled_decode_step(folder):
    model = from_pretrained(folder, dtype=torch.float32)
    wanted = load_model(folder, torch.float32).generate(IDS, max_new_tokens=6, do_sample=False)
    greedy: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    assert torch.equal(model.generate(IDS, **greedy), wanted)
    compiled: Any = CompileConfig(**{"backend": "aot_eager", "fullgraph": True, "mode": None})
    compiled._compile_all_devices = True  # Transformers does so by itself on a GPU alone
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.generate(IDS, **greedy, compile_config=compiled), wanted)
    assert hasattr(model, "_compiled_call")


def test_it_is_for_inference(folder):
    model = from_pretrained(folder)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.hf_quantizer.is_trainable and not hasattr(model.hf_quantizer, "checkpoint")


def test_a_model_of_from_pretrained_saves_like_any(folder, tmp_path):
    model = from_pretrained(folder)
    qops.save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert_bitwise(again(IDS).logits, model(IDS).logits)
    assert "quantization_config" not in vars(again.config)


def test_import_qops_imports_no_transformers():
    script = "import sys, qops, qops.integrations\nassert 'transformers' not in sys.modules"
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | path)


@pytest.mark.parametrize("name", FIXTURES)
def test_the_producers_fixtures(name):
    checkpoints = os.environ.get("QOPS_TEST_CHECKPOINTS")
    if checkpoints is None:
        pytest.skip("QOPS_TEST_CHECKPOINTS names no folder of checkpoints")
    path = Path(checkpoints) / name / "checkpoint"
    model, wanted = from_pretrained(path), load_model(path)
    assert_same_model(model, wanted)
    prompt = load_tokenizer(Path(checkpoints) / "base_model")("The module provides", return_tensors="pt")
    greedy = {**prompt, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**greedy), wanted.generate(**greedy))
