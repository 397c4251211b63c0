from __future__ import annotations

import struct
import sys

import gguf
import numpy as np
import pytest
import torch

from qops.formats.gguf import load_tokenizer
from qops.formats.gguf.file import GGUFFile, unpermute_rows
from qops.models import load_model
from tests.support.models.gguf_blocks import TYPES
from tests.support.models.gguf_files import HEAD_DIM, HEADS, HIDDEN, KEY_VALUE_HEADS, VOCAB, WIDE, llama_file, permute

OF_32 = [kind for kind in TYPES if not kind.endswith("_K")]


def test_a_scale_that_is_nan_names_the_tensor(tmp_path):
    file = llama_file()
    blocks = np.frombuffer(gguf.quants.quantize(file.tensors["blk.1.ffn_up.weight"][1], gguf.GGMLQuantizationType.Q4_1))
    blocks = blocks.view(np.uint8).reshape(WIDE, -1).copy()
    blocks[3, :2] = (0x00, 0x7E)
    file.tensors["blk.1.ffn_up.weight"] = ("Q4_1", blocks, 0)
    opened = GGUFFile(file.write(tmp_path / "m.gguf"))
    with pytest.raises(ValueError, match=r"m\.gguf: tensor blk\.1\.ffn_up\.weight: .*NaN"):
        opened.weight("model.layers.1.mlp.up_proj")


@pytest.mark.parametrize("heads", [1, 2, 9])
def test_unpermute_rows_inverts_the_converter(heads):
    rows = torch.arange(heads * 8 * 3).view(heads * 8, 3)
    stored = torch.from_numpy(permute(rows.numpy(), heads))
    assert torch.equal(unpermute_rows(stored, heads), rows)
    # Rotary pairs neighbours in the file and halves in Transformers.
    assert stored[:2].tolist() == rows[[0, 4]].tolist()


@pytest.mark.parametrize("kind", [*OF_32, "F32", "F16", "BF16"])
def test_every_weight_of_a_file_is_exact_and_in_transformers_order(tmp_path, kind):
    file = llama_file(weights=kind, output="Q8_0", bias=True)
    opened = GGUFFile(file.write(tmp_path / "m.gguf"))
    expected = file.expected()
    compared = set()
    for name in expected:
        module, leaf = name.rsplit(".", 1)
        value = opened.weight(module) if leaf == "weight" else opened.tensor(name)
        value = value if isinstance(value, torch.Tensor) else value.dequantize()
        assert torch.equal(value.float(), expected[name]), name
        compared.add(name)
    assert len(compared) == len(file.tensors)
    for name in ("model.layers.0.mlp.up_proj.bias", "model.layers.2.mlp.up_proj.weight", "norm", ""):
        assert not opened.holds(name)
        with pytest.raises(ValueError, match=rf"tensor {name} is missing"):
            opened.tensor(name)
    # The file itself holds other rows, so a reader that forgot the permutation fails above.
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    for part, name in (("attn_q", "q_proj"), ("attn_k", "k_proj")):
        for leaf in ("weight", "bias"):
            raw = torch.from_numpy(stored[f"blk.0.{part}.{leaf}"].astype(np.float32))
            assert not torch.equal(raw, expected[f"model.layers.0.self_attn.{name}.{leaf}"])


def test_dense_tensors_keep_their_dtype(tmp_path):
    file = llama_file(overrides={"blk.0.attn_v": "F16", "blk.0.attn_output": "BF16", "blk.0.ffn_up": "F32"})
    opened = GGUFFile(file.write(tmp_path / "m.gguf"))
    dtypes = {"self_attn.v_proj": torch.float16, "self_attn.o_proj": torch.bfloat16, "mlp.up_proj": torch.float32}
    for name, dtype in dtypes.items():
        assert opened.weight(f"model.layers.0.{name}").dtype == dtype


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"table": "F16"}, torch.float16),
        ({"weights": "F16", "table": "F16"}, torch.float16),
        ({"output": "BF16"}, torch.bfloat16),
        ({"table": "BF16", "output": "F16"}, torch.float32),
        ({"output": "F32"}, torch.float32),
        ({"weights": "F16", "table": "F32"}, torch.float32),
    ],
    ids=str,
)
def test_the_dtype_is_that_of_the_dense_matrices(tmp_path, kinds, dtype):
    # Norms and biases are F32 in all of them.
    assert GGUFFile(llama_file(bias=True, **kinds).write(tmp_path / "m.gguf")).dtype == dtype


def test_config(tmp_path):
    config = GGUFFile(llama_file(bias=True).write(tmp_path / "m.gguf")).config
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (VOCAB, HIDDEN, WIDE)
    assert (config.num_hidden_layers, config.num_attention_heads) == (2, HEADS)
    assert (config.num_key_value_heads, config.head_dim) == (KEY_VALUE_HEADS, HEAD_DIM)
    assert config.max_position_embeddings == 128
    assert config.rms_norm_eps == float(np.float32(1e-5))
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert config.tie_word_embeddings and config.attention_bias and not config.mlp_bias
    assert config.hidden_act == "silu"


@pytest.mark.parametrize(("eot", "ends"), [(None, 2), (2, 2), (5, [2, 5])])
def test_the_end_of_a_turn_ends_an_answer(tmp_path, eot, ends):
    file = llama_file()
    if eot is not None:
        file.metadata["tokenizer.ggml.eot_token_id"] = eot
    assert GGUFFile(file.write(tmp_path / "m.gguf")).config.eos_token_id == ends
    if eot == 5:
        assert load_model(tmp_path / "m.gguf").generation_config.eos_token_id == ends
        del file.metadata["tokenizer.ggml.eos_token_id"]
        assert GGUFFile(file.write(tmp_path / "m.gguf")).config.eos_token_id == 5


def test_config_defaults_and_untied_output(tmp_path):
    file = llama_file(output="Q4_0")
    for key in ("llama.attention.head_count_kv", "llama.rope.freq_base", "tokenizer.ggml.padding_token_id"):
        del file.metadata[key]
    for layer in range(2):
        for part in ("attn_k", "attn_v"):
            rows = np.ones((HEADS * HEAD_DIM, HIDDEN), np.float32)
            file.tensors[f"blk.{layer}.{part}.weight"] = ("Q4_0", rows, 0)
    config = GGUFFile(file.write(tmp_path / "m.gguf")).config
    assert config.num_key_value_heads == HEADS
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert config.pad_token_id is None
    assert not config.tie_word_embeddings


def test_rope_scalings(tmp_path):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    plain = LlamaRotaryEmbedding(GGUFFile(llama_file().write(tmp_path / "plain.gguf")).config).inv_freq

    linear = llama_file()
    linear.metadata |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    config = GGUFFile(linear.write(tmp_path / "linear.gguf")).config
    assert torch.equal(LlamaRotaryEmbedding(config).inv_freq, plain / 4)

    llama3 = llama_file()
    divisors = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    llama3.tensors["rope_freqs.weight"] = ("F32", divisors, 0)
    config = GGUFFile(llama3.write(tmp_path / "llama3.gguf")).config
    rotary = LlamaRotaryEmbedding(config)
    for positions in (torch.tensor([[5]]), torch.tensor([[500]])):
        angles = positions[..., None] * (plain.double() / torch.from_numpy(divisors))
        cos, sin = rotary(torch.empty(0), positions)
        torch.testing.assert_close(cos[..., : HEAD_DIM // 2].double(), angles.cos(), atol=1e-5, rtol=0)
        torch.testing.assert_close(sin[..., : HEAD_DIM // 2].double(), angles.sin(), atol=1e-5, rtol=0)


def drop(*names):
    def bend(file):
        for name in names:
            (file.tensors if name in file.tensors else file.metadata).pop(name)

    return bend


def metadata(**values):
    return lambda file: file.metadata.update({key.replace("__", "."): value for key, value in values.items()})


def tensor(name, kind, *shape):
    return lambda file: file.tensors.update({name: (kind, np.ones(shape, np.float32), 0)})


def stored(name, kind, rows, row_bytes):
    return lambda file: file.tensors.update({name: (kind, np.zeros((rows, row_bytes), np.uint8), 0)})


@pytest.mark.parametrize(
    ("bend", "message"),
    [
        (
            lambda file: setattr(file, "architecture", "bloom"),
            "general.architecture must be one of llama, .*, phi3, got 'bloom'",
        ),
        (drop("llama.block_count"), "key llama.block_count is missing"),
        (drop("llama.attention.layer_norm_rms_epsilon"), "key llama.attention.layer_norm_rms_epsilon is missing"),
        (metadata(llama__block_count="two"), "key llama.block_count must be one int, got 'two'"),
        (metadata(llama__block_count=0), "key llama.block_count must be positive, got 0"),
        (metadata(llama__block_count=2**31), r"tensor blk.2.attn_q.weight is missing"),
        (metadata(llama__attention__head_count=[4, 4]), r"head_count must be one int, got \[4, 4\]"),
        (metadata(llama__attention__head_count=7), "must divide one another, got 64, 7, 2"),
        (metadata(llama__attention__key_length=8), r"attn_q.weight must have shape \[32, 64\], got \[64, 64\]"),
        (metadata(llama__attention__value_length=8), "llama.attention.value_length must equal the head dimension 16"),
        (metadata(llama__rope__dimension_count=8), "rope.dimension_count must equal the head dimension 16, got 8"),
        (metadata(llama__rope__freq_base=float("nan")), "key llama.rope.freq_base must be positive, got nan"),
        (
            metadata(llama__attention__layer_norm_rms_epsilon=float("inf")),
            "layer_norm_rms_epsilon must be finite in flo",
        ),
        (
            metadata(llama__rope__scaling__type="su"),
            "llama.rope.scaling.type must be 'none', 'linear' or 'yarn', got 'su'",
        ),
        (metadata(llama__rope__scaling__type="yarn"), "key llama.rope.scaling.factor is missing"),
        (metadata(llama__expert_count=8), "mixtures of experts are not supported, got 8"),
        (
            tensor("blk.0.ffn_up_exps.weight", "F32", 2, 96, 64),
            "mixtures of experts are not supported, got blk.0.ffn_up_exps.weight",
        ),
        (metadata(split__count=3), "is one part of 3: llama-gguf-split --merge"),
        (metadata(llama__attention__scale=0.5), "unknown keys: llama.attention.scale"),
        (metadata(llama__rope__scaling__factor=2.0), "unknown keys: llama.rope.scaling.factor"),
        (metadata(llama__vocab_size=80), r"token_embd.weight must have shape \[80, 64\], got \[72, 64\]"),
        (metadata(tokenizer__ggml__eos_token_id=VOCAB), "eos_token_id must be below the vocabulary size 72, got 72"),
        (drop("token_embd.weight"), "tensor token_embd.weight is missing"),
        (drop("blk.1.ffn_up.weight"), "tensor blk.1.ffn_up.weight is missing"),
        (tensor("blk.0.attn_q.bias", "F32", 64), "tensor blk.0.attn_k.bias is missing"),
        (tensor("blk.0.attn_q_norm.weight", "F32", 16), "unknown tensors: blk.0.attn_q_norm.weight"),
        (tensor("blk.1.attn_v.weight", "Q4_0", 64, 64), r"attn_v.weight must have shape \[32, 64\], got \[64, 64\]"),
        (
            stored("blk.1.ffn_down.weight", "IQ4_NL", 64, 54),
            "ffn_down.weight has type IQ4_NL, supported are Q4_0, Q4_1",
        ),
        (stored("blk.1.ffn_down.weight", "MXFP4", 64, 51), "ffn_down.weight has type MXFP4, supported are Q4_0, Q4_1"),
        (tensor("output_norm.weight", "Q8_0", 64), "output_norm.weight has type Q8_0, supported are F32, F16, BF16"),
        (tensor("rope_freqs.weight", "F32", 9), r"rope_freqs.weight must have shape \[8\], got \[9\]"),
        (
            lambda file: file.tensors.update({"rope_freqs.weight": ("F32", np.zeros(8, np.float32), 0)}),
            "tensor rope_freqs.weight must hold positive finite numbers",
        ),
    ],
)
def test_unsupported_files_are_refused(tmp_path, bend, message):
    file = llama_file()
    bend(file)
    with pytest.raises(ValueError, match=rf"m\.gguf: .*{message}"):
        GGUFFile(file.write(tmp_path / "m.gguf"))


def test_truncation_anywhere_is_refused(tmp_path):
    whole = tokenizer_file().write(tmp_path / "whole.gguf").read_bytes()
    data_start = gguf.GGUFReader(tmp_path / "whole.gguf").data_offset
    cut = tmp_path / "cut.gguf"
    lengths = {*range(0, data_start, 37), *range(data_start, len(whole), len(whole) // 50), len(whole) - 1}
    for length in sorted(lengths):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf: not a readable GGUF file"):
            GGUFFile(cut)
    # The last tensor starts inside this file and ends outside.
    with pytest.raises(ValueError, match=r"tensor \S+: truncated: \d+ bytes expected, the file has"):
        GGUFFile(cut)


def test_damaged_headers_never_fail_in_another_way(tmp_path):
    whole = tokenizer_file().write(tmp_path / "whole.gguf").read_bytes()
    header = gguf.GGUFReader(tmp_path / "whole.gguf").data_offset
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for place in rng.integers(0, header, rng.integers(1, 4)):
            damaged[place] = rng.integers(0, 256)
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        try:
            GGUFFile(tmp_path / "damaged.gguf")
        except ValueError as error:
            assert "damaged.gguf" in str(error)
            refused += 1
    assert refused > 100


def header(*parts: bytes, tensors: int = 0, keys: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts) + bytes(64)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


ARRAY, UINT8, STRING = 9, 0, 8


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGU",
        header(magic=b"GGML"),
        header(version=1),
        header(version=99),
        header(keys=2**63),
        header(tensors=2**63),
        header(struct.pack("<Q", 2**63), keys=1),
        header(text(b"a"), struct.pack("<I", 77), keys=1),
        header(text(b"\xff\xfe"), struct.pack("<IB", UINT8, 1), keys=1),
        # gguf alone would count through 2^62 elements of nothing.
        header(text(b"a"), struct.pack("<IIQ", ARRAY, UINT8, 2**62), keys=1),
        header(text(b"a"), struct.pack("<IIQ", ARRAY, STRING, 2**62), keys=1),
        header(text(b"a"), struct.pack("<IIQ", ARRAY, STRING, 65), struct.pack("<Q", 2**64 - 8), keys=1),
        header(text(b"a"), struct.pack("<IIQ", ARRAY, 77, 65), keys=1),
        header(text(b"a"), struct.pack("<I", ARRAY), struct.pack("<IQ", ARRAY, 1) * 5000, keys=1),
        header(text(b"a"), struct.pack("<IB", UINT8, 1), text(b"a"), struct.pack("<IB", UINT8, 1), keys=2),
        # 2^32 x 2^32 elements are 0 modulo 2^64.
        header(text(b"t"), struct.pack("<IQQIQ", 2, 2**32, 2**32, 0, 0), tensors=1),
        header(text(b"t"), struct.pack("<IQIQ", 1, 4, 0, 2**64 - 32), tensors=1),
        header(text(b"t"), struct.pack("<IQIQ", 1, 4, 999, 0), tensors=1),
        header(text(b"t"), struct.pack("<IQIQ", 1, 33, 2, 0), tensors=1),
        header(*[text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 0)] * 2, tensors=2),
    ],
    ids=range(21),
)
def test_hostile_containers_are_refused(tmp_path, content):
    (tmp_path / "hostile.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"hostile\.gguf: not a readable GGUF file"):
        GGUFFile(tmp_path / "hostile.gguf")


def test_a_string_that_is_no_text_names_its_key(tmp_path):
    path = llama_file().write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"\xff\xfe\xff\xfe\xff", 1))
    with pytest.raises(ValueError, match=r"m\.gguf: key general\.architecture: .*decode"):
        GGUFFile(path)


def test_another_byte_order_is_refused(tmp_path):
    file = llama_file()
    file.writer_args["endianess"] = gguf.GGUFEndian.BIG
    with pytest.raises(ValueError, match="byte order differs"):
        GGUFFile(file.write(tmp_path / "big.gguf"))


def test_a_missing_file_is_not_a_malformed_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        GGUFFile(tmp_path / "none.gguf")
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        load_tokenizer(tmp_path / "none.gguf")


def test_a_missing_gguf_package_is_named(tmp_path, monkeypatch):
    path = llama_file().write(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'qops\[demo\]'"):
        GGUFFile(path)


TOKENS = ["<pad>", "<s>", "</s>", *"abcdefgh", "ab", "abc", *(f"filler{i}" for i in range(100))]


def tokenizer_file():
    file = llama_file()
    file.metadata |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * (len(TOKENS) - 3)],
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.chat_template": "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}",
    }
    return file


def test_tokenizer_with_chat_template(tmp_path):
    tokenizer = load_tokenizer(tokenizer_file().write(tmp_path / "m.gguf"))
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "abcah"}], tokenize=False)
    assert chat == "<s>abcah</s>"
    ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
    assert [TOKENS[i] for i in ids] == ["<s>", "abc", "a", "h", "</s>"]
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert special == (1, 2, 0)


def test_tokenizers_of_architectures_that_transformers_does_not_know(tmp_path):
    for architecture, same in (("gemma", "gemma2"), ("smollm3", "llama")):
        found = []
        for name in (architecture, same):
            file = tokenizer_file()
            file.architecture = name
            (tmp_path / name).mkdir(exist_ok=True)
            if same == "gemma2":
                del file.metadata["tokenizer.ggml.merges"]
                scores = [-float(index) for index in range(len(TOKENS))]
                file.metadata |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": scores}
            found.append(load_tokenizer(file.write(tmp_path / name / "m.gguf")))
            assert found[-1].name_or_path == str(tmp_path / name)
        assert type(found[0]) is type(found[1])
        assert found[0].backend_tokenizer.to_str() == found[1].backend_tokenizer.to_str()
        assert found[0]("abcah")["input_ids"] == found[1]("abcah")["input_ids"]


def test_an_absurd_number_of_layers_does_not_keep_a_tokenizer(tmp_path):
    # Transformers would list the layers of its config.
    file = tokenizer_file()
    file.architecture = "qwen3"
    file.metadata["qwen3.block_count"] = 2**32 - 1
    assert load_tokenizer(file.write(tmp_path / "m.gguf")).eos_token_id == 2


# The last ones pass what the tokenizers package takes for an id.
@pytest.mark.parametrize("token", [999, 2**32 - 1, -1, "<pad>"])
def test_a_special_token_outside_the_vocabulary_is_refused(tmp_path, token):
    file = tokenizer_file()
    file.metadata["tokenizer.ggml.padding_token_id"] = np.int64(token) if token == -1 else token
    # By Transformers or here, by its release.
    with pytest.raises(ValueError, match=r"m\.gguf: (Transformers finds no tokenizer|.* must be the id of a token)"):
        load_tokenizer(file.write(tmp_path / "m.gguf"))


def test_a_file_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"m\.gguf: Transformers finds no tokenizer in it"):
        load_tokenizer(llama_file().write(tmp_path / "m.gguf"))
