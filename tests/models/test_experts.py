"""Mixtures of experts: quantised, saved and read like all other linears; what Transformers' own experts give."""

from __future__ import annotations

import functools
import re
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import qops
from qops import load_model, quantize_model, save_model
from qops.models import dense_model
from qops.nn import MLP, Int4Linear, Int8WeightOnlyLinear
from qops.nn.experts import Expert, Experts, expand_experts
from qops.testing import assert_bitwise, generator
from tests.support.formats import folders
from tests.support.formats.folders import write_as
from tests.support.models.families import IDS, MIXTURES, SIZES, random_model

E, K = 4, 2


def experts_of(model: nn.Module) -> dict[str, Experts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def stacks_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if "gate_up_proj" in module._parameters}


def choices(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights of each token; no expert twice."""
    rng = generator(seed)
    index = torch.stack([torch.randperm(E, generator=rng)[:K] for _ in range(tokens)])
    return index, torch.rand(tokens, K, generator=rng)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# Transformers' experts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MIXTURES)
def test_linears_one_by_one_compute_what_the_stacks_do(family):
    model = random_model(family)
    before, ids = model(IDS).logits, IDS
    stacks = stacks_of(model)
    replaced = expand_experts(model)
    assert replaced.keys() == stacks.keys() == experts_of(model).keys() and len(stacks) > 0
    for name, module in stacks.items():
        assert len(model.get_submodule(name)) == E and replaced[name] is module
    assert relative(model(ids).logits, before) < 2e-6
    for name, module in replaced.items():  # nothing was copied
        storage = module.gate_up_proj.untyped_storage().data_ptr()
        first: Any = model.get_submodule(f"{name}.0")
        assert first.gate_proj.weight.untyped_storage().data_ptr() == storage


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_that_differ_stay_dense_and_are_named(family, monkeypatch):
    """A new release whose experts compute something else."""
    model = random_model(family)
    stacks = stacks_of(model)
    kind = type(next(iter(stacks.values())))
    theirs = kind.forward

    @functools.wraps(theirs)
    def other(*a: Any) -> torch.Tensor:
        return 1.01 * theirs(*a)

    monkeypatch.setattr(kind, "forward", other)
    with pytest.warns(UserWarning, match=r"experts stays Transformers' own and dense: differs by 0\.0099 from its"):
        quantised = quantize_model(model)
    assert experts_of(quantised) == {} and stacks_of(quantised).keys() == stacks.keys()
    assert {f"{name}.down_proj" for name in stacks} <= quantised.quantization_report.kept.keys()


def clamped_model() -> Any:
    """Of experts that clamp what they multiply; rows of its layers reach the limit."""
    sizes = {"n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    sizes |= {"q_lora_rank": 32, "head_dim": 32, "qk_rope_head_dim": 16, "o_groups": 2, "o_lora_rank": 32}
    sizes |= {"index_n_heads": 2, "index_head_dim": 16}
    config = transformers.DeepseekV4Config(**(SIZES | sizes))
    return transformers.DeepseekV4ForCausalLM._from_config(config).eval()


@pytest.mark.skipif(not hasattr(transformers, "DeepseekV4Config"), reason="a newer Transformers has it")
def test_experts_that_clamp_stay_dense_and_are_named():
    model = clamped_model()
    with pytest.warns(UserWarning, match="dense: DeepseekV4Experts has an activation of its own$"):
        assert expand_experts(model) == {}


def test_large_rows_are_compared_too(monkeypatch):
    """An activation that differs for large elements alone."""
    model = random_model("qwen3_moe")
    kind = type(next(iter(stacks_of(model).values())))
    theirs = kind.forward

    @functools.wraps(theirs)
    def other(self: Any, x: torch.Tensor, *a: Any) -> torch.Tensor:
        return theirs(self, x.clamp(-9, 9), *a)

    monkeypatch.setattr(kind, "forward", other)
    with pytest.warns(UserWarning, match="own and dense: differs by"):
        assert expand_experts(model) == {}


def test_weights_that_are_not_finite_are_an_error():
    model = random_model("qwen3_moe")
    stacks = stacks_of(model)
    next(iter(stacks.values())).gate_up_proj.data[3, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"mlp\.experts\.3\.gate_proj: weight must be finite"):
        quantize_model(model, qops.Int4(16))
    assert stacks_of(model) == stacks and experts_of(model) == {}


def test_mixtures_are_not_exported():
    export_logits = pytest.importorskip("qops.integrations.serving").export_logits
    with pytest.raises(Exception, match="a mixture of experts cannot be exported"):
        export_logits(quantize_model(random_model("qwen3_moe")))


def test_experts_of_another_kind_stay_dense_and_are_named():
    sizes = {"intermediate_size_mlp": 96, "num_local_experts": 2, "head_dim": 16, "vocab_size": 72}
    config = transformers.Llama4TextConfig(**(SIZES | sizes))
    model = transformers.Llama4ForCausalLM._from_config(config).eval()
    with pytest.warns(UserWarning, match="dense: Llama4TextExperts takes hidden_states$"):
        quantised = quantize_model(model)
    assert experts_of(quantised) == {} and torch.isfinite(quantised(IDS).logits).all()


# Experts -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts() -> Experts:
    model = quantize_model(random_model("qwen3_moe", dtype=torch.bfloat16), qops.Int4(group_size=16))
    return next(iter(experts_of(model).values()))


def test_results_are_sums_in_ascending_order_rounded_once(experts):
    x = torch.randn(23, 64, generator=generator(1)).bfloat16()
    index, weights = choices(23)
    want = torch.zeros(23, 64)
    for number in range(E):
        chosen = index == number
        for token in chosen.any(dim=1).nonzero()[:, 0].tolist():
            y = experts.get_submodule(str(number))(x[token : token + 1])[0]
            want[token] = want[token] + y.float() * weights[token][chosen[token]]
    assert_bitwise(experts(x, index, weights), want.bfloat16())
    assert_bitwise(experts(x, index.flip(1), weights.flip(1)), want.bfloat16(), "columns in another order")
    for token in range(23):  # alone, whatever the others chose
        one = slice(token, token + 1)
        assert_bitwise(experts(x[one], index[one], weights[one])[0], want[token].bfloat16(), f"token {token}")


def test_an_index_that_is_no_expert_contributes_nothing(experts):
    """E is what Transformers' expert parallelism passes, -1 what vLLM does."""
    x = torch.randn(9, 64, generator=generator(2)).bfloat16()
    index, weights = choices(9, seed=3)
    without = weights.clone()
    without[:, 1] = 0
    for other in (E, -1, 10**9):
        given = torch.stack((index[:, 0], torch.full((9,), other)), dim=1)
        assert torch.equal(experts(x, given, weights), experts(x, index, without))
    assert not experts(x, torch.full((9, K), E), weights).any()
    assert experts(x[:0], index[:0], weights[:0]).shape == (0, 64)


def test_an_expert_that_a_token_chooses_twice_counts_twice(experts):
    x, weights = torch.randn(1, 64, generator=generator(4)).bfloat16(), torch.tensor([[0.5, 0.25]])
    once = experts.get_submodule("2")(x).float()
    assert_bitwise(experts(x, torch.tensor([[2, 2]]), weights), (once * 0.5 + once * 0.25).bfloat16())


# Whole models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("scheme", ["int4", "int8_weight_only"])
def test_a_mixture_computes_what_its_dense_twin_does(family, scheme):
    source = random_model(family)
    parameters = [name for name, _ in source.named_parameters()]
    model = quantize_model(source, scheme)
    report, found = model.quantization_report, experts_of(model)
    assert len(found) > 0 and all(isinstance(part, MLP) for each in found.values() for part in each.children())
    assert not [name for name in report.kept if ".experts." in name]
    known = {*report.replaced, *report.kept}
    stacks = [name for name in parameters if re.search(r"\.experts\.(gate_up|down)_proj(_bias)?$", name)]
    assert {name.rpartition(".")[0] for name in stacks} == found.keys()
    assert not [name for name in parameters if name not in stacks and not {name, name.rpartition(".")[0]} & known]
    twin = dense_model(model, torch.float32)
    assert relative(model(IDS).logits, twin(IDS).logits) < 2e-5
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0  # padded on the left
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS, **settings), twin.generate(IDS, **settings))
    if family in ("mixtral", "qwen3_moe"):
        assert model.qops_fusion.not_fused is None and "mlp" in model.qops_fusion.own


@pytest.mark.parametrize("scheme", ["int8", "w4a8"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_of_8_bit_activations(family, scheme):
    model = quantize_model(random_model(family), scheme)
    assert relative(model(IDS).logits, dense_model(model, torch.float32)(IDS).logits) < 0.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_of_16_bits_are_proven(family, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = quantize_model(random_model(family, dtype=dtype))
    assert len(experts_of(model)) > 0 and model(IDS).logits.isfinite().all()


def test_schemes_of_experts_by_pattern():
    scheme = {"*.experts.*": qops.Int8WeightOnly(group_size=16), "*.experts.0.*": None, "*": qops.Int4(group_size=32)}
    with pytest.raises(ValueError, match="narrower patterns first"):
        quantize_model(random_model("qwen3_moe"), scheme)
    order = ["*.experts.0.*", "*.experts.*", "*"]
    model = quantize_model(random_model("qwen3_moe"), {pattern: scheme[pattern] for pattern in order})
    for each in experts_of(model).values():
        first: Any = each.get_submodule("0")
        second: Any = each.get_submodule("1")
        assert isinstance(first, Expert) and type(first.gate_proj) is nn.Linear
        assert type(second.down_proj) is Int8WeightOnlyLinear
    assert type(model.model.layers[0].self_attn.o_proj) is Int4Linear
    assert relative(model(IDS).logits, dense_model(model, torch.float32)(IDS).logits) < 2e-5


def test_a_model_that_is_refused_has_its_stacks_again():
    model = random_model("qwen3_moe")
    before, stacks = model(IDS).logits, stacks_of(model)
    with pytest.raises(ValueError, match="'nothing' names none"):
        quantize_model(model, skip=("nothing",))
    assert stacks_of(model) == stacks and experts_of(model) == {}
    assert_bitwise(model(IDS).logits, before)


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["qops", "compressed-tensors"])
@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_is_saved_and_loaded(tmp_path, family, format):
    scheme = "int4" if format == "qops" else qops.Int4(symmetric=False)
    model = quantize_model(random_model(family, dtype=torch.float16), scheme)
    save_model(model, tmp_path, format=format)
    again = load_model(tmp_path)
    assert_bitwise(again(IDS).logits, model(IDS).logits)
    save_model(again, tmp_path / "again", format=format)
    assert_bitwise(load_model(tmp_path / "again")(IDS).logits, model(IDS).logits)


WRITTEN = {
    "gptq": folders.gptq(act_order=True),
    "gptq_v2": folders.gptq(version=2),
    "awq": folders.awq(),
    "compressed-tensors": folders.compressed_tensors(),
}


def written(family: str, kind: str) -> folders.Written:
    settings, encode = WRITTEN[kind]
    gates = [f"model.layers.{index}.mlp.shared_expert_gate" for index in range(3)]  # of one output, dense everywhere
    return write_as(settings, encode, family, but=("lm_head", *gates), prepare=expand_experts)


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("family", MIXTURES)
def test_checkpoints_of_single_experts_are_read(tmp_path, family, kind):
    found = written(family, kind)
    path = found.write(tmp_path)
    if family == "gpt_oss" and kind != "compressed-tensors":
        with pytest.raises(ValueError, match=r"gate_proj and up_proj of gpt-oss' experts mean .* of (gptq|awq) no"):
            load_model(path)
        return
    model = load_model(path, dtype=torch.float32)
    assert len(experts_of(model)) > 0
    assert relative(model(IDS).logits, found.model(IDS).logits) < 2e-5


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_names_of_mixtrals_first_release(tmp_path, kind):
    found = written("mixtral", kind)
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

    def old(name: str) -> str:
        name = re.sub(r"\.mlp\.(gate|experts)\.", r".block_sparse_moe.\1.", name)
        return re.sub(r"(\.experts\.\d+\.)(\w+)", lambda m: m[1] + names[m[2]], name)

    found.tensors = {old(name): tensor for name, tensor in found.tensors.items()}
    assert any(".block_sparse_moe.experts.0.w1.qweight" in name for name in found.tensors)
    model = load_model(found.write(tmp_path), dtype=torch.float32)
    assert relative(model(IDS).logits, found.model(IDS).logits) < 2e-5


def test_a_checkpoint_of_experts_that_differ_is_not_loaded(tmp_path, monkeypatch):
    """The proof needs no weights: it is made before any is read."""
    path = written("qwen3_moe", "gptq").write(tmp_path)
    kind = type(next(iter(stacks_of(random_model("qwen3_moe")).values())))
    theirs = kind.forward

    @functools.wraps(theirs)
    def other(*a: Any) -> torch.Tensor:
        return 1.01 * theirs(*a)

    monkeypatch.setattr(kind, "forward", other)
    with (
        pytest.warns(UserWarning, match="differs by"),
        pytest.raises(ValueError, match=r"experts\.gate_up_proj is missing"),
    ):
        load_model(path)


def test_a_missing_expert_is_named(tmp_path):
    found = written("qwen3_moe", "gptq")
    gone = "model.layers.2.mlp.experts.3.up_proj"
    found.tensors = {name: tensor for name, tensor in found.tensors.items() if not name.startswith(f"{gone}.")}
    with pytest.raises(ValueError, match=rf"tensor {re.escape(gone)}\.weight is missing"):
        load_model(found.write(tmp_path))


def test_one_expert_too_many_is_named(tmp_path):
    found = written("qwen3_moe", "gptq")
    last = {name: tensor for name, tensor in found.tensors.items() if "experts.3" in name}
    found.tensors |= {name.replace("experts.3", "experts.4"): tensor.clone() for name, tensor in last.items()}
    with pytest.raises(ValueError, match=r"every tensor must have a place in Qwen3Moe.*experts\.4\."):
        load_model(found.write(tmp_path))


def test_a_quantised_router_is_read_densely(tmp_path):
    """AutoAWQ leaves nothing out of Qwen3-MoE."""
    found = written("qwen3_moe", "awq")
    name, random = "model.layers.0.mlp.gate", torch.Generator().manual_seed(1)
    linear = nn.Linear(64, 32)
    stored, exact = WRITTEN["awq"][1](linear, random)
    config = {"num_experts": 32, "num_experts_per_tok": 2}
    found = write_as(*WRITTEN["awq"], "qwen3_moe", prepare=expand_experts, **config)
    found.model.get_submodule(name).weight.data = exact
    del found.tensors[f"{name}.weight"]
    found.tensors |= {f"{name}.{key}": tensor for key, tensor in stored.items()}
    model = load_model(found.write(tmp_path), dtype=torch.float32)
    assert_bitwise(model.get_submodule(name).weight, exact)
    assert relative(model(IDS).logits, found.model(IDS).logits) < 2e-5
