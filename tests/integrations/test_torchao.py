"""torchao's `quantize_` with our config: linears of qops, exact where torchao has quantised before."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import qops
from qops.integrations import torchao as ours
from qops.nn import Int4Int8Linear, Int4Linear, Int8Linear, Int8TorchaoLinear, Int8WeightOnlyLinear, QuantizedLinear
from qops.testing import assert_bitwise, generator
from tests.support.formats import package_folders
from tests.support.house.pages import run_examples
from tests.support.models.families import IDS, random_model

quantization = pytest.importorskip("torchao.quantization")
granularity = pytest.importorskip("torchao.quantization.granularity")
quantize_ = quantization.quantize_

SCHEMES = {
    "int4": (qops.Int4(), Int4Linear),
    "w4a8": (qops.W4A8(), Int4Int8Linear),
    "int8": (qops.Int8(), Int8Linear),
    "int8_weight_only": (qops.Int8WeightOnly(), Int8WeightOnlyLinear),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def dense(n: int = 96, k: int = 128, dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> Any:
    torch.manual_seed(n + k)
    return nn.Linear(k, n, bias=bias).to(dtype)


def rows(k: int = 128, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(5, k, generator=generator(1)).to(dtype)


# Dense linears -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dense_linear_becomes_that_of_its_scheme(name, dtype):
    scheme, kind = SCHEMES[name]
    linear, x = dense(dtype=dtype), rows(dtype=dtype)
    model = nn.Sequential(copy.deepcopy(linear), nn.ReLU())
    quantize_(model, ours.config(name))
    assert type(model[0]) is kind and isinstance(model[1], nn.ReLU)
    assert_bitwise(model[0](x), scheme._quantize(linear)(x))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_settings_and_torchaos_own_ways_to_choose():
    model = nn.ModuleDict({"a": dense(), "b": dense(), "c": dense(), "norm": nn.LayerNorm(8)})
    chosen = {"a": ours.config(qops.Int4(32, symmetric=False)), "b": None, "re:[cd]": ours.config("int8")}
    quantize_(model, quantization.FqnToConfig(chosen), filter_fn=None)
    first: Any = model["a"]
    assert type(first) is Int4Linear and first.weight.group_size == 32 and first.weight.kind == "zero_point"
    assert type(model["b"]) is nn.Linear and type(model["c"]) is Int8Linear
    model = nn.ModuleDict({"a": dense(), "b": dense()})
    quantize_(model, ours.config("int4"), lambda module, name: name == "b")
    assert type(model["a"]) is nn.Linear and type(model["b"]) is Int4Linear


def test_the_linear_itself_changes():
    """For whoever has it already, and where it is all that `quantize_` gets."""
    linear, seen = dense(), []
    linear.register_forward_hook(lambda *_: seen.append(1))
    twice = nn.ModuleList([linear, linear])
    quantize_(twice, ours.config("int4"))
    assert twice[0] is linear is twice[1] and type(linear) is Int4Linear
    linear(rows())
    assert seen == [1]
    alone = dense().eval()
    quantize_(alone, ours.config("w4a8"))
    assert type(alone) is Int4Int8Linear and not alone.training
    buffer = io.BytesIO()
    torch.save(alone, buffer)
    buffer.seek(0)
    assert_bitwise(torch.load(buffer, weights_only=False)(rows()), alone(rows()))
    again = copy.deepcopy(alone)
    quantize_(again, ours.config("int8"))
    assert type(again) is Int4Int8Linear  # torchao's own filter passes dense linears alone


def test_a_model_has_the_bits_of_quantize_model():
    model = random_model("llama").bfloat16()
    wanted = qops.quantize_model(copy.deepcopy(model), "int4", fuse=False, skip=())
    quantize_(model, ours.config("int4"), lambda module, name: type(module) is nn.Linear and name != "lm_head")
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            x = rows(module.in_features)
            assert_bitwise(module(x), wanted.get_submodule(name)(x), name)
    found, logits = model(IDS).logits, wanted(IDS).logits
    # Its norms are Transformers', whose last bit is another one.
    assert (found - logits).abs().max() <= 0.03 * logits.abs().max()


class Odd(nn.Linear):
    """It may compute more."""


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.Linear(12, 16), "K = 12 must be a multiple of 8"),
        (nn.Linear(16, 12), "N = 12 must be a multiple of 8"),
        (Odd(16, 16), "Odd is a linear of another kind"),
        (nn.LayerNorm(16), "it is no nn.Linear"),
        (nn.Linear(16, 16).double(), "its weight is torch.float64"),
    ],
)
def test_what_stays_dense_is_said(module, why):
    with pytest.warns(UserWarning, match=f"qops.integrations.torchao: .* stays as it is: {why}"):
        quantize_(module, ours.config("int4"), lambda *_: True)
    assert not isinstance(module, QuantizedLinear)


def test_errors():
    with pytest.raises(ValueError, match=r"torchao.config: scheme must be one of 'int4', .* got 'int3'"):
        ours.config("int3")
    with pytest.raises(ValueError, match=r"or a scheme such as .* got \{\}"):
        ours.config({})  # type: ignore[arg-type]
    linear = dense()
    with pytest.raises(ValueError, match="group_size"):
        quantize_(linear, ours.config(qops.Int4(96)))
    assert type(linear) is nn.Linear
    linear.weight.data[3, 5] = torch.inf
    for name in SCHEMES:
        with pytest.raises(ValueError, match="finite"):
            quantize_(linear, ours.config(name))
    assert type(linear) is nn.Linear


# Linears that torchao has quantised ----------------------------------------------------------------------------------


def by_torchao(how: str, **more: Any) -> tuple[Any, Any]:
    """(config, what its linear becomes here)."""
    if how == "intx":
        config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity.PerGroup(32))
        return config, Int4Linear
    name = "Int8WeightOnlyConfig" if how == "weights" else "Int8DynamicActivationInt8WeightConfig"
    return getattr(quantization, name)(**more), Int8WeightOnlyLinear if how == "weights" else Int8TorchaoLinear


@pytest.mark.parametrize("how", ["intx", "weights", "dynamic"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", [None, "int4"])
def test_torchaos_weights_keep_their_bits(how, dtype, scheme):
    config, kind = by_torchao(how)
    model, x = nn.Sequential(dense(dtype=dtype), dense(96, 96, dtype)), rows(dtype=dtype)
    quantize_(model[:1], config)
    weight, wanted = model[0].weight.dequantize(), model[0](x)
    bias = model[0].bias
    quantize_(model, ours.config(scheme))
    assert type(model[0]) is kind and type(model[1]) is (nn.Linear if scheme is None else Int4Linear)
    assert_bitwise(model[0].dense_weight(weight.dtype), weight)
    assert_bitwise(model[0].bias, bias)
    # torchao rounds products of its own order of sums, in the dtype of x.
    step = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    assert (model[0](x) - wanted).abs().max() <= step * wanted.abs().max()


def test_an_int4_tensor():
    """torchao makes them on GPUs: here one is laid out as they are."""
    written, name = package_folders.torchao("Int4Tensor"), "model.layers.0.mlp.down_proj"
    qdata, scale, zero = (written.tensors[f"{name}._weight_{key}"] for key in ("qdata", "scale", "zero_point"))
    shape = torch.Size([qdata.shape[0], 2 * qdata.shape[1]])
    linear = nn.Linear(shape[1], shape[0], bias=False)
    weight = quantization.Int4Tensor(qdata, scale, zero, [1, shape[1] // scale.shape[0]], shape)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(linear, ours.config(None))
    assert type(linear) is Int4Linear
    assert_bitwise(linear.dense_weight(torch.float32), written.model.get_submodule(name).weight)


def test_tensors_that_are_refused_stay():
    linear = dense()
    quantize_(linear, by_torchao("dynamic", granularity=granularity.PerTensor())[0])
    weight = linear.weight
    with pytest.raises(ValueError, match="act_quant_kwargs must say symmetric, by rows"):
        quantize_(linear, ours.config(None))
    assert type(linear) is nn.Linear and linear.weight is weight
    config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int2, granularity=granularity.PerGroup(32))
    quantize_(linear := dense(), config)
    with pytest.raises(RuntimeError, match="target_dtype must be int4, got int2"):
        quantize_(linear, ours.config(None))


def test_transformers_loader_is_refused(tmp_path):
    """It would lay empty tensors over packed weights."""
    from transformers import AutoModelForCausalLM, TorchAoConfig

    random_model("llama").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TorchAoConfig(ours.config("int4")))


def test_the_page():
    assert run_examples("torchao.md") > 5
