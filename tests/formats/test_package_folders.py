"""Folders of HQQ, quanto, bitsandbytes, lmdeploy, torchao and ModelOpt, by definition and from the packages."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qops import load_model, quantize_int8
from qops.formats import open_checkpoint, read_checkpoint
from qops.formats.checkpoint import QuantizedFacts
from qops.models.inspect import inspect_checkpoint
from qops.models.replacement import require_kernels
from qops.nn import (
    Int4Linear,
    Int4SmoothedLinear,
    Int8Linear,
    Int8StaticLinear,
    Int8StaticSmoothedLinear,
    Int8TorchaoLinear,
    Int8WeightOnlyLinear,
)
from qops.testing import assert_bitwise
from tests.support.formats import package_folders as folders
from tests.support.formats.folders import Written
from tests.support.models.families import IDS

FORMATS: dict[str, tuple[Callable[[], Written], type]] = {
    "hqq 4 bits": (lambda: folders.hqq(4), Int4Linear),
    "hqq 8 bits": (lambda: folders.hqq(8), Int8WeightOnlyLinear),
    "quanto qint4": (lambda: folders.quanto("qint4"), Int4Linear),
    "quanto qint8": (lambda: folders.quanto("qint8"), Int8WeightOnlyLinear),
    "bitsandbytes": (folders.bitsandbytes, Int8WeightOnlyLinear),
    "smooth_quant": (folders.smooth_quant, Int8Linear),
    "modelopt W4A16_AWQ": (lambda: folders.modelopt("W4A16_AWQ"), Int4Linear),
    "modelopt smoothed": (lambda: folders.modelopt("W4A16_AWQ", smoothed=True), Int4SmoothedLinear),
    "modelopt W8A16": (lambda: folders.modelopt("W8A16"), Int8WeightOnlyLinear),
    "modelopt W8A8_SQ_PER_CHANNEL": (lambda: folders.modelopt("W8A8_SQ_PER_CHANNEL"), Int8StaticLinear),
    "modelopt W8A8 smoothed": (
        lambda: folders.modelopt("W8A8_SQ_PER_CHANNEL", smoothed=True),
        Int8StaticSmoothedLinear,
    ),
    "torchao Int8Tensor": (lambda: folders.torchao("Int8Tensor"), Int8WeightOnlyLinear),
    "torchao Int8Tensor dynamic": (lambda: folders.torchao("Int8Tensor", dynamic=True), Int8TorchaoLinear),
    "torchao IntxUnpackedToInt8Tensor": (lambda: folders.torchao("IntxUnpackedToInt8Tensor"), Int4Linear),
    "torchao Int4Tensor": (lambda: folders.torchao("Int4Tensor"), Int4Linear),
}
LAYER = "model.layers.1.mlp.down_proj"
OF_INPUT = (".input_scale", ".pre_quant_scale")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_weight_is_exact(tmp_path, name, shards):
    written = FORMATS[name][0]()
    written.shards = shards
    path = written.write(tmp_path)
    state = written.model.state_dict()
    for key, value in read_checkpoint(path).items():
        if isinstance(value, Tensor):
            assert_bitwise(value, written.tensors[key], key)
            if not key.endswith(OF_INPUT):
                del state[key]
        else:
            assert_bitwise(value.dequantize(), state.pop(f"{key}.weight"), key)
    assert not state


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_of_each(tmp_path, name):
    make, kind = FORMATS[name]
    written = make()
    model = load_model(written.write(tmp_path), torch.float32)
    assert model.qops_fusion.not_fused is None, model.qops_fusion
    linear, dense = model.get_submodule(LAYER), smoothed(written).double()
    assert type(linear) is kind
    if kind in ACTIVATIONS:  # whose rounding hides in whole models what a layer shows
        x = torch.randn(5, 96, generator=torch.Generator().manual_seed(9))
        factors = written.tensors.get(f"{LAYER}.pre_quant_scale", torch.ones(()))
        loaded, wanted = linear(x), dense.get_submodule(LAYER)(ACTIVATIONS[kind](x * factors))
    else:
        loaded, wanted = model(IDS).logits, dense(IDS).logits
    assert (loaded - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def smoothed(written: Written) -> Any:
    """The dense model, with columns multiplied where activations are to be."""
    dense = copy.deepcopy(written.model).double()
    for name, value in written.tensors.items():
        if name.endswith(".pre_quant_scale") and not any(key.endswith(".input_scale") for key in written.tensors):
            dense.get_submodule(name.removesuffix(".pre_quant_scale")).weight.data.mul_(value.double())
    return dense


def per_token(rule: str) -> Callable[[Tensor], Tensor]:
    def rounded(x: Tensor) -> Tensor:
        codes, scale = quantize_int8(x, rule)
        return codes.double() * scale.double().unsqueeze(-1)

    return rounded


def static(x: Tensor) -> Tensor:
    return (x / torch.tensor(0.03)).round().clamp(-128, 127).double() * 0.03


ACTIVATIONS = {
    Int8Linear: per_token("127"),
    Int8TorchaoLinear: per_token("torchao"),
    Int8StaticLinear: static,
    Int8StaticSmoothedLinear: static,
}


def test_a_scale_of_modelopt_s_activations_is_read(tmp_path):
    checkpoint = open_checkpoint(folders.modelopt("W8A8_SQ_PER_CHANNEL").write(tmp_path))
    assert checkpoint.activations(LAYER)["input_scale"] == torch.tensor(0.03)


def test_bitsandbytes_without_a_threshold_for_outliers_rounds_every_column(tmp_path):
    written = folders.bitsandbytes()
    written.config["quantization_config"]["llm_int8_threshold"] = 0.0
    assert type(load_model(written.write(tmp_path)).get_submodule(LAYER)) is Int8Linear


def test_modelopt_s_older_settings(tmp_path):
    written = folders.modelopt("W8A16")
    written.config.pop("quantization_config")
    written.files["hf_quant_config.json"] = {
        "producer": {"name": "modelopt"},
        "quantization": {"quant_algo": "W8A16", "kv_cache_quant_algo": None},
    }
    assert type(load_model(written.write(tmp_path)).get_submodule(LAYER)) is Int8WeightOnlyLinear


def test_a_config_of_hqq_s_own_is_taken(tmp_path):
    written = folders.hqq(4)
    written.config["quantization_config"] = {"quant_method": "hqq", "quant_config": {}, "skip_modules": ["lm_head"]}
    assert type(load_model(written.write(tmp_path)).get_submodule(LAYER)) is Int4Linear


def test_one_scale_of_torchao_and_quanto_for_all(tmp_path):
    for name, written in (("torchao", folders.torchao("Int8Tensor")), ("quanto", folders.quanto("qint8"))):
        key = f"{LAYER}.{'_weight' if name == 'torchao' else 'weight.'}_scale"
        first = written.tensors[key][:1]
        written.tensors[key] = first if name == "torchao" else first[0, 0].clone()
        if name == "torchao":
            written.tensors[f"{LAYER}._weight_zero_point"] = torch.zeros(1, 1, dtype=torch.int8)
        codes = written.tensors[f"{LAYER}.{'_weight_qdata' if name == 'torchao' else 'weight._data'}"]
        found = read_checkpoint(written.write(tmp_path / name))[LAYER]
        assert_bitwise(found.dequantize(), codes * first.float(), name)


MISSING: Any = None


def said(**changes: Any) -> Callable[[Written], None]:
    """Other attributes in the metadata of torchao."""

    def change(written: Written) -> None:
        found = json.loads(written.metadata[f"{LAYER}.weight"])
        found["_type"] = changes.pop("_type", found["_type"])
        found["_data"] |= changes
        written.metadata[f"{LAYER}.weight"] = json.dumps(found)

    return change


def configured(**changes: Any) -> Callable[[Written], None]:
    return lambda written: written.config["quantization_config"].update(changes)


def mapped(**changes: Any) -> Callable[[Written], None]:
    return lambda written: written.files["quanto_qmap.json"][LAYER].update(changes)


def tensor(key: str, changed: Any) -> Callable[[Written], None]:
    def change(written: Written) -> None:
        name = f"{LAYER}.{key}"
        if changed is MISSING:
            del written.tensors[name]
        else:
            written.tensors[name] = changed(written.tensors.get(name)).contiguous()

    return change


ASYMMETRIC = copy.deepcopy(folders.DYNAMIC)
ASYMMETRIC["_data"]["mapping_type"]["_data"] = "ASYMMETRIC"
BY_TENSOR = copy.deepcopy(folders.DYNAMIC)
BY_TENSOR["_data"]["granularity"] = {"_type": "PerTensor", "_data": {}}
HALF_RANGE = copy.deepcopy(folders.DYNAMIC)
HALF_RANGE["_data"]["reduce_range"] = True


def one(value: int) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.full_like(t, value)


REFUSED = [
    ("hqq 4 bits", tensor("W_q", lambda t: t[:-1]), r"W_q must have 1 or 2 codes in a byte, of \[64, 96\]"),
    ("hqq 4 bits", tensor("W_q", lambda t: t.view(-1, 64)), "W_q must have rows of a group size that divides K = 96"),
    ("hqq 4 bits", tensor("W_q", lambda t: t.char()), "tensor W_q must be uint8"),
    ("hqq 4 bits", tensor("scale", MISSING), "tensor scale is missing"),
    ("hqq 4 bits", tensor("zero", lambda t: t.t()), r"tensor zero must be .* \[192, 1\], got float16 \[1, 192\]"),
    ("hqq 4 bits", tensor("axis", MISSING), "tensor axis is missing"),
    ("hqq 4 bits", tensor("axis", one(0)), "'axis': 0"),
    ("hqq 4 bits", tensor("quant_zero", one(1)), "'quant_zero': 1"),
    ("hqq 4 bits", tensor("view_as_float", one(1)), "'view_as_float': 1"),
    (
        "hqq 4 bits",
        tensor("shape", lambda t: t.flip(0)),
        r"shape must be \[64, 96\], as in config.json, got \[96, 64\]",
    ),
    ("hqq 4 bits", tensor("scale", one(torch.inf)), "scales must be finite"),
    ("hqq 8 bits", tensor("zero", lambda t: t.float() + 0.1), "offsets must fit in float32"),
    ("quanto qint4", mapped(weights="qint2"), "weights must be qint4 or qint8 in quanto_qmap.json, got 'qint2'"),
    ("quanto qint4", mapped(activations="qint8"), "activations must be none in quanto_qmap.json, got 'qint8'"),
    ("quanto qint4", mapped(weights="qint8"), "tensor weight._data is missing"),
    ("quanto qint4", tensor("weight._shift", MISSING), "tensor weight._shift is missing"),
    ("quanto qint4", tensor("weight._data._data", lambda t: t[1:]), r"weight._data._data must be uint8 \[96, 32\]"),
    (
        "quanto qint8",
        tensor("weight._scale", lambda t: t.t()),
        r"weight._scale must be .* \[64, 1\], got float16 \[1, 64\]",
    ),
    ("bitsandbytes", configured(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "load_in_8bit must be true.* got 'nf4'"),
    ("bitsandbytes", configured(llm_int8_threshold="6"), "llm_int8_threshold must be a number from 0 on, got '6'"),
    ("bitsandbytes", tensor("SCB", MISSING), "tensor SCB is missing"),
    ("bitsandbytes", tensor("weight_format", one(1)), "weight_format must be 0, rows, got 1"),
    ("bitsandbytes", tensor("SCB", lambda t: t[1:]), r"tensor SCB must be float32 \[64\], got float32 \[63\]"),
    ("bitsandbytes", tensor("weight", lambda t: t.byte()), "tensor weight must be int8"),
    ("smooth_quant", configured(quant_dtype="float8_e4m3fn"), "quant_dtype must be int8, got 'float8_e4m3fn'"),
    ("smooth_quant", tensor("scale", lambda t: t.half()), "tensor scale must be float32"),
    ("smooth_quant", tensor("weight", MISSING), "tensor weight must be a matrix, got None"),
    ("modelopt W8A16", configured(quant_algo="NVFP4"), "quant_algo must be one of W4A16_AWQ.* got 'NVFP4'"),
    ("modelopt W8A16", configured(kv_cache_quant_algo="FP8"), "kv_cache_quant_algo is not supported, got 'FP8'"),
    ("modelopt W8A16", configured(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is not supported"),
    ("modelopt W8A16", tensor("pre_quant_scale", lambda t: torch.ones(96)), "pre_quant_scale is not supported where"),
    ("modelopt smoothed", tensor("pre_quant_scale", lambda t: t[1:]), r"pre_quant_scale must be .* \[96\]"),
    ("modelopt W4A16_AWQ", tensor("weight_scale", lambda t: t[:, :0]), "weight_scale must have shape"),
    ("modelopt W4A16_AWQ", tensor("weight_scale", lambda t: t[1:]), "tensor weight_scale must be float32"),
    ("modelopt W8A8_SQ_PER_CHANNEL", tensor("input_scale", MISSING), "tensor input_scale is missing"),
    ("torchao Int8Tensor", said(_type="Float8Tensor"), "tensor must be one of Int8Tensor.* got Float8Tensor"),
    (
        "torchao Int8Tensor",
        said(_type="Int4TilePackedTo4dTensor"),
        "got Int4TilePackedTo4dTensor, tiles of tensor cores",
    ),
    ("torchao Int8Tensor", lambda written: written.metadata.clear(), "metadata of the file must tell the class"),
    (
        "torchao Int8Tensor",
        lambda written: written.metadata.update({f"{LAYER}.weight": "[" * 9}),
        "metadata of the file",
    ),
    ("torchao Int8Tensor", said(act_quant_kwargs=ASYMMETRIC), "act_quant_kwargs must say symmetric"),
    ("torchao Int8Tensor", said(act_quant_kwargs=BY_TENSOR), "act_quant_kwargs must say symmetric, by rows"),
    ("torchao Int8Tensor", said(act_quant_kwargs=HALF_RANGE), "and with the whole range"),
    ("torchao Int8Tensor", tensor("_weight_act_pre_scale", lambda t: torch.ones(96)), "must have no act_pre_scale"),
    ("torchao Int8Tensor", tensor("_weight_zero_point", one(1)), r"zero_point must be 0, .* got 1 \.\.\. 1"),
    ("torchao Int8Tensor", tensor("_weight_scale", lambda t: t[1:]), "tensor _weight_scale must be"),
    (
        "torchao Int8Tensor dynamic",
        tensor("_weight_scale", lambda t: t.expand(-1, 3)),
        "one scale per row|zero_point must be",
    ),
    ("torchao IntxUnpackedToInt8Tensor", said(target_dtype={"_data": "int2"}), "target_dtype must be int4, got int2"),
    ("torchao IntxUnpackedToInt8Tensor", said(activation_quantization="int8_asym_per_token"), "must be null"),
    ("torchao IntxUnpackedToInt8Tensor", tensor("_weight_zero_point", MISSING), "tensor _weight_zero_point is missing"),
    ("torchao IntxUnpackedToInt8Tensor", tensor("_weight_qdata", one(9)), r"qdata must be -8 \.\.\. 7, got 9 \.\.\. 9"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_refused(tmp_path: Path, name, change, message):
    written = FORMATS[name][0]()
    change(written)
    path = written.write(tmp_path)
    for read in (load_model, read_checkpoint):
        with pytest.raises(ValueError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_tensors_of_one_linear_that_the_model_does_not_have(tmp_path):
    written = folders.hqq(4)
    for key in [key for key in written.tensors if key.startswith(f"{LAYER}.")]:
        written.tensors[key.replace("down_proj", "side_proj")] = written.tensors[key].clone()
    with pytest.raises(ValueError, match=r"mlp\.side_proj: it is no linear of the model that config\.json describes"):
        load_model(written.write(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "config has 1000000000 layers, the files [0-9]+ tensors"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 2**62}, "no LlamaForCausalLM can be made of its config: "),
        (
            {"pad_token_id": 2**40},
            "no LlamaForCausalLM can be made of its config: AssertionError: Padding_idx must be within",
        ),
        ({"architectures": ["torch"]}, "architectures must name a model class of transformers, got 'torch'"),
        ({"architectures": None}, "architectures must name a model class"),
    ],
)
@pytest.mark.parametrize("name", ["hqq 4 bits", "quanto qint4"])
def test_configs_that_describe_no_model(tmp_path, name, changes, message):
    written = FORMATS[name][0]()
    written.config |= changes
    path = written.write(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_folder_holds_is_told_without_reading_it(tmp_path, name):
    make, kind = FORMATS[name]
    path = make().write(tmp_path)
    checkpoint, found = open_checkpoint(path), inspect_checkpoint(path)
    weight, facts = checkpoint.weight(LAYER), checkpoint.describe(f"{LAYER}.weight")
    assert facts.shape == (weight.out_features, weight.in_features)
    assert facts.quantized == QuantizedFacts(
        weight.group_size, weight.scale_dtype, (weight.kind,), weight.act_order, weight.zero_dtype
    )
    (part,) = (part for part in found.parts if f"{LAYER}.weight" in part.names or LAYER in part.names)
    assert part.operator == kind.operator and found.not_fused is None
    loaded = sum(tensor.nbytes for tensor in load_model(path).state_dict().values())
    assert 0.98 * loaded < found.memory_bytes < 1.02 * loaded
    require_kernels("load", {LAYER: kind}, "cpu", torch.float32, None)
