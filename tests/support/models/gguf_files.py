"""Small Llama GGUF files for the tests, written by the `gguf` package as llama.cpp's converter writes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

HIDDEN, WIDE, HEADS, KEY_VALUE_HEADS, HEAD_DIM, LAYERS, VOCAB = 64, 96, 4, 2, 16, 2, 72

IN_LAYER = {
    "attn_norm": ("input_layernorm", (HIDDEN,)),
    "attn_q": ("self_attn.q_proj", (HEADS * HEAD_DIM, HIDDEN)),
    "attn_k": ("self_attn.k_proj", (KEY_VALUE_HEADS * HEAD_DIM, HIDDEN)),
    "attn_v": ("self_attn.v_proj", (KEY_VALUE_HEADS * HEAD_DIM, HIDDEN)),
    "attn_output": ("self_attn.o_proj", (HIDDEN, HEADS * HEAD_DIM)),
    "ffn_norm": ("post_attention_layernorm", (HIDDEN,)),
    "ffn_gate": ("mlp.gate_proj", (WIDE, HIDDEN)),
    "ffn_up": ("mlp.up_proj", (WIDE, HIDDEN)),
    "ffn_down": ("mlp.down_proj", (HIDDEN, WIDE)),
}
METADATA: dict[str, Any] = {
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": WIDE,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KEY_VALUE_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 0,
}


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """The rows of attn_q and attn_k as llama.cpp's convert_hf_to_gguf.py orders them."""
    rows = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return rows.swapaxes(1, 2).reshape(weights.shape)


@dataclass
class LlamaFile:
    """What goes into a file, open to be bent by a test before `write`.

    Attributes:
        metadata: key -> value; int, float, str, or a list of them.
        tensors: stored name -> (quantisation type, rows in Transformers' order, heads to permute by or 0).
    """

    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[str, np.ndarray, int]] = field(default_factory=dict)
    architecture: str = "llama"
    writer_args: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, self.architecture, **self.writer_args)
        for key, value in self.metadata.items():
            add: dict[type, Any] = {
                np.int64: writer.add_int64,
                int: writer.add_uint32,
                float: writer.add_float32,
                str: writer.add_string,
                list: writer.add_array,
            }
            add[type(value)](key, value)
        for name, (kind, rows, heads) in self.tensors.items():
            qtype = gguf.GGMLQuantizationType[kind]
            stored = permute(rows, heads) if heads else rows
            if stored.dtype == np.uint8:
                writer.add_tensor(name, stored, raw_dtype=qtype)
            else:
                writer.add_tensor(name, gguf.quants.quantize(stored, qtype), raw_dtype=qtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def expected(self) -> dict[str, torch.Tensor]:
        """Transformers' name -> float32 weight, by the gguf package's own arithmetic and without any permutation."""
        names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
        found = {}
        for name, (kind, rows, _) in self.tensors.items():
            stem, leaf = name.rsplit(".", 1)
            if stem.startswith("blk."):
                _, layer, part = stem.split(".")
                stem = f"model.layers.{layer}.{IN_LAYER[part][0]}"
            qtype = gguf.GGMLQuantizationType[kind]
            values = gguf.quants.dequantize(gguf.quants.quantize(rows, qtype), qtype)
            found[f"{names.get(stem, stem)}.{leaf}"] = torch.from_numpy(values.astype(np.float32))
        return found


def llama_file(
    seed: int = 0,
    *,
    weights: str = "Q4_1",
    table: str = "Q8_0",
    output: str | None = None,
    overrides: dict[str, str] | None = None,
    bias: bool = False,
) -> LlamaFile:
    """A random Llama model.

    Args:
        weights: type of the linears.
        table: type of the embedding table.
        output: type of the output layer; None ties it to the table.
        overrides: stored name without ".weight" -> type.
        bias: whether attention linears have one.
    """
    rng = np.random.default_rng(seed)

    def rows(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    file = LlamaFile(metadata=dict(METADATA))
    file.tensors["token_embd.weight"] = (table, 4 * rows(VOCAB, HIDDEN), 0)
    for layer in range(LAYERS):
        for part, (_, shape) in IN_LAYER.items():
            name = f"blk.{layer}.{part}"
            heads = {"attn_q": HEADS, "attn_k": KEY_VALUE_HEADS}.get(part, 0)
            if len(shape) == 1:
                file.tensors[f"{name}.weight"] = ("F32", 1 + rows(*shape), 0)
                continue
            kind = (overrides or {}).get(name, weights)
            file.tensors[f"{name}.weight"] = (kind, 2 * rows(*shape), heads)
            if bias and part.startswith("attn"):
                file.tensors[f"{name}.bias"] = ("F32", 8 * rows(shape[0]), heads)
    file.tensors["output_norm.weight"] = ("F32", 1 + rows(HIDDEN), 0)
    if output is not None:
        file.tensors["output.weight"] = (output, rows(VOCAB, HIDDEN), 0)
    return file
