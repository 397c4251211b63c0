"""accelerate's offload and device maps: the bytes go, come back around the forward, and the results keep their bits."""

from __future__ import annotations

import pytest
import torch
import transformers

import qops
from qops.models import dense_model, quantize_model, save_model
from qops.nn import MLP, Int4Linear, Int8Embedding, Int8WeightOnlyLinear
from qops.testing import assert_bitwise
from qops.weights import Int4Weight, Int8Weight
from tests.support.models.architectures import TOKENS, outputs, tiny_model
from tests.support.models.families import FUSED, IDS, PARTLY, random_model
from tests.support.ops.random_weights import random_int8

accelerate = pytest.importorskip("accelerate")
from accelerate.hooks import remove_hook_from_submodules  # noqa: E402

WAYS = {
    "int4": {"scheme": "int4"},
    "int8": {"scheme": "int8"},
    "int4, a dense part in each merged linear": {"scheme": "int4", "skip": ("k_proj", "up_proj")},
    "int4, qkv dense": {"scheme": "int4", "skip": ("q_proj", "k_proj", "v_proj")},
    "int4, not fused": {"scheme": "int4", "fuse": False},
    "int8, head and table": {"scheme": "int8", "skip_default": False},
}


def offload(model, how: str, folder, buffers: bool) -> None:
    if how == "cpu":
        accelerate.cpu_offload(model, "cpu", offload_buffers=buffers)
    elif how == "disk":
        accelerate.disk_offload(model, folder, "cpu", offload_buffers=buffers)
    else:
        places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
        places |= {f"model.layers.{i}": ("disk", "cpu")[i % 2] for i in range(len(model.model.layers))}
        accelerate.dispatch_model(model, places, offload_dir=folder, offload_buffers=buffers)


def bytes_in_memory(module: torch.nn.Module) -> int:
    """Of everything but the buffers that accelerate leaves by its design, which are no part of the state."""
    held = [*module.parameters()]
    for part in module.modules():
        if isinstance(part, (Int4Weight, Int8Weight)):
            held += list(part.buffers())
    return sum(tensor.nbytes for tensor in held if not tensor.is_meta)


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch"])
@pytest.mark.parametrize("way", WAYS)
def test_offloaded_models_have_no_bytes_and_the_same_bits(way, how, buffers, tmp_path):
    model = quantize_model(random_model("llama", tie_word_embeddings="head" in way), **WAYS[way])
    want = model(IDS).logits
    offload(model, how, tmp_path, buffers)
    gone = model if how != "dispatch" else model.model.layers[0]
    assert bytes_in_memory(gone) == 0
    if how == "dispatch":
        assert bytes_in_memory(model.model.layers[1]) > 0
    for _ in range(2):
        assert_bitwise(model(IDS).logits, want, way)
        assert bytes_in_memory(gone) == 0


@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch"])
@pytest.mark.parametrize("family", [*FUSED, *PARTLY])
def test_every_fused_family_runs_offloaded(family, how, tmp_path):
    model = quantize_model(random_model(family), "int4")
    want = model(IDS).logits
    offload(model, how, tmp_path, True)
    assert_bitwise(model(IDS).logits, want, family)


@pytest.mark.parametrize(
    "name", ["LlamaForSequenceClassification", "BertForMaskedLM", "T5ForConditionalGeneration", "PhimoeForCausalLM"]
)
def test_other_classes_run_offloaded(name, tmp_path):
    model = quantize_model(tiny_model(name), "int8")
    want = outputs(model, name)
    accelerate.disk_offload(model, tmp_path, "cpu")
    assert not any(part.is_packed for part in model.modules() if isinstance(part, (Int4Weight, Int8Weight)))
    assert_bitwise(outputs(model, name), want)


def test_act_order_runs_offloaded(tmp_path):
    torch.manual_seed(0)
    weight = Int4Weight.quantize(torch.randn(64, 96), 32).canonical() | {"perm": torch.randperm(96).int()}
    linears = [Int4Linear.from_linear(torch.nn.Linear(64, 96), 32) for _ in range(2)]
    mlp = MLP(*linears, Int4Linear(Int4Weight.from_canonical(**weight, kind="symmetric")))
    x = torch.randn(3, 64)
    want = mlp(x)
    holder = torch.nn.Sequential(mlp)
    accelerate.disk_offload(holder, tmp_path, "cpu")
    assert bytes_in_memory(holder) == 0
    assert_bitwise(holder(x), want)


def test_8_bit_offsets_in_act_order_run_offloaded(tmp_path):
    _, weight = random_int8(64, 96, 32, "offset", act_order=True)
    linear, x = Int8WeightOnlyLinear(weight), torch.randn(3, 96)
    want = linear(x)
    holder = torch.nn.Sequential(linear)
    accelerate.disk_offload(holder, tmp_path, "cpu")
    assert bytes_in_memory(holder) == 0
    assert_bitwise(holder(x), want)


def test_generation_offloaded(tmp_path):
    model = quantize_model(random_model("llama"), "int4")
    arguments = {"max_new_tokens": 5, "do_sample": False}
    want = model.generate(TOKENS % 72, **arguments)
    accelerate.disk_offload(model, tmp_path, "cpu")
    assert model.generate(TOKENS % 72, **arguments).tolist() == want.tolist()


@pytest.mark.parametrize("way", WAYS)
def test_taking_the_hooks_off_brings_everything_back(way, tmp_path):
    model = quantize_model(random_model("llama", tie_word_embeddings="head" in way), **WAYS[way])
    want, state = model(IDS).logits, model.state_dict()
    accelerate.disk_offload(model, tmp_path, "cpu")
    if "head" not in way:
        model(IDS)
    remove_hook_from_submodules(model)
    for path in tmp_path.iterdir():
        path.unlink()
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert_bitwise(model(IDS).logits, want, way)
    for name, tensor in model.state_dict().items():
        assert_bitwise(tensor, state[name], name)
    accelerate.cpu_offload(model, "cpu")
    assert_bitwise(model(IDS).logits, want, way)


def test_a_forward_that_fails_leaves_nothing_behind(tmp_path):
    model = quantize_model(random_model("llama"), "int4")
    want = model(IDS).logits
    accelerate.disk_offload(model, tmp_path, "cpu")
    layer = model.model.layers[1]

    def fail(*args):
        raise ArithmeticError("stop")

    handle = layer.self_attn.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError, match="stop"):
        model(IDS)
    handle.remove()
    assert bytes_in_memory(layer) == 0
    assert_bitwise(model(IDS).logits, want)


def test_what_needs_the_tensors_says_that_they_are_offloaded(tmp_path):
    model = quantize_model(random_model("llama"), "int4", fuse=False)
    accelerate.disk_offload(model, tmp_path / "offloaded", "cpu")
    for call in (lambda: save_model(model, tmp_path / "saved"), lambda: dense_model(model)):
        with pytest.raises(RuntimeError, match=r"model must be in memory, .*remove_hook_from_submodules"):
            call()
    assert not (tmp_path / "saved").exists()
    weight = model.model.layers[0].mlp.up_proj.weight
    x = torch.zeros(1, 64)
    for call in (weight.dequantize, lambda: qops.int4_gemm(x, weight)):
        with pytest.raises(RuntimeError, match=r"qops\.Int4Weight: the weight is offloaded"):
            call()
    assert "offloaded" in repr(weight) and weight.device.type == "meta"
    assert all(tensor.is_meta for name, tensor in weight.state_dict().items() if name != "format_version")


def test_an_incomplete_state_is_an_error_when_it_is_given():
    model = quantize_model(random_model("llama"), "int4")
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight.qweight"]
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.mlp\.up_proj\.weight\.qweight, which FusedLlamaDec"):
        accelerate.cpu_offload(model, "cpu", state_dict=state)


def test_a_hook_of_the_user_stays_on_a_part_of_an_offloaded_layer(tmp_path):
    class Count(accelerate.hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Count.calls += 1
            return args, kwargs

    model = quantize_model(random_model("llama"), "int4", skip=("o_proj",))
    want = model(IDS).logits
    accelerate.hooks.add_hook_to_module(model.model.layers[0].self_attn.o_proj, Count())
    accelerate.disk_offload(model, tmp_path, "cpu")
    assert_bitwise(model(IDS).logits, want)
    assert Count.calls == 1


def test_a_table_that_is_shared_comes_and_goes_with_each_of_its_users(tmp_path):
    model = quantize_model(random_model("llama", tie_word_embeddings=True), "int8", skip_default=False)
    assert isinstance(model.get_input_embeddings(), Int8Embedding)
    want = model(IDS).logits
    accelerate.disk_offload(model, tmp_path, "cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_bitwise(model(IDS).logits, want)


def test_models_without_qops_parts_are_offloaded_as_ever(tmp_path):
    model = random_model("llama")
    want = model(IDS).logits
    accelerate.disk_offload(model, tmp_path, "cpu")
    assert_bitwise(model(IDS).logits, want)
    assert isinstance(model, transformers.LlamaForCausalLM)


@pytest.mark.skipif(
    not qops.build_info()["cuda"] or not torch.cuda.is_available(), reason="needs a build with CUDA kernels, and a GPU"
)
@pytest.mark.parametrize("way", WAYS)
def test_a_model_of_the_cpu_is_packed_anew_where_it_is_dispatched_to(way):
    model = quantize_model(random_model("llama", tie_word_embeddings="head" in way, dtype=torch.bfloat16), **WAYS[way])
    want = quantize_model(random_model("llama", tie_word_embeddings="head" in way, dtype=torch.bfloat16), **WAYS[way])
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"], 0)
    places |= {f"model.layers.{i}": "cpu" for i in range(1, len(model.model.layers))}
    accelerate.dispatch_model(model, places)
    assert_bitwise(model(IDS.cuda()).logits, want.cuda()(IDS.cuda()).logits, way)
