"""GGUF files of random weights in the shapes of known models, for ``bench.whole_model``: speed asks for no knowledge.

Linears are Q4_1 and the tied embedding table is Q8_0, as in the model of the demo.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

BLOCK = 32  # weights of a scale, in both types


class Shape(NamedTuple):
    """Of a Llama model."""

    hidden: int
    columns: int  # of the MLP
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


SHAPES = {"llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 64, 128256)}


def fp16(values: np.ndarray) -> np.ndarray:
    return values.astype("<f2").view(np.uint8).reshape(*values.shape, 2)


def q4_1(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    """[n, bytes], of weights whose standard deviation is 1 / sqrt(k): codes 0 ... 15 deviate by 4.6."""
    scale = rng.uniform(0.5, 1.5, (n, k // BLOCK)) / (4.6 * np.sqrt(k))
    codes = rng.integers(0, 256, (n, k // BLOCK, BLOCK // 2), dtype=np.uint8)
    return np.concatenate((fp16(scale), fp16(-7.5 * scale), codes), axis=2).reshape(n, -1)


def q8_0(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    """The same of codes -127 ... 127, which deviate by 73."""
    scale = rng.uniform(0.5, 1.5, (n, k // BLOCK)) / (73 * np.sqrt(k))
    codes = rng.integers(-127, 128, (n, k // BLOCK, BLOCK), dtype=np.int8).view(np.uint8)
    return np.concatenate((fp16(scale), codes), axis=2).reshape(n, -1)


def write(path: Path, shape: Shape, seed: int = 0) -> Path:
    """A model without a tokenizer, whose logits are of the size of 1."""
    import gguf

    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(shape.layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.columns)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, *sizes: int) -> None:
        if len(sizes) == 1:
            return writer.add_tensor(f"{name}.weight", rng.uniform(0.5, 1.5, sizes).astype(np.float32))
        make, kind = (q8_0, "Q8_0") if name == "token_embd" else (q4_1, "Q4_1")
        writer.add_tensor(f"{name}.weight", make(rng, *sizes), raw_dtype=gguf.GGMLQuantizationType[kind])

    h, heads, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    add("token_embd", shape.vocabulary, h)
    for layer in range(shape.layers):
        at = f"blk.{layer}"
        add(f"{at}.attn_norm", h)
        add(f"{at}.attn_q", heads, h)
        add(f"{at}.attn_k", kv, h)
        add(f"{at}.attn_v", kv, h)
        add(f"{at}.attn_output", h, heads)
        add(f"{at}.ffn_norm", h)
        add(f"{at}.ffn_gate", shape.columns, h)
        add(f"{at}.ffn_up", shape.columns, h)
        add(f"{at}.ffn_down", h, shape.columns)
    add("output_norm", h)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
