"""Linears that multiply the columns of their input first."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qops
from qops.models import dense_model
from qops.nn import MLP, Int4Linear, Int4SmoothedLinear, Int8StaticSmoothedLinear, MergedLinear
from qops.testing import FLOAT_DTYPES, assert_bitwise, random_activations
from tests.support.formats import package_folders as folders
from tests.support.models.families import IDS

N, K = 48, 64
STATIC = {"input_scale": torch.tensor(0.05)}


def factors(seed: int = 2, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return (torch.rand(K, generator=torch.Generator().manual_seed(seed)) + 0.5).to(dtype)


def weight(seed: int = 0) -> qops.Int4Weight:
    return qops.Int4Weight.quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(seed)), 32)


def int4(seed: int = 0, **changes: Any) -> Int4SmoothedLinear:
    bias = torch.randn(N, generator=torch.Generator().manual_seed(seed + 1))
    return Int4SmoothedLinear(weight(seed), bias, **({"pre_quant_scale": factors()} | changes))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("of_factors", FLOAT_DTYPES, ids=str)
def test_the_input_is_multiplied_in_its_dtype(dtype, of_factors):
    linear = int4(pre_quant_scale=factors(dtype=of_factors))
    x = random_activations(5, K, dtype=dtype, seed=3)
    residual = random_activations(5, N, dtype=dtype, seed=4)
    product = (x.double() * factors(dtype=of_factors).double()).float().to(dtype)  # one rounding: 48 bits in float64
    plain = Int4Linear(linear.weight, linear.bias)
    assert_bitwise(linear(x), plain(product))
    assert_bitwise(linear(x, residual), plain(product, residual))
    assert not torch.equal(linear(x), plain(x))


def test_no_cast_changes_the_factors():
    for change in (lambda m: m.half(), lambda m: m.double(), lambda m: m.around(m.weight, m.bias), copy.deepcopy):
        assert_bitwise(
            change(int4(pre_quant_scale=factors(dtype=torch.float32))).pre_quant_scale, factors(dtype=torch.float32)
        )
    assert int4().to("meta").pre_quant_scale.is_meta


def test_linears_of_one_smoothing_are_merged():
    x = random_activations(5, K, dtype=torch.bfloat16, seed=3)
    for second, merges in ((factors(), True), (factors(9), False)):
        parts = {"a": int4(0), "b": int4(4, pre_quant_scale=second)}
        merged = MergedLinear(parts)
        assert (merged.merged is not None) == merges
        assert_bitwise(merged(x), torch.cat([part(x) for part in parts.values()], -1))
    assert MergedLinear({"a": int4(), "b": Int4Linear(weight(), int4().bias)}).merged is None


def test_an_mlp():
    x = random_activations(5, K, dtype=torch.bfloat16, seed=3)
    gate, up = int4(1), int4(5)
    down_weight = qops.Int4Weight.quantize(torch.randn(K, N, generator=torch.Generator().manual_seed(8)), 48)
    down = Int4SmoothedLinear(down_weight, pre_quant_scale=factors()[:N])
    want = down(qops.silu_mul(gate(x), up(x)))
    mlp = MLP(*(copy.deepcopy(linear) for linear in (gate, up, down)))
    assert mlp.activates_in_gemm
    assert_bitwise(mlp(x), want)


@pytest.mark.parametrize("kind", [Int4SmoothedLinear, Int8StaticSmoothedLinear])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.ones(K - 1), r"pre_quant_scale must have shape \[K\] = \[64\], got \[63\]"),
        (torch.ones(K, 1), r"pre_quant_scale must have shape \[K\] = \[64\], got \[64, 1\]"),
        (torch.ones(K).double(), "pre_quant_scale must have dtype float16, bfloat16 or float32, got float64"),
        (torch.full((K,), float("nan")), "pre_quant_scale must be finite, got NaN or infinity"),
    ],
)
def test_what_does_not_fit_is_refused(kind, given, message):
    more = STATIC if kind is Int8StaticSmoothedLinear else {}
    held = qops.Int8Weight.quantize(torch.randn(N, K)) if more else weight()
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: {message}$"):
        kind(held, pre_quant_scale=given, **more)
    with pytest.raises(TypeError, match=rf"^{kind.__name__}: pre_quant_scale must be a tensor, got float$"):
        kind(held, pre_quant_scale=1.0, **more)


@pytest.mark.parametrize("algorithm", ["W4A16_AWQ", "W8A8_SQ_PER_CHANNEL"])
def test_models_are_saved_and_made_dense_with_their_factors(tmp_path, algorithm):
    model = qops.load_model(folders.modelopt(algorithm, smoothed=True).write(tmp_path / "there"), torch.float32)
    qops.save_model(model, tmp_path / "saved")
    assert_bitwise(qops.load_model(tmp_path / "saved", torch.float32)(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match=r"compressed-tensors has no scheme for an Int\w+SmoothedLinear"):
        qops.save_model(model, tmp_path / "other", format="compressed-tensors")
    linear = model.model.layers[0].mlp.down_proj
    wanted = (linear.weight.dequantize().double() * linear.pre_quant_scale).float()
    dense = dense_model(model, torch.float32)
    assert_bitwise(dense.model.layers[0].mlp.down_proj.weight, wanted)
    if algorithm == "W4A16_AWQ":
        logits = dense(IDS).logits
        assert (model(IDS).logits - logits).abs().max() <= 2e-5 * logits.abs().max()
    (path,) = (tmp_path / "saved").glob("*.safetensors")
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.endswith("up_proj.pre_quant_scale")}
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"up_proj\.pre_quant_scale is missing"):
        qops.load_model(tmp_path / "saved")


def test_factors_follow_columns_that_are_stored_in_act_order():
    """An MLP takes the order of down's columns from the rows of gate and up."""
    random = torch.Generator().manual_seed(6)
    perm = torch.randperm(K, generator=random).int()
    dense = torch.randn(N, K, generator=random)
    stored = qops.Int4Weight.quantize(dense, 32).canonical()
    down = qops.Int4Weight.from_canonical(**stored, kind="symmetric", perm=perm)
    gate, up = (Int4Linear(qops.Int4Weight.quantize(torch.randn(K, 32, generator=random), 32)) for _ in range(2))
    linear = Int4SmoothedLinear(down, pre_quant_scale=factors())
    x = torch.randn(3, 32, generator=random)
    wanted = linear(qops.silu_mul(gate(x), up(x)))
    mlp = MLP(gate, up, linear)
    assert torch.allclose(mlp(x), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    again = mlp.split()["down_proj"]
    assert torch.equal(again.pre_quant_scale, linear.pre_quant_scale)
    assert torch.equal(again.dense_weight(torch.float32), linear.dense_weight(torch.float32))
