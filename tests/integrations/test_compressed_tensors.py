"""compressed-tensors as it is written: read back here to the bit, and by that package and Transformers."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import qops
from qops import Int4Weight, Int8Weight, load_model, quantize_model, save_model
from qops.formats.compressed_tensors import int8_weight
from qops.formats.folders.compressed import compressed
from qops.models import dense_model
from qops.models.replacement import entries
from qops.nn import Int8Linear, Int8WeightOnlyLinear
from qops.nn.linears import LINEARS
from qops.testing import assert_bitwise
from tests.support.formats import folders
from tests.support.formats.folders import write_as
from tests.support.models.families import FUSED, IDS, random_model

SCHEMES = {
    "4 bits": qops.Int4(32),
    "4 bits, asymmetric": qops.Int4(32, symmetric=False),
    "4 bits, a scale per row": qops.Int4(-1),
    "8 bits": qops.Int8WeightOnly(),
    "8 bits in groups": qops.Int8WeightOnly(32),
    "mixed": {
        "*.down_proj": qops.Int8WeightOnly(),
        "o_proj": None,
        "gate_proj": qops.Int4(16, symmetric=False),
        "*": qops.Int4(32),
    },
}
DTYPES = [torch.float16, torch.bfloat16]


def write(folder: Path, scheme: Any, dtype: torch.dtype = torch.float16, **arguments: Any) -> Any:
    model = quantize_model(random_model("llama").to(dtype), scheme, **arguments)
    save_model(model, folder, format="compressed-tensors")
    return model


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


# Read back here ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_folder_has_the_bits_of_its_model(tmp_path, name, dtype):
    model = write(tmp_path, SCHEMES[name], dtype)
    again = load_model(tmp_path)
    assert again.dtype == dtype and again.qops_fusion.not_fused is None
    assert_bitwise(again(IDS).logits, model(IDS).logits)
    state = again.state_dict()
    for key, value in model.state_dict().items():
        assert_bitwise(state[key], value, key)


@pytest.mark.parametrize("family", FUSED)
def test_a_folder_of_each_family_has_the_bits_of_its_model(tmp_path, family):
    model = quantize_model(random_model(family).half(), qops.Int4(32, symmetric=False))
    model.generation_config.eos_token_id = 7
    save_model(model, tmp_path, format="compressed-tensors", max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    again = load_model(tmp_path)
    assert again.generation_config.eos_token_id == 7
    assert_bitwise(again(IDS).logits, model(IDS).logits)


W8A8 = {
    "int8": "int8_compressed_tensors",
    "int8_compressed_tensors": "int8_compressed_tensors",
    "int8_torchao": "int8_compressed_tensors",
    "int8_asymmetric": "int8_asymmetric_compressed_tensors",
    "int8_asymmetric_compressed_tensors": "int8_asymmetric_compressed_tensors",
    "int8_static": "int8_static_compressed_tensors",
    "int8_static_compressed_tensors": "int8_static_compressed_tensors",
}
"""Each scheme and the one that it comes back as: what rounds activations has no name in the format."""


def w8a8(scheme: str) -> Any:
    model = quantize_model(random_model("llama").half(), "int8", fuse=False)
    given = {"input_scale": torch.tensor([0.05]), "input_zero_point": torch.tensor([3], dtype=torch.int8)}
    for name, part in list(model.named_modules()):
        if type(part) is Int8Linear:
            kind: Any = LINEARS[scheme]
            model.set_submodule(name, kind(part.weight, part.bias, **(given if kind.static_input else {})))
    return model


@pytest.mark.parametrize("scheme", W8A8)
def test_w8a8_keeps_weights_and_static_scales(tmp_path, scheme):
    model = w8a8(scheme)
    save_model(model, tmp_path, format="compressed-tensors")
    again = load_model(tmp_path)
    assert {part.scheme for part in again.modules() if isinstance(part, Int8Linear)} == {W8A8[scheme]}
    found = {name: owner for name, _, owner in entries(again)}
    for name, part in model.named_modules():
        if isinstance(part, Int8Linear):
            held = found[f"{name}.weight"]
            assert_bitwise(held.weight.dequantize(torch.float32), part.weight.dequantize(torch.float32), name)
            assert held.activations().keys() == part.activations().keys() == set(part.static_input)
            assert all(torch.equal(held.activations()[key], tensor) for key, tensor in part.activations().items())


def test_a_linear_that_the_format_has_no_scheme_for_is_refused():
    class Other(Int8Linear):
        scheme = "other"

    with pytest.raises(ValueError, match="compressed-tensors has no scheme for an Other"):
        compressed(Other(Int8Weight.quantize(torch.ones(8, 16))))


READ = [
    folders.gptq(),
    folders.gptq(bits=8),
    folders.awq(),
    folders.compressed_tensors(bits=8, symmetric=False),
]


@pytest.mark.parametrize("read", READ)
def test_what_was_read_from_another_format_is_written_with_its_zero_points(tmp_path, read):
    model = load_model(write_as(*read).write(tmp_path / "source"))
    save_model(model, tmp_path / "out", format="compressed-tensors")
    (group,) = settings(tmp_path / "out")["config_groups"].values()
    assert not group["weights"]["symmetric"]
    again = load_model(tmp_path / "out")
    assert_bitwise(again(IDS).logits, model(IDS).logits)


def test_a_scheme_is_for_all_linears_or_for_named_ones(tmp_path):
    write(tmp_path / "one", SCHEMES["4 bits"], skip=("k_proj",))
    found = settings(tmp_path / "one")
    assert [group["targets"] for group in found["config_groups"].values()] == [["Linear"]]
    assert found["format"] == "pack-quantized"
    assert set(found["ignore"]) == {"lm_head", *(f"model.layers.{i}.self_attn.k_proj" for i in range(3))}
    write(tmp_path / "mixed", {"*.down_proj": "int8", "*": "int4"})
    found = settings(tmp_path / "mixed")
    assert found["format"] == "mixed-precision"
    named = [name for group in found["config_groups"].values() for name in group["targets"]]
    assert len(named) == len(set(named)) == 21
    assert {group["format"] for group in found["config_groups"].values()} == {"pack-quantized", "int-quantized"}


def test_an_output_layer_of_its_own_is_held(tmp_path):
    model = quantize_model(random_model("llama").half(), "int4", skip_default=False)
    save_model(model, tmp_path, format="compressed-tensors")
    assert settings(tmp_path)["ignore"] == []
    assert_bitwise(load_model(tmp_path)(IDS).logits, model(IDS).logits)


# What is not held ----------------------------------------------------------------------------------------------------


def weight(kind: str, zeros: torch.Tensor | None, perm: torch.Tensor | None = None) -> Int4Weight:
    codes = torch.randint(0, 256, (64, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Int4Weight.from_canonical(codes, torch.ones(64, 4).half(), kind=kind, zeros=zeros, perm=perm)


SIXTEEN = torch.full((64, 4), 8, dtype=torch.uint8).index_fill_(0, torch.tensor([5]), 16)
REFUSED = {
    "offsets": (weight("offset", torch.randn(64, 4)), "does not hold kind 'offset'"),
    "float zeros": (weight("float_zero", torch.randn(64, 4)), "does not hold kind 'float_zero'"),
    "zero point 16": (weight("zero_point", SIXTEEN), "kind 'zero_point' with zero points above 15, got 16"),
    "act-order": (weight("symmetric", None, torch.arange(64).flip(0).int()), r"act-order \(weight_g_idx\) is read no"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_format_does_not_hold_is_refused_by_layer_and_kind(tmp_path, name):
    model = quantize_model(random_model("llama").half(), "int4", fuse=False)
    odd, message = REFUSED[name]
    model.model.layers[1].self_attn.q_proj.weight = odd
    said = rf'qops\.save_model: model\.layers\.1\.self_attn\.q_proj: .*{message}.*; format="qops" holds it'
    with pytest.raises(ValueError, match=said):
        save_model(model, tmp_path / "out", format="compressed-tensors")
    assert not (tmp_path / "out").exists()
    save_model(model, tmp_path / "out")
    assert_bitwise(load_model(tmp_path / "out")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("zero", [0.5, 129.0, -130.0, float(torch.finfo(torch.float32).tiny)])
def test_offsets_of_8_bits_that_are_no_zero_points_are_refused(zero):
    codes, scales = torch.zeros(8, 32, dtype=torch.int8), torch.ones(8, 2).half()
    offsets = torch.ones(8, 2)
    held = Int8Weight.from_canonical(codes, scales, kind="offset", zeros=offsets)
    assert compressed(Int8WeightOnlyLinear(held))[1]["weights"]["symmetric"] is False
    offsets[3, 1] = zero
    odd = Int8Weight.from_canonical(codes, scales, kind="offset", zeros=offsets)
    with pytest.raises(ValueError, match=r"kind 'offset', but where all offsets are -scale \* integer"):
        compressed(Int8WeightOnlyLinear(odd))


def test_offsets_of_8_bits_reach_both_ends(tmp_path):
    codes, scales = torch.arange(256).sub(128).to(torch.int8).reshape(8, 32), torch.full((8, 2), 0.1).half()
    scales[2, 0] = 0
    for zero in (-128, -127, 0, 127):
        offsets = -scales.float() * zero
        held = Int8Weight.from_canonical(codes, scales, kind="offset", zeros=offsets)
        tensors, _ = compressed(Int8WeightOnlyLinear(held))
        again = int8_weight(tensors.pop("weight_packed"), **tensors)
        assert_bitwise(again.dequantize(torch.float32) + 0.0, held.dequantize(torch.float32) + 0.0, str(zero))


def test_a_quantised_table_and_a_dense_model_are_refused(tmp_path):
    model = quantize_model(random_model("llama", tie_word_embeddings=True), "int4", skip_default=False)
    with pytest.raises(ValueError, match=r"model\.embed_tokens: compressed-tensors holds no quantised tables"):
        save_model(model, tmp_path, format="compressed-tensors")
    with pytest.raises(ValueError, match=r"format must be one of qops, compressed-tensors, got 'gguf'"):
        save_model(model, tmp_path, format="gguf")


# Read back by others -------------------------------------------------------------------------------------------------


def assert_decompresses(folder: Path, model: Any) -> None:
    """By the package itself, weight for weight."""
    compressors = importlib.import_module("compressed_tensors.compressors").BaseCompressor
    is_match = importlib.import_module("compressed_tensors.utils.match").is_match
    package = importlib.import_module("compressed_tensors.quantization")
    config, tensors = (
        package.QuantizationConfig.model_validate(settings(folder)),
        load_file(folder / "model.safetensors"),
    )
    dense, seen = dense_model(model, torch.float32), set[str]()
    for name, linear in dense.named_modules():
        if type(linear) is not torch.nn.Linear:
            continue
        found = [
            group for group in config.config_groups.values() if is_match(name, linear, group.targets, config.ignore)
        ]
        stored = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.rpartition(".")[0] == name}
        if not found:
            assert set(stored) <= {"weight", "bias"}
            continue
        (scheme,) = found
        weight = compressors.get_value_from_registry(scheme.format).decompress(stored, scheme)["weight"]
        assert_bitwise(weight.float(), linear.weight.to(weight.dtype).float(), name)
        seen.add(f"{name}.weight")
    assert seen == {name for name, value, _ in entries(model) if not isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("name", [*SCHEMES, "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_package_finds_every_weight(tmp_path, name, dtype):
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
    model = write(tmp_path, SCHEMES.get(name, name), dtype)
    assert_decompresses(tmp_path, model)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_transformers_computes_what_the_dense_model_does(tmp_path, name, dtype):
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
    if dtype != torch.float32 and not name.startswith("4 bits"):
        pytest.skip("scales of 8 bits are float32, and Transformers rounds them to the dtype of the model")
    scheme: Any = SCHEMES[name]
    if name == "mixed":  # of packed zero points it takes those of models that have one scheme, and dequantises these
        scheme = {**scheme, "gate_proj": qops.Int4(16)}
    model = write(tmp_path, scheme, dtype)
    dequantised = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    arguments: Any = dequantised if "asymmetric" in name else {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **arguments)
    dense = dense_model(model, dtype)
    assert_bitwise(theirs(IDS).logits, dense(IDS).logits)
    for key, value in dense.state_dict().items():
        assert_bitwise(theirs.state_dict()[key], value, key)
