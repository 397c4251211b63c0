"""DeepSpeed on the CPU, one process: models of qops go through `init_inference` and ZeRO-3 with the bits they had."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import qops
from qops import load_model, quantize_model, save_model
from qops.integrations.transformers import QopsConfig
from qops.models.replacement import is_fused
from qops.nn import QuantizedLinear
from qops.testing import assert_bitwise
from tests.support.models.families import IDS, random_model

deepspeed = pytest.importorskip("deepspeed")

# Without a threshold below which parameters stay whole.
ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


@pytest.fixture(scope="module", autouse=True)
def one_process():
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 29517}.items():
            patch.setenv(key, str(value))
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("DS_ACCELERATOR", "cpu")
        deepspeed.init_distributed("gloo")
        yield
        torch.distributed.destroy_process_group()


def quantised(scheme: Any = "int4", **arguments: Any) -> Any:
    return quantize_model(random_model("llama"), scheme, prove=False, **arguments)


def is_partitioned(module: Any) -> bool:
    return any(getattr(parameter, "ds_status", None) is not None for parameter in module.parameters())


@pytest.mark.parametrize("scheme", ["int4", "int8", "w4a8", "int8_weight_only"])
@pytest.mark.parametrize("more", [{}, {"tensor_parallel": {"tp_size": 1}}, {"replace_with_kernel_inject": True}])
def test_init_inference_leaves_our_modules_unharmed(scheme, more):
    model = quantised(scheme)
    wanted = model(IDS).logits
    engine = deepspeed.init_inference(copy.deepcopy(model), dtype=torch.float32, **more)
    assert_bitwise(engine(IDS).logits, wanted)
    assert is_fused(engine.module) and sum(isinstance(part, QuantizedLinear) for part in engine.module.modules()) == 12
    ids = engine.module.generate(IDS[:, :5], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(ids, model.generate(IDS[:, :5], max_new_tokens=4, min_new_tokens=4, do_sample=False))


def test_init_inference_casts_activations_alone():
    model = quantised()
    engine = deepspeed.init_inference(copy.deepcopy(model), dtype=torch.bfloat16)
    assert_bitwise(engine(IDS).logits, copy.deepcopy(model).bfloat16()(IDS).logits)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_zero_3_partitions_what_is_a_parameter(scheme, fuse):
    """Embedding, norms and biases; codes and scales are buffers, of which each process keeps a whole copy."""
    model = quantised(scheme, fuse=fuse)
    wanted = model(IDS).logits
    engine, *_ = deepspeed.initialize(model=model, config=ZERO3)
    engine.eval()
    assert is_partitioned(engine.module.model.norm) and engine.module.model.norm.weight.numel() == 0
    assert_bitwise(engine(IDS).logits, wanted)


def test_loading_for_zero_3(tmp_path):
    """A folder of ours and a dense one by Transformers' own loader, while ZeRO-3 is configured."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    dense = random_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    model = quantize_model(dense, "int4")
    save_model(model, tmp_path / "int4")
    wanted = model(IDS).logits
    config = HfDeepSpeedConfig(ZERO3)
    found = [
        AutoModelForCausalLM.from_pretrained(tmp_path / "int4"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=QopsConfig("int4")),
    ]
    for each in found:
        engine, *_ = deepspeed.initialize(model=each, config=ZERO3)
        engine.eval()
        assert_bitwise(engine(IDS).logits, wanted)
    del config


def test_inside_zero_init_nothing_is_made(tmp_path):
    save_model(quantised(), tmp_path)
    with (
        pytest.raises(RuntimeError, match=r"qops\.load_model: no model can be made inside deepspeed\.zero\.Init"),
        deepspeed.zero.Init(config_dict_or_path=ZERO3),
    ):
        load_model(tmp_path)
    wanted = qops.load_model(tmp_path)(IDS).logits
    assert_bitwise(load_model(tmp_path)(IDS).logits, wanted)
