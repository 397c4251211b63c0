"""Folders that quantization packages saved, where they are installed: what we load computes what they compute."""

from __future__ import annotations

import copy

import pytest
import torch

from qops import load_model, quantize_int8
from qops.nn import Int4SmoothedLinear, Int8Linear, Int8StaticLinear, Int8StaticSmoothedLinear, Int8TorchaoLinear
from tests.support.formats.package_models import (
    SAVERS,
    bitsandbytes,
    lmdeploy,
    modelopt_awq,
    modelopt_smoothquant,
    modelopt_static,
    torchao_dynamic,
)
from tests.support.models.families import IDS, random_model

LAYER = "model.layers.1.mlp.down_proj"
# By the layer: what is rounded to integers goes apart on its way through a model; and ModelOpt's export of AWQ gives
# linears of one input one smoothing, with new codes.
BY_LAYER = {
    bitsandbytes: Int8Linear,
    lmdeploy: Int8Linear,
    modelopt_awq: Int4SmoothedLinear,
    modelopt_static: Int8StaticLinear,
    modelopt_smoothquant: Int8StaticSmoothedLinear,
    torchao_dynamic: Int8TorchaoLinear,
}


def small_model():
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "num_hidden_layers": 2}
    model = random_model("llama", attention_bias=False, mlp_bias=False, **sizes)
    model.config.architectures = [type(model).__name__]
    return model


@pytest.mark.parametrize("save", SAVERS, ids=lambda save: save.__name__)
def test_a_saved_model(tmp_path, save):
    pytest.importorskip(SAVERS[save])
    model = small_model()
    dense = copy.deepcopy(model)
    theirs = save(model, tmp_path / "saved").eval()
    ours = load_model(tmp_path / "saved", torch.float32)
    assert ours.qops_fusion.not_fused is None
    if save not in BY_LAYER:
        wanted = theirs(IDS).logits
        assert (ours(IDS).logits - wanted).abs().max() <= 2e-5 * wanted.abs().max()
        assert (dense(IDS).logits - wanted).abs().max() > 1e-2 * wanted.abs().max()
        return
    linear, layer = ours.get_submodule(LAYER), theirs.get_submodule(LAYER)
    assert type(linear) is BY_LAYER[save]
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(3)).half().float()  # bitsandbytes rounds to half
    if save is lmdeploy:  # its products are Triton's
        codes, scale = quantize_int8(x, "127")
        wanted = layer(codes * scale.unsqueeze(1))
    else:
        wanted = layer(x)
    found = linear(x)
    apart = ((found - wanted).abs() > 2e-5 * wanted.abs().max()).float().mean()
    otherwise = (torch.nn.functional.linear(x, linear.weight.dequantize()) - wanted).abs()
    # bitsandbytes divides by the scale where we multiply with its inverse: a tie falls to either side in a few rows.
    assert apart <= (0.03 if save is bitsandbytes else 0)
    assert (otherwise > 1e-3 * wanted.abs().max()).float().mean() > 0.5
