"""Small random models of diffusers: `quantize_linears`, against the dense twin of the same weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from qops import Int4
from qops.models import quantize_linears
from qops.nn import QuantizedLinear, dense_linear
from qops.testing import assert_bitwise, generator
from tests.support.house.pages import run_examples

diffusers = pytest.importorskip("diffusers")

EXACT = ("int4", "int8_weight_only")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(3))


def transformer_2d() -> tuple[Any, dict[str, Any]]:
    """Image-to-image transformer of Stable Diffusion's kind, with cross-attention to a text that is random here."""
    model = diffusers.Transformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=32, num_layers=2, cross_attention_dim=48
    )
    return model, {"hidden_states": random(2, 32, 8, 8), "encoder_hidden_states": random(2, 7, 48)}


def flux() -> tuple[Any, dict[str, Any]]:
    model = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return model, {
        "hidden_states": random(1, 16, 16),
        "encoder_hidden_states": random(1, 5, 32),
        "pooled_projections": random(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }


def sd3() -> tuple[Any, dict[str, Any]]:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=32,
        out_channels=8,
    )
    return model, {
        "hidden_states": random(1, 8, 8, 8),
        "encoder_hidden_states": random(1, 5, 32),
        "pooled_projections": random(1, 32),
        "timestep": torch.tensor([3.0]),
    }


MODELS = {"transformer_2d": transformer_2d, "flux": flux, "sd3": sd3}


# `Attention.fuse_projections` reads their weights; nobody calls it here.
PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def of_all(model: Any, scheme: Any) -> dict[str, Any]:
    last = {name.rpartition(".")[2] for name, module in model.named_modules() if type(module) is nn.Linear}
    return {**{name: scheme for name in PROJECTIONS if name in last}, "*": scheme}


def made(name: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(1)
    model, inputs = MODELS[name]()
    for parameter in model.parameters():  # what is zero at first would hide what comes before
        parameter.data = torch.randn(parameter.shape, generator=generator(2)) * 0.1
    return model.eval(), inputs


def dense_twin(model: Any) -> Any:
    twin = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            twin.set_submodule(name, dense_linear(module.dense_weight(torch.float32), module.bias))
    return twin


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scheme", [*EXACT, "int8", "w4a8"])
def test_a_model_computes_what_its_dense_twin_does(name, scheme):
    model, inputs = made(name)
    names = {part for part, module in model.named_modules() if type(module) is nn.Linear}
    with torch.no_grad():
        before = model(**inputs).sample
    assert quantize_linears(model, of_all(model, scheme)) is model
    assert set(model.quantization_report.replaced) == names
    found, wanted = model(**inputs).sample, dense_twin(model)(**inputs).sample
    # Codes that round otherwise are rows of activations in 8 bits; the original model is further away.
    tolerance = 2e-5 if scheme in EXACT else 5e-2
    assert torch.isfinite(found).all() and (found - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert (before - wanted).abs().max() > 2e-5 * wanted.abs().max()


def test_projections_that_somebody_reads_stay_dense():
    model, inputs = made("sd3")
    quantize_linears(model, "int4")
    kept = model.quantization_report.kept
    assert kept["transformer_blocks.0.attn.to_q"] == "Attention reads its weight itself"
    wanted = dense_twin(model)(**inputs).sample
    for block in model.transformer_blocks:
        block.attn.fuse_projections()
    assert (model(**inputs).sample - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(name, dtype):
    """As near to float32 as diffusers' own layers of the same weights are, within a factor of two."""
    model, inputs = made(name)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    quantize_linears(model.to(dtype), of_all(model, Int4(16)))
    twin = dense_twin(model)
    exact = twin.float()(**{key: value.float() for key, value in inputs.items()}).sample
    theirs = (dense_twin(model).to(dtype)(**inputs).sample - exact).abs().max()
    found = model(**inputs).sample
    assert found.dtype == dtype
    assert (found - exact).abs().max() <= 2 * theirs + 2**-8 * exact.abs().max()
    assert_bitwise(model(**inputs).sample, found)


def test_the_page():
    assert run_examples("diffusers.md") > 5
