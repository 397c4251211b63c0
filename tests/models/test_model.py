from __future__ import annotations

import copy
import importlib.metadata
import json
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import qops
from qops.models import dense_model, load_model, quantize_model, save_model
from qops.models.decoder import DecoderLayer, cache_keyword
from qops.nn import Int8Embedding, Int8WeightOnlyLinear
from qops.testing import FLOAT_DTYPES, assert_accurate, assert_bitwise
from qops.weights import Int4Weight, Int8Weight
from tests.support.models.gguf_files import VOCAB, llama_file

GGUF_MIXES = {
    "Q4_1, tied Q8_0": {},
    "Q4_0, Q8_0 output": {"weights": "Q4_0", "output": "Q8_0"},
    "Q8_0 throughout": {"weights": "Q8_0", "output": "Q8_0"},
    "tied Q4_0": {"weights": "Q4_0", "table": "Q4_0"},
    "dense F16": {"weights": "F16", "table": "F16"},
    "mixed types and biases": {
        "overrides": {"blk.0.attn_v": "Q8_0", "blk.0.ffn_up": "F32", "blk.1.attn_k": "Q4_0", "blk.1.ffn_down": "BF16"},
        **{"output": "F32", "bias": True},
    },
}


@pytest.fixture(params=GGUF_MIXES)
def gguf_path(request, tmp_path):
    return llama_file(3, **GGUF_MIXES[request.param]).write(tmp_path / "m.gguf")


def random_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def quantised(seed: int = 0, **changes) -> LlamaForCausalLM:
    return quantize_model(random_llama(seed, **changes), qops.Int4(32))


def random_ids(batch: int, tokens: int, seed: int = 7) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def assert_same_model(ours: LlamaForCausalLM, dtype: torch.dtype, where=..., **inputs) -> None:
    """Logits of `ours` are close to the float64 model of the same weights, and of their dtype.

    At most 2e-5 of the largest logit away in float32, otherwise at most twice as far as Transformers' own model.
    """
    exact = dense_model(ours, torch.float32).double()
    got, want, usual = (model(**inputs).logits[where] for model in (ours, exact, dense_model(ours, dtype)))
    assert got.dtype == (dtype if isinstance(ours.lm_head, nn.Linear) else torch.float32)
    if dtype == torch.float32:
        torch.testing.assert_close(got.double(), want, atol=2e-5 * want.abs().max().item(), rtol=0)
    else:
        assert_accurate(got, want, usual)


# GGUF ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_gguf_models_match_the_dense_model(gguf_path, dtype):
    assert_same_model(load_model(gguf_path, dtype), dtype, input_ids=random_ids(2, 9))


@pytest.mark.parametrize("mix", GGUF_MIXES)
def test_gguf_models_match_a_model_that_never_saw_the_file(mix, tmp_path):
    # Weights by the gguf package's arithmetic, in Transformers' order all along, and a config written here.
    file = llama_file(3, **GGUF_MIXES[mix])
    state = file.expected()
    ours = load_model(file.write(tmp_path / "m.gguf"), torch.float32)
    bias = "model.layers.0.self_attn.q_proj.bias" in state
    theirs = random_llama(
        tie_word_embeddings="lm_head.weight" not in state, attention_bias=bias, rms_norm_eps=float(np.float32(1e-5))
    )
    theirs.load_state_dict(state | {"lm_head.weight": state.get("lm_head.weight", state["model.embed_tokens.weight"])})
    ids = random_ids(2, 9)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)
    dense = dense_model(ours, torch.float32).state_dict()
    for name, tensor in theirs.state_dict().items():
        assert_bitwise(dense[name], tensor, name)


def test_gguf_weights_stay_quantised_and_the_table_exists_once(tmp_path):
    model = load_model(llama_file().write(tmp_path / "m.gguf"))
    assert isinstance(model.model.embed_tokens, Int8Embedding)
    assert isinstance(model.lm_head, Int8WeightOnlyLinear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weights = [module for module in model.modules() if isinstance(module, (Int4Weight, Int8Weight))]
    # Per layer qkv, o, gate_up, down; and the table.
    assert len(weights) == 2 * 4 + 1
    assert all(weight.is_packed for weight in weights)
    # Nothing dense is left but norms.
    norms = {"input_layernorm", "post_attention_layernorm", "norm"}
    assert {name.rsplit(".", 2)[-2] for name, _ in model.named_parameters()} == norms
    assert not any(parameter.is_meta for parameter in (*model.parameters(), *model.buffers()))
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == torch.bfloat16


def test_tied_dense_tables_stay_tied(tmp_path):
    model = load_model(llama_file(table="F32").write(tmp_path / "m.gguf"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


# Operators really run ------------------------------------------------------------------------------------------------


def test_every_part_runs_on_qops_operators(tmp_path):
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = Counter[str]()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls[func.name()] += 1
            return func(*args, **(kwargs or {}))

    model = load_model(llama_file().write(tmp_path / "m.gguf"))
    more = {cache_keyword(type(model)): DynamicCache(config=model.config), "use_cache": True}

    def ours(tokens):
        calls.clear()
        with Count():
            model(random_ids(1, tokens), **more)
        assert not {"aten::mm", "aten::addmm", "aten::silu", "aten::rsqrt"} & {n.split(".")[0] for n in calls}
        return {name: count for name, count in calls.items() if name.startswith("qops::")}

    ends = dict.fromkeys(("qops::int8_embedding", "qops::rms_norm", "qops::int8_weight_only_gemm"), 1)
    # q, k and v; o and down, which add the residual; gate and up, which end in SiLU-mul.
    products = {"qops::int4_gemm": 2, "qops::int4_gemm.fused": 6}
    assert ours(9) == {**ends, **products, "qops::rms_norm": 5, "qops::rotary_": 2}
    assert ours(1) == {**ends, "qops::attention_block": 2, "qops::mlp_block": 2}


# Quantising ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 32},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0}},
    ],
    ids=lambda changes: " ".join(changes) or "plain",
)
def test_quantised_models_match_the_dense_model(changes, dtype):
    model = random_llama(**changes)
    if changes.get("attention_bias"):
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_()
    assert_same_model(quantize_model(model.to(dtype), qops.Int4(32)), dtype, input_ids=random_ids(2, 9))


def test_quantize_model_quantises_what_it_says():
    source = random_llama()
    original = copy.deepcopy(source)
    model = quantize_model(source, qops.Int4(16, symmetric=False), skip=("o_proj", "*.1.mlp.gate_proj"))
    assert model is source
    dense = dense_model(model, torch.float32)
    for name, linear in original.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        kept = name == "lm_head" or name.endswith("o_proj") or name == "model.layers.1.mlp.gate_proj"
        expected = linear.weight if kept else Int4Weight.quantize(linear.weight, 16, False).dequantize()
        assert torch.equal(dense.get_submodule(name).weight, expected), name
    assert isinstance(model.model.layers[0].self_attn.o_proj, nn.Linear)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.get_submodule("model.layers.1.mlp.gate_up_proj").merged is None


def test_quantize_model_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="model has qops parts already"):
        quantize_model(quantised())
    with pytest.raises(ValueError, match="must be a transformers PreTrainedModel, got Linear"):
        quantize_model(nn.Linear(8, 8))


def test_another_activation_than_silu_is_left_to_pytorch():
    model = quantize_model(random_llama(hidden_act="gelu"), qops.Int4(32))
    assert model.model.layers[0].mlp.act is not None
    assert_same_model(model, torch.float32, input_ids=random_ids(2, 9))


@pytest.mark.parametrize("group_size", [128, 48, 0, -2])
def test_a_group_size_that_does_not_fit_changes_nothing(group_size):
    model = random_llama()
    before = model(random_ids(1, 5)).logits
    with pytest.raises(ValueError, match=rf"layers\.0\.\S+: .*group_size .*K = 64, got {group_size}"):
        quantize_model(model, qops.Int4(group_size))
    assert torch.equal(model(random_ids(1, 5)).logits, before)


def test_weights_that_are_not_finite_change_nothing():
    model = random_llama()
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: weight must be finite"):
        quantize_model(model, qops.Int4(32))
    assert not any(isinstance(module, DecoderLayer) for module in model.modules())


def test_old_transformers_releases_are_refused(monkeypatch, tmp_path):
    for found in ("5.16.2", "4.57.0"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, found=found: found)
        for call in (lambda: load_model(tmp_path), lambda: quantize_model(random_llama())):
            with pytest.raises(ImportError, match=rf"transformers >= 5\.17 is needed, got {found}"):
                call()


@pytest.mark.parametrize("found", ["5.99.1", "6.0.0", "6.0.0rc1"])
def test_newer_transformers_releases_are_warned_about_once(found, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    with pytest.warns(UserWarning, match=rf"transformers {found} is newer than \d\.\d+, the newest that this qops"):
        model = quantize_model(random_llama(), qops.Int4(32))
    assert model.qops_fusion.not_fused is None and "relative error" in model.qops_fusion.proof
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(random_llama(), qops.Int4(32))


def test_tested_transformers_releases_are_not_warned_about(monkeypatch):
    for found in ("5.17.0", "5.24.7", "5.20.0.dev0"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, found=found: found)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert isinstance(quantize_model(random_llama(), qops.Int4(32)), LlamaForCausalLM)


# Caches, masks, generation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_decoding_with_a_cache_equals_the_whole_sequence(kind):
    model = quantised()
    ids = random_ids(2, 12)
    whole = model(ids, use_cache=False).logits
    cache = kind(config=model.config, max_cache_len=16) if kind is StaticCache else kind(config=model.config)
    # A prompt, a longer chunk behind it, then single tokens.
    steps = [ids[:, :4], ids[:, 4:8], *ids[:, 8:].split(1, dim=1)]
    pieces = [model(step, **{cache_keyword(type(model)): cache}, use_cache=True).logits for step in steps]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generate_equals_greedy_search_without_a_cache(dtype):
    model = quantised().to(dtype)
    ids = random_ids(1, 6)
    tokens = ids
    for _ in range(12):
        logits = model(tokens, use_cache=False).logits[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    generated = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    if dtype == torch.float32:
        assert torch.equal(generated, tokens)
    else:
        # Rounding differs between one token and many; the first token has seen the same computation.
        assert torch.equal(generated[:, :7], tokens[:, :7])


def test_left_padding_changes_no_row():
    model = quantised()
    prompts = [random_ids(1, length, seed=length)[0] for length in (3, 8, 5)]
    ids = torch.zeros(3, 8, dtype=torch.long)
    mask = torch.zeros(3, 8, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, 8 - len(prompt) :] = prompt
        mask[row, 8 - len(prompt) :] = 1
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "output_logits": True}
    batch = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], return_dict_in_generate=True, **settings)
        assert torch.equal(batch.sequences[row, 8:], alone.sequences[0, len(prompt) :])
        for ours, single in zip(batch.logits, alone.logits, strict=True):
            torch.testing.assert_close(ours[row], single[0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_padded_batches_match_the_dense_model(dtype):
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": random_ids(2, 9), "attention_mask": mask, "position_ids": positions}
    assert_same_model(quantised().to(dtype), dtype, where=mask.bool(), **inputs)


def test_masks_of_each_head_match_the_dense_model():
    """In one-token decode too, where heads that share keys and values take the place of tokens."""
    model, ids = quantised(), random_ids(2, 6)
    logits = []
    for each in (model, dense_model(model, torch.float32)):
        cache = DynamicCache(config=model.config)
        each(ids[:, :5], **{cache_keyword(type(model)): cache})
        # Of the six positions each head of each sequence misses one of its own, never the last.
        mask = torch.zeros(2, 4, 1, 6)
        mask.view(8, 6)[range(8), [0, 1, 2, 3, 4, 0, 2, 4]] = torch.finfo(torch.float32).min
        logits.append(each(ids[:, 5:], attention_mask=mask, **{cache_keyword(type(model)): cache}).logits)
    torch.testing.assert_close(*logits, atol=2e-5, rtol=2e-5)


def test_beam_search_matches_the_dense_model():
    model = quantised()
    settings = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    ids = random_ids(2, 5)
    assert torch.equal(model.generate(ids, **settings), dense_model(model, torch.float32).generate(ids, **settings))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_implementations_agree(implementation):
    model = quantised()
    ids = random_ids(2, 9)
    expected = dense_model(model, torch.float32)(ids).logits
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(ids).logits, expected, atol=2e-5, rtol=2e-5)
    cache = DynamicCache(config=model.config)
    pieces = [model(step, **{cache_keyword(type(model)): cache}).logits for step in (ids[:, :8], ids[:, 8:])]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=2e-5, rtol=2e-5)


def test_attention_weights_come_from_the_eager_implementation():
    model = quantised()
    model.set_attn_implementation("eager")
    dense = dense_model(model, torch.float32)
    dense.set_attn_implementation("eager")
    ids = random_ids(1, 6)
    ours, theirs = (m(ids, output_attentions=True).attentions for m in (model, dense))
    assert len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("how", ["argument", "config", "asked before quantising"])
def test_hidden_states_are_those_of_transformers(how):
    model = random_llama()
    ids = random_ids(2, 6)
    if how == "asked before quantising":
        model(ids, output_hidden_states=True)
    model = quantize_model(model, qops.Int4(32))
    dense = dense_model(model, torch.float32)
    plain = model(ids).logits
    if how == "config":
        model.config.output_hidden_states = True
        got = model(ids)
    else:
        got = model(ids, output_hidden_states=True)
    want = dense(ids, output_hidden_states=True)
    assert len(got.hidden_states) == len(want.hidden_states) == 3
    for ours, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    # Handing on the sum instead of the pair is the same computation to the bit.
    assert_bitwise(got.logits, plain)


def test_inputs_as_embeddings():
    model = quantised()
    ids = random_ids(2, 6)
    assert_bitwise(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


def test_models_trace():
    model = quantised()
    ids = random_ids(2, 6)
    with torch.inference_mode(False), torch.no_grad():
        compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_grad_mode_outside_of_no_grad_works():
    with torch.inference_mode(False), torch.enable_grad():
        logits = quantised()(random_ids(1, 4)).logits
    assert not logits.requires_grad


# State and folders ---------------------------------------------------------------------------------------------------


def test_state_dict_has_transformers_names_and_loads():
    model, other = quantised(seed=0), quantised(seed=1)
    names = {key.split(".weight")[0].split(".bias")[0] for key in model.state_dict()}
    assert names == {key.rsplit(".", 1)[0] for key in random_llama().state_dict()}
    assert "model.layers.0.self_attn.q_proj.weight.qweight" in model.state_dict()
    ids = random_ids(1, 5)
    expected = model(ids).logits
    assert not torch.allclose(other(ids).logits, expected)
    result = other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert not result.missing_keys and not result.unexpected_keys
    assert_bitwise(other(ids).logits, expected)


@pytest.mark.parametrize("scheme", (qops.Int4(32), qops.Int8WeightOnly(32)), ids=str)
def test_act_order_of_down_goes_into_gate_and_up_at_load(tmp_path, scheme):
    model = quantize_model(random_llama(), scheme)
    for index, layer in enumerate(model.model.layers):
        weight = layer.mlp.down_proj.weight
        perm = torch.randperm(96, generator=torch.Generator().manual_seed(index))
        more = {"kind": weight.kind, "perm": perm}
        layer.mlp.down_proj.weight = type(weight).from_canonical(**weight.canonical(), **more)
    ids = random_ids(2, 5)
    save_model(model, tmp_path / "gathers")
    loaded = load_model(tmp_path / "gathers", torch.float32)
    assert all(layer.mlp.reordered and not layer.mlp.down_proj.weight.act_order for layer in loaded.model.layers)
    assert_bitwise(loaded(ids).logits, model(ids).logits)
    save_model(loaded, tmp_path / "reordered")
    again = load_model(tmp_path / "reordered", torch.float32)
    assert not any(layer.mlp.reordered for layer in again.model.layers)
    assert_bitwise(again(ids).logits, model(ids).logits)


def test_deepcopy_keeps_the_tie_and_the_logits(tmp_path):
    model = load_model(llama_file().write(tmp_path / "m.gguf"))
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert twin.lm_head.weight is not model.lm_head.weight
    assert_bitwise(twin(random_ids(1, 5)).logits, model(random_ids(1, 5)).logits)


def test_casting_a_loaded_model(tmp_path):
    path = llama_file().write(tmp_path / "m.gguf")
    cast = load_model(path, torch.bfloat16).float()
    # The norms went through bfloat16, so the models may differ by that; the quantised weights may not.
    dense, loaded = (dense_model(m, torch.float32).state_dict() for m in (cast, load_model(path, torch.float32)))
    assert all(torch.equal(dense[name], loaded[name]) for name in dense if "norm" not in name)
    assert cast(random_ids(1, 5)).logits.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_folders_round_trip_gguf_models(gguf_path, tmp_path, dtype):
    model = load_model(gguf_path, dtype)
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved", dtype)
    assert_bitwise(again(random_ids(2, 9)).logits, model(random_ids(2, 9)).logits)
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert_bitwise(again.state_dict()[key], tensor, key)
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings
    settings = (again.generation_config, model.generation_config)
    assert len({(s.eos_token_id, s.bos_token_id, s.pad_token_id) for s in settings}) == 1


def test_folders_round_trip_quantised_models(tmp_path):
    model = quantize_model(random_llama(), qops.Int4(32, symmetric=False), skip=("k_proj",))
    save_model(model, tmp_path)
    assert_bitwise(load_model(tmp_path, torch.float32)(random_ids(2, 9)).logits, model(random_ids(2, 9)).logits)


def test_a_loaded_folder_saves_again_unchanged(tmp_path):
    save_model(quantised(), tmp_path / "a")
    save_model(load_model(tmp_path / "a", torch.float32), tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


QWEIGHT = "model.layers.1.mlp.up_proj.weight"
SCALES = "model.layers.1.mlp.up_proj.weight.scales"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not readable as JSON"),
        (lambda f: (f / "model.safetensors").write_bytes(b"12345678"), "not a readable safetensors file"),
        (lambda f: edit_config(f, lambda c: c.pop("quantization_config")), "the model is dense"),
        (
            lambda f: edit_config(f, lambda c: c.update(model_type="gemma")),
            "must be 'llama' .*, got 'gemma'",
        ),
        (lambda f: edit_config(f, lambda c: c["quantization_config"].update(format_version=9)), "must be 4, got 9"),
        (lambda f: edit_config(f, lambda c: c["quantization_config"].update(weights=3)), "weights must map names"),
        (
            lambda f: edit_config(f, lambda c: c["quantization_config"]["weights"].update({QWEIGHT[:-7]: 4})),
            "weights must map names to kinds",
        ),
        (lambda f: edit_config(f, lambda c: c.update(quantization_config=[1])), "must be an object with a qu"),
        (
            lambda f: edit_config(f, lambda c: c["quantization_config"]["weights"].update({QWEIGHT[:-7]: "int3"})),
            "up_proj.weight has unknown kind 'int3'",
        ),
        (
            lambda f: edit_config(f, lambda c: c["quantization_config"].update(fused="false")),
            "fused must be true or fal",
        ),
        (lambda f: edit_config(f, lambda c: c["quantization_config"].update(cast=["x"])), "cast must map names to dty"),
        (lambda f: edit_config(f, lambda c: c["quantization_config"].update(cast={"x": "int99"})), "cast must map"),
        (
            lambda f: edit_config(f, lambda c: c["quantization_config"].update(cast={"model.no.where": "float16"})),
            r"cast names model\.no\.where, which is no buffer",
        ),
        (
            lambda f: edit_config(f, lambda c: c["quantization_config"]["weights"].update({"model.more": "int8"})),
            r"tensor model\.more\.weight must be codes of shape \[1, N, bytes\], got None",
        ),
        (lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json: "),
        (
            lambda f: edit_tensors(f, lambda t: t.update({f"{QWEIGHT[:-7]}.bias": t["model.norm.weight"].clone()})),
            "mlp.up_proj.bias has no place in LlamaForCausalLM",
        ),
        (lambda f: edit_config(f, lambda c: c.update(intermediate_size=64)), r"shape \[64, 64\], got \[96, 64\]"),
        (lambda f: edit_tensors(f, lambda t: t.pop(QWEIGHT)), f"tensor {QWEIGHT} must be codes of shape .*got None"),
        (lambda f: edit_tensors(f, lambda t: t.pop(SCALES)), "up_proj.weight: must have codes and scales"),
        (
            lambda f: edit_tensors(f, lambda t: t.update({QWEIGHT: t[QWEIGHT][0].clone()})),
            r"up_proj\.weight must be codes of shape \[1, N, bytes\], got uint8 \[96, 32\]",
        ),
        (lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight")), "tensor model.norm.weight is missing"),
        (lambda f: edit_tensors(f, lambda t: t.update({SCALES: t[SCALES] * float("nan")})), "up_proj.weight: .*NaN"),
        (lambda f: edit_tensors(f, lambda t: t.update({QWEIGHT: t[QWEIGHT].float()})), "up_proj.weight: .*uint8"),
        (
            lambda f: edit_tensors(f, lambda t: t.update({QWEIGHT: t[QWEIGHT][:, :40].clone()})),
            "up_proj.weight must have shape",
        ),
    ],
)
def test_spoilt_folders_are_refused(tmp_path, spoil, message):
    save_model(quantised(), tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value) or "shape" in message or "no place" in message


def test_a_folder_without_its_tensors_is_refused(tmp_path):
    save_model(quantised(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_model(tmp_path)


def test_wrong_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such GGUF file or model folder"):
        load_model(tmp_path / "none")
    path = llama_file().write(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"dtype must be torch\.float32, torch\.bfloat16 or torch\.float16"):
        load_model(path, torch.float64)
    for call in (dense_model, lambda model: save_model(model, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"must come from qops\.load_model or qops\.quantize_model"):
            call(random_llama())
    assert not (tmp_path / "out").exists()


def test_dense_model_owns_its_weights():
    model = quantised()
    before = model(random_ids(1, 5)).logits
    dense = dense_model(model, torch.float32)
    for parameter in dense.parameters():
        parameter.zero_()
    assert_bitwise(model(random_ids(1, 5)).logits, before)
    assert type(dense.model.layers[0].self_attn.q_proj) is nn.Linear
