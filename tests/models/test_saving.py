"""Saving, loading and dense twins of every kind of model, and what Transformers' own methods do to a converted one."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from qops.models import dense_model, load_model, load_tokenizer, quantize_model, save_model
from qops.models.decoder import DecoderLayer
from qops.nn import Int4Linear, Int8Embedding, RMSNorm
from qops.testing import assert_bitwise
from qops.weights import Int4Weight, Int8Weight
from tests.support.models.architectures import ARCHITECTURES, DECODER, TOKENS, outputs, tiny_model
from tests.support.models.families import IDS, SIZES, random_model

# Every linear that can be; the output layer, and a table that is tied to it, in 4 and in 8 bits.
WAYS = {
    "int8": {"scheme": "int8"},
    "int4, all": {"scheme": "int4", "skip_default": False},
    "int8, all, not fused": {"scheme": "int8", "skip_default": False, "fuse": False},
}


def names_of_parameters(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def llama(**changes):
    model = tiny_model("LlamaForCausalLM")
    return type(model)(transformers.LlamaConfig(**(ARCHITECTURES["LlamaForCausalLM"][1] | changes))).eval()


# Every class ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folders_and_dense_twins_of_every_class(name, way, tmp_path):
    model = quantize_model(tiny_model(name), **WAYS[way])
    want = outputs(model, name)
    save_model(model, tmp_path)
    again = load_model(tmp_path, torch.float32)
    assert type(again) is type(model)
    assert_bitwise(outputs(again, name), want, name)
    # Tied tensors are one again.
    assert names_of_parameters(again) == names_of_parameters(model)
    dense = dense_model(model, torch.float32)
    assert not any(isinstance(part, (Int4Weight, Int8Weight, RMSNorm)) for part in dense.modules())
    assert names_of_parameters(dense) == names_of_parameters(tiny_model(name))
    assert_bitwise(outputs(dense_model(again, torch.float32), name), outputs(dense, name), name)
    error = (outputs(dense, name) - want).abs().max() / want.abs().max()
    assert error < (1e-5 if "int4" in way else 0.5)


@pytest.mark.parametrize("way", WAYS)
def test_a_tied_output_keeps_a_bias_of_its_own(way, tmp_path):
    config = transformers.PhiConfig(**DECODER, tie_word_embeddings=True)
    source = transformers.PhiForCausalLM(config).eval()
    source.lm_head.bias.data = torch.arange(float(config.vocab_size))
    model = quantize_model(source, **WAYS[way])
    want = model(TOKENS).logits
    save_model(model, tmp_path)
    again = load_model(tmp_path, torch.float32)
    assert_bitwise(again.lm_head.bias, torch.arange(float(config.vocab_size)))
    assert_bitwise(again(TOKENS).logits, want)
    assert_bitwise(dense_model(again, torch.float32).lm_head.bias, again.lm_head.bias)


def test_a_linear_of_another_class_stays_what_it_is(tmp_path):
    model = quantize_model(tiny_model("PhimoeForCausalLM"), "int4")
    save_model(model, tmp_path)
    again = load_model(tmp_path, torch.float32)
    routers = [type(part) for part in tiny_model("PhimoeForCausalLM").modules() if "Router" in type(part).__name__]
    assert routers and all(issubclass(router, nn.Linear) for router in routers)
    for converted in (model, again):
        assert [type(part) for part in converted.modules() if "Router" in type(part).__name__] == routers


def test_a_folder_holds_a_generation_config_where_the_class_generates(tmp_path):
    for name, generates in (("LlamaForCausalLM", True), ("LlamaModel", False)):
        # Over the same folder: what the new model does not have must go.
        save_model(quantize_model(tiny_model(name), "int8"), tmp_path)
        assert (tmp_path / "generation_config.json").exists() == generates
        assert hasattr(load_model(tmp_path, torch.float32), "generation_config") == generates


# Half a folder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("failing", ["config", "tensors"])
def test_a_failing_save_changes_nothing(tmp_path, monkeypatch, existing, failing):
    import safetensors.torch

    folder, first = tmp_path / "model", quantize_model(tiny_model("LlamaForCausalLM"), "int8")
    if existing:
        save_model(first, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()} if existing else {}

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    if failing == "config":
        monkeypatch.setattr(transformers.LlamaConfig, "save_pretrained", full)
    else:
        monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_model(quantize_model(tiny_model("LlamaForCausalLM", 1), "int4"), folder)
    assert folder.exists() == existing
    assert before == ({path.name: path.read_bytes() for path in folder.iterdir()} if existing else {})


def test_a_save_that_is_killed_between_files_leaves_no_config(tmp_path, monkeypatch):
    save_model(quantize_model(tiny_model("LlamaForCausalLM"), "int8"), tmp_path)

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_model(quantize_model(tiny_model("LlamaForCausalLM", 1), "int8"), tmp_path)
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load_model(tmp_path)


# save_pretrained -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [True, False])
def test_save_pretrained_writes_what_save_model_writes(tmp_path, fuse):
    model = quantize_model(tiny_model("LlamaForCausalLM"), "int4", fuse=fuse)
    save_model(model, tmp_path / "saved")
    torch.save(model, tmp_path / "model.pt")
    unpickled = torch.load(tmp_path / "model.pt", weights_only=False)
    for converted in (model, copy.deepcopy(model), load_model(tmp_path / "saved"), unpickled):
        converted.save_pretrained(tmp_path / "out", safe_serialization=True, token=None)
        for path in (tmp_path / "saved").iterdir():
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_save_pretrained_in_a_process_that_only_unpickles(tmp_path):
    model = quantize_model(tiny_model("LlamaForCausalLM"), "int4")
    torch.save(model, tmp_path / "model.pt")
    script = (
        "import sys, torch\nimport qops, transformers\n"
        "torch.load(sys.argv[1], weights_only=False).save_pretrained(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "model.pt", tmp_path / "out"], check=True)
    assert_bitwise(load_model(tmp_path / "out")(TOKENS).logits, model(TOKENS).logits)


def test_save_pretrained_saves_models_of_which_a_part_is_converted(tmp_path):
    model = tiny_model("LlavaForConditionalGeneration")
    quantize_model(model.model.language_model, "int4")
    model.save_pretrained(tmp_path / "out")
    want = outputs(model, "LlavaForConditionalGeneration")
    again = outputs(load_model(tmp_path / "out", torch.float32), "LlavaForConditionalGeneration")
    torch.testing.assert_close(again, want)  # its layers are fused no more


@pytest.mark.parametrize(
    "given",
    [{"state_dict": {}}, {"variant": "fp16"}, {"push_to_hub": True}, {"is_main_process": False}, {"repo_id": "a/b"}],
)
def test_save_pretrained_refuses_what_it_would_ignore(tmp_path, given):
    model = quantize_model(tiny_model("LlamaForCausalLM"), "int4")
    with pytest.raises(ValueError, match=rf"LlamaForCausalLM\.save_pretrained: {next(iter(given))} must be"):
        model.save_pretrained(tmp_path / "out", **given)
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM\.push_to_hub .* huggingface_hub\.upload_folder"):
        model.push_to_hub("nobody/nothing")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["10KB", 10_000])
def test_shards_are_no_larger_than_asked_for_and_replaced(tmp_path, size):
    model = quantize_model(tiny_model("LlamaForCausalLM"), "int8")
    model.save_pretrained(tmp_path, max_shard_size=size)
    shards = list(tmp_path.glob("model-*.safetensors"))
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    assert len(shards) > 3 and all(path.stat().st_size < 2 * max(10_000, largest) for path in shards)
    assert_bitwise(load_model(tmp_path)(TOKENS).logits, model(TOKENS).logits)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    wrongs: tuple[Any, ...] = ("many", "-5GB", 0, -1, True, 1.5, None)
    for wrong in wrongs:
        with pytest.raises(ValueError, match=r"qops\.save_model: max_shard_size must be bytes, or a string"):
            save_model(model, tmp_path / "other", max_shard_size=wrong)
    assert not (tmp_path / "other").exists()


def test_dense_models_and_dense_twins_save_as_ever(tmp_path):
    model = quantize_model(tiny_model("LlamaForCausalLM"), "int4")
    for dense in (dense_model(model, torch.float32), tiny_model("LlamaForCausalLM")):
        dense.save_pretrained(tmp_path)
        again = type(dense).from_pretrained(tmp_path)
        assert_bitwise(again(TOKENS).logits, dense(TOKENS).logits)


def test_adapters_on_a_converted_model_are_saved_alone(tmp_path):
    peft = pytest.importorskip("peft")
    model = quantize_model(tiny_model("LlamaForCausalLM"), "int8")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    adapted.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (tmp_path / "model.safetensors").exists()


def test_adapters_of_transformers_own_integration_are_saved_alone(tmp_path):
    peft = pytest.importorskip("peft")
    model = quantize_model(tiny_model("LlamaForCausalLM"), "int8")
    try:
        model.add_adapter(peft.LoraConfig(target_modules=["lm_head"]))
    except ValueError as error:
        pytest.skip(f"this Transformers refuses this PEFT: {error}")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "model.safetensors").exists()


# Transformers' surgery -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration", "MarianMTModel"])
def test_tying_and_initialising_again_change_nothing(name, scheme):
    source = tiny_model(name) if name != "LlamaForCausalLM" else llama(tie_word_embeddings=True)
    model = quantize_model(source, scheme, skip_default=False)
    want, head, copied = outputs(model, name), model.get_output_embeddings(), copy.deepcopy(model)
    for call in (
        model.tie_weights,
        lambda: model.tie_weights(recompute_mapping=False),
        model.init_weights,
        model.post_init,
        lambda: model.resize_token_embeddings(96),
        lambda: model.resize_token_embeddings(96, 32),
        lambda: [model._init_weights(part) for part in model.modules()],
    ):
        call()
        assert model.get_output_embeddings() is head and isinstance(head.weight, (Int4Weight, Int8Weight))
        assert_bitwise(outputs(model, name), want)
    copied.init_weights()
    copied.tie_weights()
    assert_bitwise(outputs(copied, name), want)


@pytest.mark.parametrize("way", WAYS)
def test_a_head_of_its_own_stays_one_where_the_config_says_tied(way, tmp_path):
    # Transformers does not tie what a checkpoint holds twice, and differing.
    source = llama()
    source.config.tie_word_embeddings = True
    source.save_pretrained(tmp_path / "dense")
    model = quantize_model(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense"), **WAYS[way])
    want = model(TOKENS).logits
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved", torch.float32)
    for converted in (model, again):
        converted.tie_weights(recompute_mapping=False)
        assert_bitwise(converted(TOKENS).logits, want)
        assert type(converted.get_input_embeddings()) is nn.Embedding
        assert_bitwise(converted.model.embed_tokens.weight, source.model.embed_tokens.weight)
    save_model(again, tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    dense = dense_model(again, torch.float32)
    assert dense.lm_head.weight is not dense.model.embed_tokens.weight


def test_a_head_that_was_untied_by_hand_is_refused():
    model = llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"must have one weight, got two; set config\.tie_word_embeddings to False"):
        quantize_model(model, "int8", skip_default=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_untied_dense_tables_are_tied_as_ever():
    model = quantize_model(llama(tie_word_embeddings=True), "int4")
    model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_resizing_a_quantised_table_is_an_error_that_changes_nothing(scheme, tied):
    model = quantize_model(llama(tie_word_embeddings=tied), scheme, skip_default=False)
    want = model(TOKENS).logits
    for arguments in ((104,), (88,), (None, 64), (90, 64)):
        with pytest.raises(RuntimeError, match=r"resize_token_embeddings: an Int[48]Weight keeps its 96 rows, got"):
            model.resize_token_embeddings(*arguments)
        assert model.config.vocab_size == 96
        assert_bitwise(model(TOKENS).logits, want)
    assert isinstance(model.get_input_embeddings(), Int8Embedding) == (tied and scheme == "int8")


def test_resizing_dense_tables_of_a_converted_model_works():
    model = quantize_model(llama(), "int4")
    want = model(TOKENS).logits
    model.resize_token_embeddings(104)
    assert_bitwise(model(TOKENS).logits[..., :96], want)
    assert model(TOKENS).logits.shape[-1] == 104


# Maps and pickles ----------------------------------------------------------------------------------------------------


def test_device_maps_split_no_fused_layer():
    model = quantize_model(llama(num_hidden_layers=4), "int4")
    layer = next(part for part in model.modules() if isinstance(part, DecoderLayer))
    assert type(layer).__name__ in model._no_split_modules
    assert type(layer).__name__ in model.model._no_split_modules
    assert "FusedLlamaDecoderLayer" not in transformers.LlamaForCausalLM._no_split_modules
    accelerate = pytest.importorskip("accelerate")
    size = accelerate.utils.compute_module_sizes(model)
    memory = {0: size["model.embed_tokens"] + int(2.5 * size["model.layers.0"]), "cpu": 1 << 30}
    placed = accelerate.infer_auto_device_map(model, memory, no_split_module_classes=list(model._no_split_modules))
    assert [name for name in placed if name.startswith("model.layers.")] == [f"model.layers.{i}" for i in range(4)]
    assert len(set(placed.values())) == 2


@pytest.mark.parametrize("fuse", [True, False])
def test_converted_models_pickle_and_copy(tmp_path, fuse):
    model = quantize_model(llama(tie_word_embeddings=True), "int8", skip_default=False, fuse=fuse)
    want = model(TOKENS).logits
    torch.save(model, tmp_path / "model.pt")
    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert_bitwise(again(TOKENS).logits, want)
        assert again.lm_head.weight is again.model.embed_tokens.weight


# Words ---------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_of_a_missing_folder_is_not_looked_for_elsewhere(tmp_path, monkeypatch):
    def asked(*args, **kwargs):
        raise AssertionError("from_pretrained was asked")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", asked)
    with pytest.raises(FileNotFoundError, match="no such GGUF file or model folder") as caught:
        load_tokenizer(tmp_path / "missing" / "model")
    assert str(tmp_path / "missing" / "model") in str(caught.value)


def test_int4_tables_are_looked_up_densely_wherever_they_are_tied():
    model = quantize_model(tiny_model("MarianMTModel"), "int4", skip_default=False)
    head = model.get_output_embeddings()
    assert isinstance(head, Int4Linear)
    exact = head.weight.dequantize()
    for table in (model.model.shared, model.model.encoder.embed_tokens, model.model.decoder.embed_tokens):
        assert_bitwise(table.weight, exact)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["llama", "olmo2", "granite"])
def test_a_model_that_was_cast_comes_back_in_its_dtype_and_bits(family, dtype, fuse, tmp_path):
    """Rotary frequencies are cast with a model, and are no part of its state."""
    model = quantize_model(random_model(family).to(dtype), "int8", fuse=fuse)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.dtype == dtype
    assert_bitwise(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.skipif("internlm3" not in transformers.CONFIG_MAPPING, reason="an older Transformers")
def test_a_class_that_another_config_borrows(tmp_path):
    """InternLM 3 is a LlamaForCausalLM."""
    config = transformers.CONFIG_MAPPING["internlm3"](**SIZES)
    model = quantize_model(transformers.AutoModelForCausalLM.from_config(config).eval())
    save_model(model, tmp_path)
    assert_bitwise(load_model(tmp_path)(IDS).logits, model(IDS).logits)


def test_tensors_without_a_place_are_an_error(tmp_path):
    save_model(quantize_model(random_model("llama")), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"must have a place in LlamaForCausalLM .* have none: model\.layers\.2"):
        load_model(tmp_path)


# Models that a folder cannot hold ------------------------------------------------------------------------------------


def with_a_class_of_ones_own(model):
    owner = model.model.layers[1].mlp
    owner.__class__ = type("Mine", (type(owner),), {"__module__": "elsewhere"})
    return quantize_model(model), r"got elsewhere\.Mine at model\.layers\.1\.mlp"


def with_fewer_layers(model):
    model = quantize_model(model)
    del model.model.layers[1:]
    return model, r"got none more and model\.layers\.1\.\S+, .* fewer"


def with_more(model):
    model = quantize_model(model)
    model.model.more = nn.Linear(8, 8)
    return model, r"got model\.more\.bias, model\.more\.weight more and none fewer"


@pytest.mark.parametrize("make", [with_a_class_of_ones_own, with_fewer_layers, with_more])
def test_what_would_not_come_back_is_not_written(make, tmp_path):
    model, message = make(tiny_model("LlamaForCausalLM"))
    with pytest.raises(ValueError, match=rf"qops\.save_model: .*{message}"):
        save_model(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    with pytest.raises(ValueError, match=rf"qops\.models\.dense_model: .*{message}"):
        dense_model(model)
