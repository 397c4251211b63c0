"""LoRA adapters of PEFT on qops linears: what PEFT itself makes of the dense twin with the same adapters."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import qops
from qops import load_model, quantize_model, save_model
from qops.integrations.transformers import QopsConfig
from qops.models import dense_model
from qops.models.replacement import is_fused
from qops.nn import Int4Linear, QuantizedLinear, RMSNorm
from qops.testing import assert_bitwise, generator
from tests.support.formats import folders
from tests.support.formats.folders import write_as
from tests.support.models.families import FAMILIES, FUSED, IDS, MIXTURES, random_model

peft = pytest.importorskip("peft", minversion="0.20")
hotswap = pytest.importorskip("peft.utils.hotswap")
ours = pytest.importorskip("qops.integrations.peft")
prepare_for_adapters = ours.prepare_for_adapters

SCHEMES = ("int4", "int8_weight_only", "int8", "w4a8")
EXACT = SCHEMES[:2]  # those that leave activations as they are
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True)
def with_gradients():
    """As users have it."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def small_model(family: str, **changes: Any) -> Any:
    return random_model(family, num_hidden_layers=2, **changes)


def settings(*targets: str, **more: Any) -> Any:
    """Adapters that do something from the start."""
    defaults = {"target_modules": list(targets or PROJECTIONS), "r": 4, "lora_alpha": 12, "init_lora_weights": False}
    return peft.LoraConfig(**(defaults | more))


def adapted(model: Any, config: Any, seed: int = 0, **more: Any) -> Any:
    """The same numbers in each model whose modules have the same names."""
    torch.manual_seed(seed)
    return peft.get_peft_model(model, config, **more)


def rounds_like(linear: QuantizedLinear) -> Any:
    """A hook by which a dense linear reads what a quantised one makes of its input. Gradients go straight through."""

    def hook(module: nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
        (x,) = args
        q, scale = qops.quantize_int8(x.detach())
        return x + ((q * scale[..., None]).to(x.dtype) - x).detach()

    return hook


def twins(scheme: Any = "int4", family: str = "llama", tied: bool = False) -> tuple[Any, Any]:
    """A prepared model, and its dense twin, which rounds activations where the other does."""
    source = small_model(family, tie_word_embeddings=True) if tied else small_model(family)
    model = quantize_model(source, scheme, skip_default=not tied, prove=False)
    twin = dense_model(model, torch.float32)
    model = prepare_for_adapters(model)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and module.quantizes_input:
            twin.get_submodule(name).register_forward_pre_hook(rounds_like(module))
    return model, twin


def assert_near(found: torch.Tensor, wanted: torch.Tensor, scheme: Any = "int4", what: str = "") -> None:
    """Where activations are rounded, 1e-7 before a tie makes one code of it, which is 1/127 of the largest."""
    tolerance = 2e-5 if scheme in EXACT else 2e-2
    largest = wanted.abs().max()
    assert torch.isfinite(found).all() and found.shape == wanted.shape and largest > 0, what
    assert (found - wanted).abs().max() <= tolerance * largest, what


def assert_far(found: torch.Tensor, other: torch.Tensor) -> None:
    assert (found - other).abs().max() > 0.1 * other.abs().max()


# Forward -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_those_of_the_dense_twin_with_the_same_adapter(scheme):
    fused = quantize_model(small_model("llama"), scheme, prove=False)(IDS).logits
    model, twin = twins(scheme)
    bare = model(IDS).logits
    assert_near(bare, fused, "int4")
    config = settings(lora_dropout=0.3, use_rslora=True, lora_bias=True)
    model, twin = adapted(model, config).eval(), adapted(twin, copy.deepcopy(config)).eval()
    mine, theirs = peft.get_peft_model_state_dict(model), peft.get_peft_model_state_dict(twin)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    with torch.no_grad():
        found, wanted = model(IDS).logits, twin(IDS).logits
        assert_near(found, wanted, scheme)
        assert_far(found, bare)
        with model.disable_adapter():
            assert_bitwise(model(IDS).logits, bare)
        assert_bitwise(model(IDS).logits, found)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family(family):
    """Phi-3 has merged linears from the start, Gemma norms of another kind, Mixtral and OLMo 2 parts of their own."""
    model, twin = twins(family=family)
    assert not is_fused(model)
    names = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, QuantizedLinear)}
    # Those names are also experts', which the dense twin holds as stacks.
    targets = sorted(names - ({"gate_proj", "up_proj", "down_proj"} if family in MIXTURES else set()))
    model, twin = adapted(model, settings(*targets)), adapted(twin, settings(*targets))
    assert_near(model(IDS).logits, twin(IDS).logits)
    states, wanted = (one(IDS, output_hidden_states=True).hidden_states for one in (model, twin))
    assert len(states) == 3 and all(map(torch.allclose, states, wanted, [1e-4] * 3, [1e-4] * 3))


@pytest.mark.parametrize("target", [*PROJECTIONS, "model.layers.1.self_attn.v_proj", "lm_head"])
def test_one_projection_alone(target):
    model, twin = twins()
    bare = model(IDS).logits
    model, twin = adapted(model, settings(target)), adapted(twin, settings(target))
    found = model(IDS).logits
    assert_near(found, twin(IDS).logits)
    assert not torch.equal(found, bare)
    count = sum(isinstance(module, ours.LoraLinear) for module in model.modules())
    assert count == (0 if target == "lm_head" else 1 if "." in target else 2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_generating_with_a_cache(scheme):
    """The fused model has generated before, so that what it had found out about its layers is there to be wrong."""
    ids, attended = IDS.clone(), torch.ones_like(IDS)
    attended[0, :4] = 0
    arguments = {"attention_mask": attended, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    arguments |= {"return_dict_in_generate": True, "output_logits": True}
    model = quantize_model(small_model("llama"), scheme, prove=False)
    before = model.generate(ids, **arguments)
    assert any(layer.halves is not None for layer in model.model.layers)
    twin = dense_model(model, torch.float32)
    prepare_for_adapters(model)
    assert_near(torch.stack(model.generate(ids, **arguments).logits), torch.stack(before.logits))
    model, twin = adapted(model, settings()), adapted(twin, settings())
    after = model.generate(ids, **arguments)
    assert not torch.equal(after.sequences, before.sequences)
    if scheme in EXACT:
        wanted = twin.generate(ids, **arguments)
        assert torch.equal(after.sequences, wanted.sequences)
        assert_near(torch.stack(after.logits), torch.stack(wanted.logits))
    without = model.generate(ids, use_cache=False, **arguments)
    assert_near(torch.stack(after.logits), torch.stack(without.logits), scheme)
    with model.disable_adapter():
        again = model.generate(ids, **arguments)
    assert torch.equal(again.sequences, before.sequences)


@pytest.mark.parametrize("cast", [True, False])
def test_adapters_have_the_dtype_that_they_have_on_the_dense_twin(cast):
    model = quantize_model(small_model("llama", dtype=torch.bfloat16), "int4", prove=False)
    exact = dense_model(model, torch.float32)
    twin = dense_model(model, torch.bfloat16)
    prepare_for_adapters(model)
    found, wanted = (adapted(one, settings(), autocast_adapter_dtype=cast) for one in (model, twin))
    dtypes = {name: tensor.dtype for name, tensor in wanted.state_dict().items() if "lora" in name}
    assert {name: tensor.dtype for name, tensor in found.state_dict().items() if "lora" in name} == dtypes
    assert set(dtypes.values()) == {torch.float32 if cast else torch.bfloat16}
    exact = adapted(exact, settings(), autocast_adapter_dtype=cast)
    logits = exact(IDS).logits
    assert found(IDS).logits.dtype == torch.bfloat16
    error = (wanted(IDS).logits - logits).abs().max()
    assert (found(IDS).logits - logits).abs().max() <= 2 * error


def test_an_output_layer_that_is_tied_and_quantised():
    model, twin = twins(qops.Int8WeightOnly(32), tied=True)
    assert model.lm_head.float32_output and model.lm_head.weight is model.model.embed_tokens.weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT's, of tied layers
        model, twin = adapted(model, settings("lm_head", "q_proj")), adapted(twin, settings("lm_head", "q_proj"))
    found, wanted = model(IDS).logits, twin(IDS).logits
    assert_near(found, wanted)
    found.square().mean().backward()
    wanted.square().mean().backward()
    assert_same_gradients(model, twin)


def test_a_checkpoint_in_act_order(tmp_path):
    """Gate and up stand in the order of down's columns while they are fused, and adapters know them by another."""
    for family, targets in (("llama", PROJECTIONS), ("phi3", ("qkv_proj", "gate_up_proj", "down_proj"))):
        path = write_as(*folders.gptq(act_order=True), family=family).write(tmp_path / family)
        fused = load_model(path, torch.float32)
        assert all(layer.mlp.reordered for layer in fused.model.layers)
        bare = fused(IDS).logits
        model = prepare_for_adapters(load_model(path, torch.float32))
        assert_near(model(IDS).logits, bare)
        weights = qops.formats.read_checkpoint(path)
        twin = dense_model(model, torch.float32)
        for name, module in twin.named_modules():
            if type(module) is nn.Linear and name != "lm_head":
                assert torch.equal(module.weight, weights[name].dequantize()), name
        model, twin = adapted(model, settings(*targets)), adapted(twin, settings(*targets))
        assert_near(model(IDS).logits, twin(IDS).logits)
        # A folder of the fused model has the order of its rows, and no longer says so by its tensors.
        save_model(fused, tmp_path / "saved")
        again = load_model(tmp_path / "saved", torch.float32)
        for _ in range(2):
            with pytest.raises(ValueError, match="but gate and up were saved in the act-order of down"):
                prepare_for_adapters(again)
            save_model(again, tmp_path / "saved")
            again = load_model(tmp_path / "saved", torch.float32)


# Adapters ------------------------------------------------------------------------------------------------------------


def test_several_adapters_and_hot_swap(tmp_path):
    """Trained anywhere, saved by the dense twin and read here, and the other way round."""
    model, twin = twins()
    bare = model(IDS).logits
    model, twin = adapted(model, settings()), adapted(twin, settings())
    torch.manual_seed(1)
    twin.add_adapter("second", settings("q_proj", "down_proj", r=2))
    twin.save_pretrained(tmp_path)
    torch.manual_seed(1)
    model.add_adapter("second", settings("q_proj", "down_proj", r=2))
    model.save_pretrained(tmp_path / "mine")
    for name in ("", "second"):
        files = [peft.load_peft_weights(tmp_path / folder / name) for folder in ("", "mine")]
        assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])

    read = peft.PeftModel.from_pretrained(twins()[0], tmp_path)
    read.load_adapter(tmp_path / "second", "second")
    wanted = {}
    for name in ("default", "second"):
        for each in (model, twin, read):
            each.set_adapter(name)
        wanted[name] = twin(IDS).logits
        assert_near(model(IDS).logits, wanted[name])
        assert_bitwise(read(IDS).logits, model(IDS).logits)
        assert_far(wanted[name], bare)
    assert_far(wanted["default"], wanted["second"])
    for each in (model, twin):
        each.base_model.set_adapter(["default", "second"])
    assert_near(model(IDS).logits, twin(IDS).logits)
    mixed = read.eval()(IDS, adapter_names=["default", "second"]).logits
    assert_near(mixed[0], wanted["default"][0])
    assert_near(mixed[1], wanted["second"][1])
    for each in (model, twin):
        each.add_weighted_adapter(["default", "second"], [0.5, 2.0], "both", combination_type="cat")
        each.set_adapter("both")
    assert_near(model(IDS).logits, twin(IDS).logits)
    for name in ("both", "second"):
        model.delete_adapter(name)
    model.set_adapter("default")
    assert_near(model(IDS).logits, wanted["default"])

    third = adapted(dense_model(model.unload(), torch.float32), settings(), seed=3)
    third.save_pretrained(tmp_path / "third")
    read.set_adapter("default")
    hotswap.hotswap_adapter(read, tmp_path / "third", adapter_name="default")
    assert_near(read(IDS).logits, third(IDS).logits)
    assert_bitwise(read.unload()(IDS).logits, bare)


def test_transformers_own_way(tmp_path):
    model, twin = twins()
    twin = adapted(twin, settings())
    twin.save_pretrained(tmp_path)
    model.load_adapter(tmp_path)
    assert_near(model(IDS).logits, twin(IDS).logits)
    try:
        model.disable_adapters()
    except ValueError as error:
        pytest.skip(f"this Transformers refuses this PEFT: {error}")
    assert_near(model(IDS).logits, twin.unload()(IDS).logits)
    model.enable_adapters()
    torch.manual_seed(5)
    model.add_adapter(settings("q_proj"), "second")
    model.set_adapter("second")
    assert_far(model(IDS).logits, twin(IDS).logits)
    model.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "adapter_model.safetensors").exists()


def test_all_linear_means_those_of_qops_too():
    model, twin = (adapted(one, settings(target_modules="all-linear")) for one in twins({"k_proj": None, "*": "int4"}))
    assert model.peft_config["default"].target_modules == twin.peft_config["default"].target_modules
    assert_near(model(IDS).logits, twin(IDS).logits)
    for one in (model, twin):
        torch.manual_seed(1)
        one.add_adapter("second", settings(target_modules="all-linear"))
        one.set_adapter("second")
    assert model.peft_config["second"].target_modules == twin.peft_config["second"].target_modules
    assert_near(model(IDS).logits, twin(IDS).logits)


def test_state_of_a_prepared_model(tmp_path):
    model, _ = twins("int8", "gemma2")
    bare = model(IDS).logits
    assert prepare_for_adapters(model) is model
    save_model(model, tmp_path)
    again = load_model(tmp_path, torch.float32)
    assert not is_fused(again)
    assert_bitwise(prepare_for_adapters(again)(IDS).logits, bare)
    model = adapted(model, settings())
    logits = model(IDS).logits
    assert_bitwise(copy.deepcopy(model)(IDS).logits, logits)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_bitwise(torch.load(file, weights_only=False)(IDS).logits, logits)
    state = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    model.load_state_dict(state)
    assert_bitwise(model(IDS).logits, logits)
    with pytest.raises(AttributeError, match="no attribute 'AdaptableNothing'"):
        ours.AdaptableNothing  # noqa: B018


def test_a_prepared_model_follows_its_config():
    model, _ = twins()
    assert {id(module.config) for module in model.modules() if "config" in vars(module)} == {id(model.config)}
    wanted = model(IDS).logits
    model.set_attn_implementation("eager")
    found = model(IDS, output_attentions=True)
    assert_near(found.logits, wanted)
    assert len(found.attentions) == 2 and all(weights is not None for weights in found.attentions)


def test_what_its_owner_has_set_stays():
    source = small_model("llama")
    usual = source(IDS).logits
    source.model.layers[1].self_attn.scaling = 1.5
    source.model.layers[0].mlp.act_fn = nn.Tanh()
    model = quantize_model(source, prove=False)
    fused = model(IDS).logits
    assert_far(fused, usual)
    assert_near(prepare_for_adapters(model)(IDS).logits, fused)


# Gradients -----------------------------------------------------------------------------------------------------------


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(model: Any, twin: Any, scheme: Any = "int4") -> None:
    found, wanted = gradients(model), gradients(twin)
    trained = {name for name, parameter in twin.named_parameters() if parameter.requires_grad}
    assert found.keys() == wanted.keys() == trained
    for name in found:
        assert_near(found[name], wanted[name], scheme, name)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_linear_has_the_gradients_of_its_twin(scheme, dtype):
    model, twin = twins(scheme)
    place = "model.layers.1.mlp.up_proj"
    mine, theirs = (
        adapted(one, settings(bias="all")).get_submodule(f"base_model.model.{place}") for one in (model, twin)
    )
    x = torch.randn(2, 3, 64, generator=generator(0)).to(dtype)
    dy = torch.randn(2, 3, 96, generator=generator(1)).to(dtype)
    results = []
    for part in (mine, theirs):
        part.requires_grad_(False).to(dtype)
        for name, parameter in part.named_parameters():
            parameter.requires_grad_("lora" in name or name.endswith("bias"))
        inputs = x.clone().requires_grad_()
        y = part(inputs)
        y.backward(dy)
        results.append(
            {"y": y, "x": inputs.grad} | {name: parameter.grad for name, parameter in part.named_parameters()}
        )
    found, wanted = results
    wanted = {name: grad for name, grad in wanted.items() if grad is not None}
    assert found.keys() == wanted.keys() and len(found) == 5
    for name in found:
        largest = wanted[name].float().abs().max()
        error = (found[name].float() - wanted[name].float()).abs().max()
        assert found[name].dtype == dtype and error <= (1e-6 if dtype == torch.float32 else 2e-2) * largest, name
    # The operators go on refusing, and so does a linear that nobody has prepared.
    plain = Int4Linear.from_linear(nn.Linear(64, 64), 32)
    with pytest.raises(RuntimeError, match="requires_grad"):
        plain(x.float().requires_grad_())


@pytest.mark.parametrize("family", [*FUSED, "olmo2"])
def test_training_has_the_gradients_of_the_dense_twin(family):
    model, twin = twins(family=family)
    names = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, QuantizedLinear)}
    model, twin = (adapted(one, settings(*sorted(names), bias="lora_only")).train() for one in (model, twin))
    for one in (model, twin):
        one(input_ids=IDS, labels=IDS).loss.backward()
    assert_same_gradients(model, twin)


@pytest.mark.parametrize("scheme", ["int8", "w4a8"])
def test_training_through_rounded_activations(scheme):
    model, twin = twins(scheme)
    model, twin = (adapted(one, settings()).train() for one in (model, twin))
    for one in (model, twin):
        one(input_ids=IDS, labels=IDS).loss.backward()
    found, wanted = (torch.cat([grad.flatten() for grad in gradients(one).values()]) for one in (model, twin))
    assert F.cosine_similarity(found, wanted, dim=0) > 0.999


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_learns(checkpointing):
    model, _ = twins()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model = adapted(model, settings(init_lora_weights=True, r=8)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    after = model.unload().state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_transformers_trains_adapters(tmp_path):
    small_model("llama").save_pretrained(tmp_path)
    config = QopsConfig("int4")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert not model.hf_quantizer.is_trainable
    model = adapted(prepare_for_adapters(model), settings("q_proj", "down_proj", task_type="CAUSAL_LM"))
    bare = model(input_ids=IDS, labels=IDS).loss
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=4,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    data: Any = [{"input_ids": row, "labels": row} for row in IDS]
    transformers.Trainer(model, arguments, train_dataset=data).train()
    assert model.eval()(input_ids=IDS, labels=IDS).loss < bare


@pytest.mark.parametrize("rounding, offset", [("hf", 0.0), ("fp32", 0.0), ("fp32", 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_computes_the_same_with_gradients(rounding, offset, dtype):
    rng = generator(0)
    norm = RMSNorm(torch.randn(64, generator=rng).to(dtype), 1e-5, weight_offset=offset, rounding=rounding)
    norm.__class__ = ours.AdaptableRMSNorm
    x = (3 * torch.randn(40, 64, generator=rng)).to(dtype)
    wanted, found = norm(x), norm(x.clone().requires_grad_())
    assert found.requires_grad and found.dtype == dtype
    if dtype == torch.bfloat16:
        assert (found == wanted).double().mean() > 0.98
    else:
        assert_near(found, wanted)
    norm.weight.requires_grad_()
    norm(x).sum().backward()
    assert norm.weight.grad is not None


# What is refused -----------------------------------------------------------------------------------------------------

NOT_PLAIN = {"use_dora": {"use_dora": True}}
NOT_PLAIN |= {f"init_lora_weights='{name}'": {"init_lora_weights": name} for name in ("pissa", "olora")}


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_adapters_that_read_the_weight_are_refused(case):
    model, _ = twins()
    bare = model(IDS).logits
    with pytest.raises(
        ValueError, match=f"adapters on model.layers.0.*, which is quantised, must be plain LoRA, got {case}"
    ):
        adapted(model, settings("q_proj", "lm_head", **NOT_PLAIN[case]))
    assert_bitwise(model(IDS).logits, bare)
    assert not any("lora" in name for name, _ in model.named_modules())
    model = adapted(model, settings("q_proj"))
    with pytest.raises(ValueError, match="must be plain LoRA"):
        model.add_adapter("second", settings("q_proj", **NOT_PLAIN[case]))


def test_merging_is_refused():
    model, _ = twins()
    model = adapted(model, settings())
    logits = model(IDS).logits
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RuntimeError, match="cannot be merged into int4 codes, which have no room for them"):
            merge()
        assert_bitwise(model(IDS).logits, logits)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize(
    "targets", [["q_proj"], ["o_proj", "lm_head"], ["lm_head", "up_proj"], "all-linear", ".*down_proj"]
)
def test_a_model_that_was_not_prepared_is_refused(fuse, targets):
    model = quantize_model(small_model("llama"), fuse=fuse)
    bare = model(IDS).logits
    with pytest.raises(ValueError, match=r"must be prepared for adapters, .*prepare_for_adapters\(model\) does it"):
        adapted(model, settings(target_modules=targets))
    assert_bitwise(model(IDS).logits, bare)
    # What is dense has nothing to do with it.
    assert_far(adapted(model, settings("lm_head"))(IDS).logits, bare)


def test_modules_to_save_are_dense():
    model, twin = twins()
    with pytest.raises(
        ValueError, match=r"modules_to_save must name dense modules, model\.layers\.0\.mlp\.up_proj has"
    ):
        adapted(model, settings("q_proj", modules_to_save=["up_proj"]))
    model, twin = (adapted(one, settings("q_proj", modules_to_save=["lm_head", "norm"])) for one in (model, twin))
    for one in (model, twin):
        one(input_ids=IDS, labels=IDS).loss.backward()
    assert_same_gradients(model, twin)


@pytest.mark.parametrize("kind", ["LoHa", "IA3", "LNTuning"])
def test_other_kinds_of_adapters_are_refused(kind):
    model, _ = twins()
    more = {"feedforward_modules": []} if kind == "IA3" else {}
    with pytest.raises(ValueError, match=r"o_proj, which is quantised, must be plain LoRA, got peft_type="):
        peft.get_peft_model(model, getattr(peft, f"{kind}Config")(target_modules=["lm_head", "o_proj"], **more))
    assert type(model.lm_head) is nn.Linear
    # A norm has its weight as ever.
    if kind == "LNTuning":
        model = peft.get_peft_model(model, peft.LNTuningConfig(target_modules=["input_layernorm"]))
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert len(gradients(model)) == 2 and all(grad.abs().max() > 0 for grad in gradients(model).values())


def test_models_that_cannot_be_prepared(tmp_path):
    caller = r"qops\.integrations\.peft\.prepare_for_adapters: "
    dense = small_model("llama")
    for wrong, said in (
        (dense, "model must come from"),
        (nn.Linear(8, 8), "model must be a transformers PreTrainedModel, got Linear"),
    ):
        with pytest.raises(ValueError, match=caller + said):
            prepare_for_adapters(wrong)
    model = quantize_model(small_model("llama"), prove=False)
    states = model(IDS, output_hidden_states=True).hidden_states
    handle = model.model.layers[1].self_attn.qkv_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=caller + r"model\.layers\.1\.self_attn\.qkv_proj must have no hooks"):
        prepare_for_adapters(model)
    handle.remove()
    model.model.layers[0].mlp.forward = model.model.layers[0].mlp.forward
    with pytest.raises(ValueError, match=caller + r"model\.layers\.0\.mlp must have no forward of its owner's"):
        prepare_for_adapters(model)
    del model.model.layers[0].mlp.forward
    around = small_model("llama")
    around.model = model.model
    with pytest.raises(
        ValueError, match=caller + "model must be the one that was fused, got a LlamaForCausalLM around"
    ):
        prepare_for_adapters(around)
    assert is_fused(model)
    assert len(model(IDS, output_hidden_states=True).hidden_states) == len(states)
    seen = []
    for name in ("self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj", "input_layernorm"):
        part = model.model.layers[0].get_submodule(name)
        part.register_forward_hook(lambda module, args, output, name=name: seen.append(name))
    prepare_for_adapters(model)(IDS)
    assert sorted(seen) == sorted(("self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj", "input_layernorm"))

    scales = {f"model.layers.{i}.mlp.down_proj": 1 + torch.rand(96, generator=generator(i)) for i in range(2)}
    smoothed = quantize_model(small_model("llama"), "int8", smoothing=scales)
    save_model(smoothed, tmp_path)
    for model in (smoothed, load_model(tmp_path)):
        with pytest.raises(
            ValueError, match=caller + r".* but smoothing divides what model\.layers\.0\.mlp\.down_proj"
        ):
            prepare_for_adapters(model)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"changed": "', '"changed": 1, "other": "'))
    with pytest.raises(ValueError, match="changed must be a reason or be left out, got 1"):
        load_model(tmp_path)
