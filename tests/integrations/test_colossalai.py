"""ColossalAI's booster, one process on the CPU: models of qops keep their bits, adapters are trained."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from qops import quantize_model
from qops.models.replacement import is_fused
from qops.testing import assert_bitwise
from tests.support.models.families import IDS, random_model

colossalai = pytest.importorskip("colossalai")
plugins = pytest.importorskip("colossalai.booster.plugin")
Booster = colossalai.booster.Booster


@pytest.fixture(scope="module", autouse=True)
def one_process():
    colossalai.launch(0, 1, "127.0.0.1", 29519, backend="gloo")
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def with_gradients():
    """As users have it: DDP refuses tensors of inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


PLUGINS = {
    "ddp": lambda: plugins.TorchDDPPlugin(),
    "zero": lambda: plugins.LowLevelZeroPlugin(precision="fp32"),
}


@pytest.mark.parametrize("plugin", PLUGINS)
@pytest.mark.parametrize("scheme", ["int4", "int8", "w4a8", "int8_weight_only"])
def test_a_boosted_model_has_its_bits(plugin, scheme):
    model = quantize_model(random_model("llama"), scheme, prove=False)
    with torch.no_grad():
        wanted = model(IDS).logits
    other: Any = copy.deepcopy(model)
    other.model.norm.weight.requires_grad_(True)  # DDP takes no model without anything to train
    boosted, *_ = Booster(plugin=PLUGINS[plugin]()).boost(other)
    boosted.eval()
    with torch.no_grad():
        assert_bitwise(boosted(IDS).logits, wanted)
    assert is_fused(boosted)


def test_adapters_are_trained():
    peft = pytest.importorskip("peft", minversion="0.20")
    from qops.integrations.peft import prepare_for_adapters

    model = prepare_for_adapters(quantize_model(random_model("llama"), "int4", prove=False))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    wanted = model(IDS).logits.detach()
    optimizer = torch.optim.SGD([part for part in model.parameters() if part.requires_grad], lr=0.1)
    booster = Booster(plugin=plugins.TorchDDPPlugin())
    boosted, optimizer, *_ = booster.boost(model, optimizer)
    assert_bitwise(boosted(IDS).logits.detach(), wanted)
    booster.backward(boosted(input_ids=IDS, labels=IDS).loss, optimizer)
    optimizer.step()
    assert not torch.equal(boosted(IDS).logits, wanted)
