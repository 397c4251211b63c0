"""Decoding with a whole model: with 4-bit weights on qops operators, and Transformers' own with the same weights dense.

A step is what ``generate`` does for a token, without what it does on the host: embedding, layers, norm, output layer
and the most likely token, which the next step starts from. Keys and values stand in tensors of fixed size, in which
every step writes the last position again, so that a CUDA graph can hold a step and all of them cost the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import qops
from bench.peers.providers import OURS, Provider
from bench.problems import Result
from bench.problems.models import EPS, ROPE_THETA, Int4Decode
from qops.model import build_model, dense_model

REQUIRES = ("transformers",)


class Weights:
    """The problem's as a checkpoint that ``qops.load_model`` could be reading."""

    def __init__(self, p: Int4Decode) -> None:
        from transformers import LlamaConfig

        sizes = p.sizes
        self.config = LlamaConfig(
            vocab_size=sizes["V"],
            hidden_size=sizes["H"],
            intermediate_size=sizes["I"],
            num_hidden_layers=sizes["L"],
            num_attention_heads=sizes["Hq"],
            num_key_value_heads=sizes["Hk"],
            head_dim=sizes["D"],
            max_position_embeddings=sizes["C"] + 1,
            rms_norm_eps=EPS,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
        )
        self._dense = {"model.embed_tokens": p.table, "model.norm": p.norm, "lm_head": p.head}
        self._layers = p.layers

    def weight(self, name: str) -> Tensor | qops.Int4Weight:
        if name in self._dense:
            return self._dense[name]
        index, _, part = name.removeprefix("model.layers.").partition(".")
        layer = self._layers[int(index)]
        if part in layer.norms:
            return layer.norms[part]
        return qops.Int4Weight.from_canonical(*layer.linears[part], kind="symmetric", pack=False)

    def kind(self, name: str) -> str:
        return "int4"

    def bias(self, name: str) -> None:
        return None


class Cache:
    """Keys and values [M, Hk, context + 1, D] of every layer; what is new is always the last of them."""

    def __init__(self, p: Int4Decode) -> None:
        def longer(tensor: Tensor) -> Tensor:
            return torch.cat((tensor, torch.zeros_like(tensor[:, :, :1])), dim=2)

        self._layers = [(longer(layer.keys), longer(layer.values)) for layer in p.layers]

    def update(self, key: Tensor, value: Tensor, layer: int, **_: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._layers[layer]
        keys[:, :, -1:].copy_(key)
        values[:, :, -1:].copy_(value)
        return keys, values


def steps(model: Any, p: Int4Decode) -> Callable[[], Result]:
    """The next step of each call."""
    from qops.decoder import cache_keyword

    decoder, cache, ids = model.model, Cache(p), p.ids[:, None].clone()
    keyword = cache_keyword(type(decoder))
    assert keyword is not None
    positions = torch.full((1, 1), p.sizes["C"], device=p.device)

    def call() -> Tensor:
        hidden = decoder.embed_tokens(ids)
        tables = decoder.rotary_emb(hidden, position_ids=positions)
        for layer in decoder.layers:
            hidden = layer(
                hidden,
                attention_mask=None,
                position_ids=positions,
                **{keyword: cache},
                use_cache=True,
                position_embeddings=tables,
            )
        logits = model.lm_head(decoder.norm(hidden))[:, 0]
        ids.copy_(logits.argmax(-1, keepdim=True))
        return logits

    return call


def int4_model(p: Int4Decode) -> Any:
    # Its results are compared with the dense model's before anything is timed.
    return build_model(Weights(p), p.dtype, p.device, prove=False)


def int4_decode(p: Int4Decode) -> Callable[[], Result]:
    return steps(int4_model(p), p)


def dense_decode(p: Int4Decode) -> Callable[[], Result]:
    return steps(dense_model(int4_model(p), p.dtype), p)


PROVIDERS = [
    Provider(OURS, "int4_decode", ("cpu", "cuda"), int4_decode, "exact weights, fp32 sums", REQUIRES),
    *(
        Provider(
            f"{library} F.linear, transformers",
            "int4_decode",
            (device,),
            dense_decode,
            "weights rounded to 16 bits",
            REQUIRES,
            weight_bits=16,
        )
        for device, library in (("cpu", "onednn"), ("cuda", "cublas"))
    ),
]
