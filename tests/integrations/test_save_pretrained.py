"""What save_pretrained writes, from_pretrained reads; without this package it stops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.quantizers import auto

from qops import load_model, quantize_model
from qops.integrations.transformers import QopsConfig, config_for
from qops.testing import assert_bitwise
from tests.support.formats import folders
from tests.support.formats.folders import write_as
from tests.support.models.families import FAMILIES, IDS, random_model

AutoModelForCausalLM: Any = transformers.AutoModelForCausalLM
WAYS = {
    "int4": {"scheme": "int4"},
    "int8, all": {"scheme": "int8", "skip_default": False},
    "int8 weight-only, not fused": {"scheme": "int8_weight_only", "fuse": False},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, family, way):
    model = quantize_model(random_model(family), **WAYS[way])
    model.generation_config.eos_token_id = 7
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    names = load_model(tmp_path, prove=False).state_dict().keys()
    for again in (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config_for(tmp_path)),
    ):
        assert_bitwise(again(IDS).logits, model(IDS).logits)
        assert again.generation_config.eos_token_id == 7
        assert again.state_dict().keys() == names


def test_what_from_pretrained_gave_saves_and_comes_back(tmp_path):
    random_model("qwen3").save_pretrained(tmp_path / "dense")
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=QopsConfig("int4"))
    path = write_as(*folders.gptq(act_order=True), family="qwen3").write(tmp_path / "gptq")
    second = AutoModelForCausalLM.from_pretrained(path, config=config_for(path))
    for model in (first, second):
        model.save_pretrained(tmp_path / "out")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=model.dtype)
        assert_bitwise(again(IDS).logits, model(IDS).logits)
        again.save_pretrained(tmp_path / "twice")
        for file in (tmp_path / "out").iterdir():
            assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes(), file.name


def test_dtype_and_device_are_those_asked_for(tmp_path):
    quantize_model(random_model("llama"), "int8").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert_bitwise(model(IDS).logits, load_model(tmp_path, torch.bfloat16)(IDS).logits)


def test_the_user_has_nothing_to_say_of_a_folder_of_qops(tmp_path):
    quantize_model(random_model("llama"), "int8").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="zero_add has no meaning for checkpoints of qops"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config_for(tmp_path, zero_add="word"))


@pytest.mark.parametrize("way", WAYS)
def test_transformers_alone_stops(tmp_path, way, monkeypatch):
    """It skips a method that it does not know, and would go on with random weights."""
    quantize_model(random_model("llama"), **WAYS[way]).save_pretrained(tmp_path)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "qops")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
