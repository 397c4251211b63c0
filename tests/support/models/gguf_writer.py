"""Writes a Transformers model as a GGUF file, the way llama.cpp's converter does.

Names of tensors come from the gguf package's own table, names of keys from the methods of its writer: what is written
here is which rows are permuted, which norms get 1 added, and which keys an architecture has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from tests.support.models.gguf_blocks import dequantised, modest_blocks
from tests.support.models.gguf_files import permute

ARCHITECTURES = {"gemma3_text": "gemma3"}
PERMUTED = ("llama", "smollm3")
SCALINGS = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}


def architecture_of(model: Any) -> str:
    name: str = model.config.model_type
    return ARCHITECTURES.get(name, name)


def write_gguf(
    model: Any,
    path: Path,
    kind: str | Callable[[str], str] = "Q4_0",
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> dict[str, torch.Tensor]:
    """Writes a model.

    Args:
        model: of Transformers, float32.
        path: of the file.
        kind: the type of all matrices, or of each by its name in the file. A K-quant, which the gguf package cannot
            make, gets random blocks instead of the model's weights.
        change: adds to what the file says.

    Returns:
        The file's weights under Transformers' names, by the gguf package's arithmetic.
    """
    architecture, config = architecture_of(model), model.config
    writer = gguf.GGUFWriter(path, architecture)
    _write_keys(writer, architecture, config)
    change(writer)
    table = gguf.get_tensor_name_map(_architectures()[architecture], config.num_hidden_layers)
    ties = model.all_tied_weights_keys
    found: dict[str, torch.Tensor] = {}
    for index, (name, tensor) in enumerate(model.state_dict().items()):
        if name in ties:
            continue
        stored = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        rows = tensor.numpy()
        if rows.ndim == 1:
            plus_one = architecture.startswith("gemma")
            rows = rows + np.float32(1) if plus_one else rows
            found[name] = torch.from_numpy(rows - np.float32(1) if plus_one else rows.copy())
            writer.add_tensor(stored, _in_file(rows, architecture, stored, config))
            continue
        its_kind = kind if isinstance(kind, str) else kind(stored)
        qtype = gguf.GGMLQuantizationType[its_kind]
        if its_kind.endswith("_K"):
            data = modest_blocks(its_kind, *rows.shape, seed=index).numpy()
        else:
            data = gguf.quants.quantize(rows, qtype)
        found[name] = dequantised(torch.from_numpy(data), its_kind)
        writer.add_tensor(stored, _in_file(data, architecture, stored, config), raw_dtype=qtype)
    for name, divisors in _divisors(architecture, config).items():
        writer.add_tensor(name, divisors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def _architectures() -> dict[str, gguf.MODEL_ARCH]:
    return {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}


def _in_file(rows: np.ndarray, architecture: str, stored: str, config: Any) -> np.ndarray:
    """Blocks lie along K, so that permuting rows of blocks is permuting rows."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(stored.split(".")[-2])
    return permute(rows, heads) if architecture in PERMUTED and heads is not None else rows


def _write_keys(writer: gguf.GGUFWriter, architecture: str, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for token in ("bos", "eos", "pad"):
        if (value := getattr(config, f"{token}_token_id")) is not None:
            getattr(writer, f"add_{token}_token_id")(value)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if architecture in PERMUTED:
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(head_dim)
    if architecture.startswith("gemma") or head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None) is not None:
            getattr(writer, f"add_{name}")(getattr(config, name))
    rope = config.rope_parameters
    if architecture == "gemma3":
        if rope["sliding_attention"]["rope_theta"] != 10000.0:
            writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    if architecture not in ("gemma", "gemma2"):
        writer.add_rope_freq_base(rope["rope_theta"])
    if architecture == "phi3":
        _write_keys_of_phi3(writer, config, head_dim)
    elif rope["rope_type"] in SCALINGS:
        writer.add_rope_scaling_type(SCALINGS[rope["rope_type"]])
        writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _write_keys_of_phi3(writer: gguf.GGUFWriter, config: Any, head_dim: int) -> None:
    rope, original = config.rope_parameters, config.original_max_position_embeddings
    writer.add_rope_scaling_orig_ctx_len(original)
    turned = int(rope["partial_rotary_factor"] * config.hidden_size)
    writer.add_rope_dimension_count(turned // config.num_attention_heads)
    if rope["rope_type"] == "longrope":
        longer = math.log(config.max_position_embeddings / original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + longer / math.log(original)) if longer > 0 else 1.0)


def _divisors(architecture: str, config: Any) -> dict[str, np.ndarray]:
    rope = config.rope_parameters
    if architecture == "phi3" and rope["rope_type"] == "longrope":
        return {f"rope_factors_{k}.weight": np.array(rope[f"{k}_factor"], np.float32) for k in ("long", "short")}
    if architecture in PERMUTED and rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": llama3_divisors(rope, config.head_dim)}
    return {}


def llama3_divisors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """One by one, as the converter computes them."""
    found = []
    low, high, original = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    for frequency in 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim):
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            found.append(1)
        elif wavelength > original / low:
            found.append(rope["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return torch.tensor(found, dtype=torch.float32).numpy()
