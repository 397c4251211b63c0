"""A GGUF file as a checkpoint.

llama.cpp stores the rows of attn_q and attn_k of some architectures so that its rotary pairs neighbours;
`unpermute_rows` restores the halves that Transformers pairs, on the blocks, so nothing is requantised.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from qops.formats._transformers import require_transformers
from qops.formats.checkpoint import Facts, Weight
from qops.formats.gguf.architectures import ARCHITECTURES, TOP_LEVEL, Sizes
from qops.formats.gguf.blocks import BLOCK_TYPES, dequantize, facts, int4_weight, int8_weight
from qops.formats.gguf.contents import Contents
from qops.nn import Int4Linear, Int8WeightOnlyLinear, QuantizedLinear


def unpermute_rows(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes llama.cpp's permutation of the rows of attn_q and attn_k.

    Stored row 2 i + j of a head with D rows is row i + j D/2 of the Transformers weight (i < D/2, j in {0, 1}).

    Args:
        rows: [heads * D, ...]: blocks, dense rows or a bias.
        heads: query heads for attn_q, key/value heads for attn_k.

    Returns:
        A tensor of the same shape.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(rows.shape)


class GGUFFile:
    """A GGUF file as a :class:`qops.formats.Checkpoint`, checked as a whole before any weight is built.

    Weights come in Transformers' row order; those of N rows that are no multiple of 8 come dense, dequantised to
    float32, because no kernel takes them.

    Args:
        path: of the file.

    Attributes:
        config: of Transformers.
        dtype: that of the file's dense matrices: float16 or bfloat16 where they all have this type or that; float32
            where one is F32, or where there are both; bfloat16 where there are none. Vectors, which are always F32,
            say nothing.
        format: "GGUF".
        fuses: True.
        generation_config: None.
        names: of all parameters.
        path: of the file.

    Raises:
        ImportError: the `gguf` package or a supported Transformers is missing.
        ValueError: another architecture, a mixture of experts, a missing, unknown or malformed key, a missing, unknown,
            misshapen or unsupported tensor, a part of a split file, a truncated or otherwise malformed file. The
            message names the file and what was expected.
    """

    format = "GGUF"
    fuses = True
    generation_config = None

    def __init__(self, path: str | os.PathLike[str]):
        require_transformers("qops.formats.gguf")
        self.path = Path(path)
        self._contents = contents = Contents(self.path)
        if (parts := contents.value("split.count") or 1) != 1:
            raise contents.error(f"is one part of {parts}: llama-gguf-split --merge makes one file of them")
        experts = contents.value(".expert_count") or next((name for name in contents.names() if "_exps." in name), None)
        if experts:
            raise contents.error(f"mixtures of experts are not supported, got {experts}")
        if contents.architecture not in ARCHITECTURES:
            raise contents.error(
                f"general.architecture must be one of {', '.join(ARCHITECTURES)}, got '{contents.architecture}'"
            )
        self._architecture = ARCHITECTURES[contents.architecture]
        self._sizes = self._read_sizes()
        self.names: list[str] = []
        # First: a config of an absurd number of layers would list them all.
        self._check_tensors()
        self.config = self._read_config()
        contents.refuse_the_rest()
        self.dtype = self._read_dtype()

    def holds(self, name: str) -> bool:
        return self._contents.holds(self._stored_name(name))

    def linear(self, module: str) -> type[QuantizedLinear] | None:
        stored = self._stored_name(f"{module}.weight")
        block_type = BLOCK_TYPES.get(self._contents.kind(stored))
        if block_type is None or self._contents.shape(stored)[0] % 8:
            return None
        return Int4Linear if block_type.bits == 4 else Int8WeightOnlyLinear

    def kind(self, module: str) -> str:
        """As GGUF calls it, e.g. "Q4_1"."""
        return self._contents.kind(self._stored_name(f"{module}.weight"))

    def describe(self, name: str) -> Facts:
        stored, contents = self._stored_name(name), self._contents
        kind, shape, size = contents.kind(stored), tuple(contents.shape(stored)), contents.size_bytes(stored)
        if kind not in BLOCK_TYPES:
            return Facts(kind, shape, size)
        if self.linear(name.removesuffix(".weight")) is None:
            return Facts(kind, shape, size, why_dense=f"N = {shape[0]} is no multiple of 8")
        return Facts(kind, shape, size, facts(kind))

    def weight(self, module: str) -> Weight:
        stored = self._stored_name(f"{module}.weight")
        rows, kind = self._rows(stored), self.kind(module)
        if kind not in BLOCK_TYPES:
            return rows
        try:
            if self.linear(module) is None:
                return dequantize(rows, kind)
            return (int4_weight if BLOCK_TYPES[kind].bits == 4 else int8_weight)(rows, kind, pack=False)
        except ValueError as error:
            raise self._contents.error(f"tensor {stored}: {error}") from error

    def activations(self, module: str) -> dict[str, torch.Tensor]:
        """Nothing: GGUF stores weights alone."""
        return {}

    def tensor(self, name: str) -> torch.Tensor:
        if not self.holds(name):
            raise self._contents.error(f"tensor {name} is missing")
        stored = self._stored_name(name)
        rows, kind = self._rows(stored), self._contents.kind(stored)
        return dequantize(rows, kind) if kind in BLOCK_TYPES else rows

    def finish(self, model: Any) -> None:
        """Nothing is left: that every tensor of the file has a place was checked when it was opened."""

    def _rows(self, stored: str) -> torch.Tensor:
        """A tensor's rows as Transformers has them: blocks of a quantised tensor, values of a dense one."""
        rows = self._contents.rows(stored)
        if self._architecture.permuted and ".attn_q." in stored:
            return unpermute_rows(rows, self._sizes.heads)
        if self._architecture.permuted and ".attn_k." in stored:
            return unpermute_rows(rows, self._sizes.key_value_heads)
        if self._architecture.norms_plus_one and stored.endswith("_norm.weight"):
            # Of the sums that a converter makes of 16-bit norms, 1 plus the difference is the stored number again.
            return rows.float() - 1
        return rows

    def _stored_name(self, name: str) -> str:
        """GGUF's name of a tensor of Transformers' model; the name itself where GGUF has none for it."""
        module, _, key = name.rpartition(".")
        if module in TOP_LEVEL:
            return f"{TOP_LEVEL[module]}.{key}"
        layer, _, rest = module.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{self._architecture.layer[rest][0]}.{key}" if rest in self._architecture.layer else name

    def _read_sizes(self) -> Sizes:
        contents = self._contents
        if not contents.holds("token_embd.weight"):
            raise contents.error("tensor token_embd.weight is missing")
        hidden = contents.key(".embedding_length", int)
        heads = contents.key(".attention.head_count", int)
        key_value_heads = contents.key(".attention.head_count_kv", int, heads)
        if hidden % heads or heads % key_value_heads:
            keys = (".embedding_length", ".attention.head_count", ".attention.head_count_kv")
            raise contents.error(
                f"keys {', '.join(map(contents.full_key, keys))} must divide one another, "
                f"got {hidden}, {heads}, {key_value_heads}"
            )
        head_dim = contents.key(".attention.key_length", int, hidden // heads)
        same = [".attention.value_length"]
        if "self_attn.qkv_proj" not in self._architecture.layer:  # Phi-3 may turn a part of each head
            same.append(".rope.dimension_count")
        for key in same:
            if contents.key(key, int, head_dim) != head_dim:
                raise contents.error(
                    f"key {contents.full_key(key)} must equal the head dimension {head_dim}, "
                    f"got {contents.key(key, int)}"
                )
        if not self._architecture.head_dim_in_config and head_dim != hidden // heads:
            raise contents.error(
                f"key {contents.full_key('.attention.key_length')} must be {hidden // heads}, the hidden size over the "
                f"heads, as in every {self._architecture.prefix} model of Transformers, got {head_dim}"
            )
        if head_dim % 2:
            raise contents.error(f"the head dimension must be even, got {head_dim}")
        return Sizes(
            layers=contents.key(".block_count", int),
            hidden=hidden,
            wide=contents.key(".feed_forward_length", int),
            heads=heads,
            key_value_heads=key_value_heads,
            head_dim=head_dim,
            context=contents.key(".context_length", int),
        )

    def _read_config(self) -> Any:
        import transformers

        contents, architecture, sizes = self._contents, self._architecture, self._sizes
        vocab_size = self._vocab_size()
        arguments: dict[str, Any] = {
            "vocab_size": vocab_size,
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.wide,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.key_value_heads,
            "max_position_embeddings": sizes.context,
            "rms_norm_eps": contents.key(".attention.layer_norm_rms_epsilon", float),
            "rope_parameters": architecture.rope(contents, sizes, architecture.rope_base),
            "tie_word_embeddings": self._is_tied(),
            "bos_token_id": contents.token_id("bos", vocab_size),
            "eos_token_id": self._ends(vocab_size),
            "pad_token_id": contents.token_id("padding", vocab_size),
            "architectures": [f"{architecture.prefix}ForCausalLM"],
        }
        if architecture.head_dim_in_config:
            arguments["head_dim"] = sizes.head_dim
        if architecture.biases == "optional":
            arguments["attention_bias"] = self._has_bias("self_attn.q_proj")
            arguments["mlp_bias"] = self._has_bias("mlp.gate_proj")
        return getattr(transformers, architecture.config)(**arguments, **architecture.own(contents, sizes))

    def _ends(self, vocab_size: int) -> int | list[int] | None:
        """What ends a text; and what ends a turn, where that is another token, as llama.cpp takes it too."""
        text, turn = (self._contents.token_id(token, vocab_size) for token in ("eos", "eot"))
        if text is None or turn is None or text == turn:
            return turn if text is None else text
        return [text, turn]

    def _vocab_size(self) -> int:
        return self._contents.key(".vocab_size", int, self._contents.shape("token_embd.weight")[0])

    def _is_tied(self) -> bool:
        return self._architecture.always_tied or not self._contents.holds("output.weight")

    def _has_bias(self, module: str) -> bool:
        if self._architecture.biases == "qkv":
            return module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        if self._architecture.biases == "optional" and module.endswith("_proj"):
            return self._contents.holds(f"blk.0.{'ffn_gate' if module.startswith('mlp.') else 'attn_q'}.bias")
        return False

    def _check_tensors(self) -> None:
        """Every tensor that the model has is there with its shape and a supported type."""
        sizes = self._sizes
        self._check("model.embed_tokens.weight", [self._vocab_size(), sizes.hidden])
        self._check("model.norm.weight", [sizes.hidden])
        if not self._is_tied():
            self._check("lm_head.weight", [self._vocab_size(), sizes.hidden])
        # The first missing tensor ends the loop: an absurd block_count cannot make it run long.
        for index in range(sizes.layers):
            for module, (_, letters) in self._architecture.layer.items():
                self._check(f"model.layers.{index}.{module}.weight", sizes.shape(letters))
                if self._has_bias(module):
                    self._check(f"model.layers.{index}.{module}.bias", sizes.shape(letters)[:1])

    def _check(self, name: str, shape: list[int]) -> None:
        self._contents.check_tensor(self._stored_name(name), shape)
        self.names.append(name)

    def _read_dtype(self) -> torch.dtype:
        matrices = [name for name in self._contents.names() if len(self._contents.shape(name)) == 2]
        kinds = {self._contents.kind(name) for name in matrices} - set(BLOCK_TYPES)
        if not kinds <= {"F16"} and not kinds <= {"BF16"}:
            return torch.float32
        return torch.float16 if "F16" in kinds else torch.bfloat16
