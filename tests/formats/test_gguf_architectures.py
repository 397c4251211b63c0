"""Every architecture of GGUF: a random model of Transformers is written as a file, and comes back from it."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qops.formats import read_checkpoint
from qops.formats.gguf.architectures import ARCHITECTURES
from qops.formats.gguf.file import GGUFFile
from qops.models import dense_model, load_model
from qops.testing import assert_bitwise
from tests.support.models.families import IDS, random_model
from tests.support.models.gguf_blocks import TYPES
from tests.support.models.gguf_writer import architecture_of, write_gguf

EPS: dict[str, Any] = {"rms_norm_eps": float(np.float32(1e-5))}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32}
# Short ones for the first 6 positions, long ones where a sequence is longer.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [1.5, 2.5, 5.0, 9.0],
    "original_max_position_embeddings": 6,
}
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 20000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
GEMMA3_BASES = {
    "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}
PATTERN = [True, False, False, True]


def pattern_flags(writer):
    writer.add_array("gemma3.attention.sliding_window_pattern", PATTERN)


# Case -> family, what changes in its config, what else the file says.
CASES = {
    "llama": ("llama", {"attention_bias": False, "mlp_bias": False}, None),
    "llama, biases": ("llama", {}, None),
    "llama, attention biases": ("llama", {"mlp_bias": False, "tie_word_embeddings": True}, None),
    "llama, heads of another size": ("llama", {"head_dim": 32}, None),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}, None),
    "llama 3.2": ("llama", {"rope_parameters": LLAMA3 | {"factor": 32.0, "rope_theta": 500000.0}}, None),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 3e5}}, None),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "no_rope_layer_interval": 4}, None),
    "smollm3, yarn": ("smollm3", {"no_rope_layer_interval": 4, "rope_parameters": YARN}, None),
    "qwen2": ("qwen2", {"use_sliding_window": False}, None),
    "qwen2, yarn": ("qwen2", {"use_sliding_window": False, "rope_parameters": YARN}, None),
    "qwen3": ("qwen3", {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, None),
    "gemma": ("gemma", {"head_dim": 32}, None),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16}, None),
    "gemma2, 46 layers": ("gemma2", {"head_dim": 32, "num_hidden_layers": 46, "query_pre_attn_scalar": 16}, None),
    "gemma3": ("gemma3", {"query_pre_attn_scalar": 16, "sliding_window_pattern": 6, "num_hidden_layers": 7}, None),
    "gemma3, linear": (
        "gemma3",
        {"query_pre_attn_scalar": 16, "rope_parameters": GEMMA3, "sliding_window_pattern": 6, "num_hidden_layers": 6},
        None,
    ),
    "gemma3, all in keys": (
        "gemma3",
        {
            "query_pre_attn_scalar": 16,
            "rope_parameters": GEMMA3_BASES,
            "sliding_window_pattern": 6,
            "layer_types": ["sliding_attention" if flag else "full_attention" for flag in PATTERN],
            "num_hidden_layers": 4,
            "tie_word_embeddings": False,
            "final_logit_softcapping": 15.0,
            "attn_logit_softcapping": 25.0,
        },
        pattern_flags,
    ),
    "gemma3, every second layer": (
        "gemma3",
        {"query_pre_attn_scalar": 16, "num_hidden_layers": 4},
        lambda writer: writer.add_uint32("gemma3.attention.sliding_window_pattern", 2),
    ),
    "phi3": ("phi3", {}, None),
    "phi3, no window": ("phi3", {"sliding_window": None, "tie_word_embeddings": True}, None),
    "phi3, longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 6}, None),
}
# What a file cannot say and does not change logits, or is the same in other words.
SILENT = {
    "_sliding_window_pattern",
    "attention_dropout",
    "dtype",
    "initializer_range",
    "max_window_layers",
    "partial_rotary_factor",  # what `rope_parameters` says again
    "sliding_window_pattern",  # what `layer_types` says again
    "transformers_version",
}


def written(case, path, kind="Q4_0"):
    family, changes, change = CASES[case]
    model = random_model(family, **(EPS | changes))
    return model, write_gguf(model, path, kind, *([change] if change else []))


def assert_comes_back(theirs, path, weights):
    """The model of the file has these weights, and the logits of theirs with them."""
    ours = load_model(path, torch.float32)
    assert type(theirs) in type(ours).__mro__
    assert ours.qops_fusion.not_fused is None and ours.qops_fusion.own == {}, ours.qops_fusion
    theirs.load_state_dict(weights, strict=False)
    theirs.tie_weights()
    dense = dense_model(ours, torch.float32).state_dict()
    for name, tensor in theirs.state_dict().items():
        assert_bitwise(dense[name], tensor, name)
    with torch.inference_mode():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=0)
    return ours


def told(config):
    return {key: value for key, value in config.to_dict().items() if key not in SILENT}


def test_every_architecture_has_a_case():
    assert {architecture_of(random_model(family)) for family, _, _ in CASES.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("case", CASES)
def test_models_come_back(case, tmp_path):
    theirs, weights = written(case, tmp_path / "m.gguf")
    ours = assert_comes_back(theirs, tmp_path / "m.gguf", weights)
    assert told(ours.config) == told(theirs.config) | {"architectures": [type(theirs).__name__]}


def rewritten(path, change, dropped=()):
    """The file without some keys and tensors, and with what `change` adds."""
    reader = gguf.GGUFReader(path)
    tensors = [(t.name, t.data.copy(), t.tensor_type) for t in reader.tensors]
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, value in ((name, field) for name, field in reader.fields.items() if not name.startswith("GGUF.")):
        if name not in dropped and name != "general.architecture":
            writer.add_key_value(name, value.contents(), value.types[0], value.types[-1] if value.types[1:] else None)
    for name, data, kind in tensors:
        if name not in dropped:
            writer.add_tensor(name, data, raw_dtype=kind)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def adds(key, value):
    add = {int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array", bool: "add_bool"}
    return lambda writer: getattr(writer, add[type(value)])(key, value)


@pytest.mark.parametrize(
    ("case", "dropped", "change", "message"),
    [
        ("qwen2", (), adds("qwen2.attention.key_length", 8), r"key_length must be 16, the hidden size over the heads"),
        ("qwen2", ("blk.1.attn_k.bias",), None, "tensor blk.1.attn_k.bias is missing"),
        ("qwen2", (), adds("qwen2.attention.sliding_window", 9), "unknown keys: qwen2.attention.sliding_window"),
        ("qwen2", ("qwen2.rope.freq_base",), None, "key qwen2.rope.freq_base is missing"),
        ("qwen2, yarn", ("qwen2.rope.scaling.original_context_length",), None, "original_context_length is missing"),
        ("qwen2, yarn", (), adds("qwen2.rope.scaling.yarn_ext_factor", 0.5), "unknown keys: .*yarn_ext_factor"),
        ("qwen3", ("blk.2.attn_k_norm.weight",), None, "tensor blk.2.attn_k_norm.weight is missing"),
        ("gemma2", ("gemma2.attn_logit_softcapping",), None, "key gemma2.attn_logit_softcapping is missing"),
        ("gemma2", ("gemma2.attention.sliding_window",), None, "key gemma2.attention.sliding_window is missing"),
        (
            "gemma2",
            (),
            lambda w: w.add_tensor("output.weight", np.ones((72, 64), "f4")),
            "unknown tensors: output.weig",
        ),
        ("gemma3", (), adds("gemma3.attention.sliding_window_pattern", [True] * 6), "must be one int, or 7 bools"),
        ("gemma3", (), adds("gemma3.attention.sliding_window_pattern", [1] * 7), "must be one int, or 7 bools"),
        ("gemma3", (), adds("gemma3.attention.sliding_window_pattern", "6"), "must be one int, got '6'"),
        ("gemma3", ("gemma3.rope.freq_base",), None, "key gemma3.rope.freq_base is missing"),
        ("phi3", ("phi3.attention.sliding_window",), None, "key phi3.attention.sliding_window is missing"),
        ("phi3", ("phi3.rope.dimension_count",), adds("phi3.rope.dimension_count", 7), "must be even and at most .*16"),
        (
            "phi3",
            ("phi3.rope.dimension_count",),
            adds("phi3.rope.dimension_count", 18),
            "must be even and at most .*16",
        ),
        ("phi3", (), adds("phi3.rope.scaling.type", "longrope"), "must be there together, .*'longrope' and neither"),
        ("phi3, longrope", ("rope_factors_long.weight",), None, "must be there together, .*'none' and short"),
        ("phi3, longrope", ("phi3.rope.scaling.attn_factor",), None, "key phi3.rope.scaling.attn_factor is missing"),
        (
            "phi3, longrope",
            (),
            adds("phi3.rope.scaling.type", "yarn"),
            "must be there together, .*'yarn' and short, long",
        ),
        (
            "llama 3.1",
            (),
            adds("llama.rope.scaling.type", "linear"),
            "rope_freqs.weight together with .* not supported",
        ),
        ("smollm3", ("smollm3.rope.freq_base",), None, "key smollm3.rope.freq_base is missing"),
        ("smollm3", ("blk.4.ffn_norm.weight",), None, "tensor blk.4.ffn_norm.weight is missing"),
    ],
)
def test_what_does_not_fit_its_architecture_is_refused(case, dropped, change, message, tmp_path):
    written(case, tmp_path / "m.gguf")
    rewritten(tmp_path / "m.gguf", change or (lambda writer: None), dropped)
    with pytest.raises(ValueError, match=rf"m\.gguf: .*{message}"):
        GGUFFile(tmp_path / "m.gguf")


def test_a_rewritten_file_is_the_same(tmp_path):
    written("phi3, longrope", tmp_path / "m.gguf")
    before = GGUFFile(tmp_path / "m.gguf").config.to_dict()
    rewritten(tmp_path / "m.gguf", lambda writer: None)
    assert GGUFFile(tmp_path / "m.gguf").config.to_dict() == before
    # Another factor than the formula's is kept.
    key = "phi3.rope.scaling.attn_factor"
    rewritten(tmp_path / "m.gguf", adds(key, 1.5), (key,))
    assert GGUFFile(tmp_path / "m.gguf").config.rope_parameters["attention_factor"] == 1.5


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_models_of_every_type_come_back(family, kind, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "partial_rotary_factor": 1.0}
    sizes |= {"query_pre_attn_scalar": 64, "head_dim": 64, "sliding_window_pattern": 6}
    config = sizes | EPS
    if family == "phi3":
        del config["head_dim"], config["query_pre_attn_scalar"]
    theirs = random_model(family, **config)
    assert_comes_back(theirs, tmp_path / "m.gguf", write_gguf(theirs, tmp_path / "m.gguf", kind))


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("tied", [False, True])
def test_tables_of_an_odd_vocabulary_become_dense(kind, tied, tmp_path):
    theirs = random_model("llama", vocab_size=73, tie_word_embeddings=tied, **EPS)
    weights = write_gguf(theirs, tmp_path / "m.gguf", lambda name: "Q4_0" if name.startswith("blk") else kind)
    ours = assert_comes_back(theirs, tmp_path / "m.gguf", weights)
    assert type(ours.lm_head) is torch.nn.Linear and (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    read = read_checkpoint(tmp_path / "m.gguf")["model.embed_tokens.weight"]
    assert isinstance(read, torch.Tensor)
    assert_bitwise(read, weights["model.embed_tokens.weight"])


def test_a_checkpoint_is_read_without_a_model(tmp_path):
    _, weights = written("gemma3", tmp_path / "m.gguf")
    read = read_checkpoint(tmp_path / "m.gguf")
    names = {name if isinstance(value, torch.Tensor) else f"{name}.weight" for name, value in read.items()}
    assert names == set(weights)
    for name, value in read.items():
        if isinstance(value, torch.Tensor):
            assert_bitwise(value, weights[name], name)
        else:
            assert value.is_packed
            assert_bitwise(value.dequantize(), weights[f"{name}.weight"], name)


# Transformers' own reader takes much of a config for granted, which these sizes are made to fit.
THEIRS = {
    "llama": {"attention_bias": False, "mlp_bias": False},  # it knows no biases
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"head_dim": 128},
    "gemma2": {},
    "gemma3": {"sliding_window_pattern": 6},
    "phi3": {"partial_rotary_factor": 1.0},
}


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "F16"])
@pytest.mark.parametrize("family", THEIRS)
def test_weights_are_those_of_transformers_own_reader(family, kind, tmp_path):
    model = random_model(family, **THEIRS[family])

    def change(writer):
        if family != "llama":  # whose files have it anyway
            writer.add_vocab_size(72)

    write_gguf(model, tmp_path / "m.gguf", kind, change)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).state_dict()
    ours = dense_model(load_model(tmp_path / "m.gguf", torch.float32), torch.float32).state_dict()
    assert set(theirs) == set(ours)
    for name, tensor in ours.items():
        assert_bitwise(tensor, theirs[name], name)
