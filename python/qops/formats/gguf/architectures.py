"""The architectures of GGUF that are read: names and shapes of their tensors, and their keys in Transformers' terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from qops.formats.gguf.contents import Contents
from qops.formats.gguf.rope import rope, rope_of_two_kinds_of_layers, rope_with_factors


class Sizes(NamedTuple):
    """Of a model; letters as in the shapes of :class:`Architecture`."""

    layers: int
    hidden: int
    wide: int
    heads: int
    key_value_heads: int
    head_dim: int
    context: int

    def shape(self, letters: str) -> list[int]:
        query, key = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        extents = {"H": self.hidden, "I": self.wide, "J": 2 * self.wide, "D": self.head_dim}
        extents |= {"Q": query, "K": key, "M": query + 2 * key}
        return [extents[letter] for letter in letters]


class Architecture(NamedTuple):
    """How GGUF stores a family of models.

    Attributes:
        prefix: of Transformers' class names.
        config: Transformers' class.
        layer: Transformers' name of a module in a layer -> GGUF's, and its shape by letters: H the hidden size, I the
            MLP's and J two of it, D a head's, Q all query heads', K all key heads', M those of q, k and v.
        rope: gives `rope_parameters`.
        rope_base: where the file has none; None where it has to.
        own: gives the arguments of the config that only this architecture has.
        permuted: whether the rows of q and k are in llama.cpp's own order.
        norms_plus_one: whether norms are stored as 1 + w.
        always_tied: whether there never is an output layer of its own.
        biases: of q, k and v; or wherever the config can have them ("optional").
        head_dim_in_config: whether the config takes a head dimension that is not H / heads.
    """

    prefix: str
    config: str
    layer: dict[str, tuple[str, str]]
    rope: Callable[[Contents, Sizes, float | None], dict[str, Any]] = rope
    rope_base: float | None = None
    own: Callable[[Contents, Sizes], dict[str, Any]] = lambda contents, sizes: {}
    permuted: bool = False
    norms_plus_one: bool = False
    always_tied: bool = False
    biases: Literal["none", "qkv", "optional"] = "none"
    head_dim_in_config: bool = True


TOP_LEVEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

_SEPARATE = {
    "self_attn.q_proj": ("attn_q", "QH"),
    "self_attn.k_proj": ("attn_k", "KH"),
    "self_attn.v_proj": ("attn_v", "KH"),
    "self_attn.o_proj": ("attn_output", "HQ"),
    "mlp.gate_proj": ("ffn_gate", "IH"),
    "mlp.up_proj": ("ffn_up", "IH"),
    "mlp.down_proj": ("ffn_down", "HI"),
}
_MERGED = {
    "self_attn.qkv_proj": ("attn_qkv", "MH"),
    "self_attn.o_proj": ("attn_output", "HQ"),
    # Gate first; there is no ffn_gate.
    "mlp.gate_up_proj": ("ffn_up", "JH"),
    "mlp.down_proj": ("ffn_down", "HI"),
}
_TWO_NORMS = {"input_layernorm": ("attn_norm", "H"), "post_attention_layernorm": ("ffn_norm", "H")}
_FOUR_NORMS = {
    "input_layernorm": ("attn_norm", "H"),
    "post_attention_layernorm": ("post_attention_norm", "H"),
    "pre_feedforward_layernorm": ("ffn_norm", "H"),
    "post_feedforward_layernorm": ("post_ffw_norm", "H"),
}
_HEAD_NORMS = {"self_attn.q_norm": ("attn_q_norm", "D"), "self_attn.k_norm": ("attn_k_norm", "D")}


def _attention_scale(sizes: Sizes, layers_of_27b: int) -> int:
    """No key has it: llama.cpp knows the one model of a family that does not scale by its heads' size by its depth."""
    return sizes.hidden // sizes.heads if sizes.layers == layers_of_27b else sizes.head_dim


def _gemma2(contents: Contents, sizes: Sizes) -> dict[str, Any]:
    return {
        "sliding_window": contents.key(".attention.sliding_window", int),
        "attn_logit_softcapping": contents.key(".attn_logit_softcapping", float),
        "final_logit_softcapping": contents.key(".final_logit_softcapping", float),
        "query_pre_attn_scalar": _attention_scale(sizes, 46),
    }


def _gemma3(contents: Contents, sizes: Sizes) -> dict[str, Any]:
    found = {
        "sliding_window": contents.key(".attention.sliding_window", int),
        "query_pre_attn_scalar": _attention_scale(sizes, 62),
        "layer_types": _layer_types(contents, sizes),
    }
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if contents.has_key(f".{key}"):
            found[key] = contents.key(f".{key}", float)
    return found


def _layer_types(contents: Contents, sizes: Sizes) -> list[str]:
    """One flag for each layer, or every how many layers one sees everything: six where the file says nothing."""
    flags = contents.value(".attention.sliding_window_pattern")
    if not isinstance(flags, list):
        every = contents.key(".attention.sliding_window_pattern", int, 6)
        flags = [(layer + 1) % every != 0 for layer in range(sizes.layers)]
    if len(flags) != sizes.layers or not all(isinstance(flag, bool) for flag in flags):
        raise contents.error(
            f"key {contents.full_key('.attention.sliding_window_pattern')} must be one int, or {sizes.layers} bools"
        )
    return ["sliding_attention" if flag else "full_attention" for flag in flags]


def _phi3(contents: Contents, sizes: Sizes) -> dict[str, Any]:
    # 0 says that there is no window, as in Phi-4; files without the key are from before llama.cpp knew of windows.
    window = contents.value(".attention.sliding_window")
    return {
        "sliding_window": None if window == 0 else contents.key(".attention.sliding_window", int),
        "original_max_position_embeddings": contents.key(".rope.scaling.original_context_length", int, sizes.context),
    }


ARCHITECTURES = {
    "llama": Architecture(
        "Llama", "LlamaConfig", _SEPARATE | _TWO_NORMS, rope_base=10000.0, permuted=True, biases="optional"
    ),
    "smollm3": Architecture(
        # Every fourth layer has no positions, which no key says and Transformers' config takes for granted.
        "SmolLM3",
        "SmolLM3Config",
        _SEPARATE | _TWO_NORMS,
        permuted=True,
        biases="optional",
        head_dim_in_config=False,
    ),
    "qwen2": Architecture("Qwen2", "Qwen2Config", _SEPARATE | _TWO_NORMS, biases="qkv", head_dim_in_config=False),
    "qwen3": Architecture("Qwen3", "Qwen3Config", _SEPARATE | _TWO_NORMS | _HEAD_NORMS),
    "gemma": Architecture(
        "Gemma", "GemmaConfig", _SEPARATE | _TWO_NORMS, rope_base=10000.0, norms_plus_one=True, always_tied=True
    ),
    "gemma2": Architecture(
        "Gemma2",
        "Gemma2Config",
        _SEPARATE | _FOUR_NORMS,
        rope_base=10000.0,
        own=_gemma2,
        norms_plus_one=True,
        always_tied=True,
    ),
    "gemma3": Architecture(
        "Gemma3",
        "Gemma3TextConfig",
        _SEPARATE | _FOUR_NORMS | _HEAD_NORMS,
        rope=rope_of_two_kinds_of_layers,
        own=_gemma3,
        norms_plus_one=True,
    ),
    "phi3": Architecture(
        "Phi3", "Phi3Config", _MERGED | _TWO_NORMS, rope=rope_with_factors, own=_phi3, head_dim_in_config=False
    ),
}
"""By `general.architecture`. Mistral, SmolLM and SmolLM2 are "llama" too, Qwen2.5 is "qwen2", Phi-4 is "phi3"."""
