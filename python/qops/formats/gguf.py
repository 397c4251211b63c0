"""GGUF files of the Llama family, read exactly (blocks: `qops/weights/gguf.py`).

llama.cpp stores the rows of attn_q and attn_k so that its rotary pairs
neighbours; `unpermute_rows` restores the halves that Transformers pairs, on the blocks, so nothing is requantised.

The PyPI package `gguf` parses the container. It trusts its input, so this module bounds every read by the file's
size: a truncated or hostile file is a ValueError, never a hang or a short tensor.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qops.formats._transformers import require_transformers
from qops.formats.checkpoint import Weight
from qops.nn import Int4Linear, Int8WeightOnlyLinear, QuantizedLinear

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderField
    from transformers import LlamaConfig, PreTrainedTokenizerBase

__all__ = ["GGUFFile", "load_tokenizer", "unpermute_rows"]

DENSE_TYPES = ("F32", "F16", "BF16")
LINEARS: dict[str, type[QuantizedLinear]] = {
    "Q4_0": Int4Linear,
    "Q4_1": Int4Linear,
    "Q8_0": Int8WeightOnlyLinear,
}
_MAX_FLOAT = torch.finfo(torch.float32).max

_TOP_LEVEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


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
    """A Llama-family GGUF file as a :class:`qops.formats.Checkpoint`, checked as a whole before any weight is built.

    Weights come in Transformers' row order.

    Args:
        path: of the file.

    Attributes:
        config: the model's `LlamaConfig`.
        dtype: bfloat16.
        fuses: True.
        generation_config: None.
        path: of the file.

    Raises:
        ImportError: the `gguf` package or a supported Transformers is missing.
        ValueError: another architecture, a missing or malformed key, a missing, unknown, misshapen or unsupported
            tensor, a truncated or otherwise malformed file. The message names the file and what was expected.
    """

    dtype = torch.bfloat16
    fuses = True
    generation_config = None

    def __init__(self, path: str | os.PathLike[str]):
        require_transformers("qops.formats.gguf")
        self.path = Path(path)
        reader = _read_container(self.path)
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        architecture = self._key("general.architecture", str)
        if architecture != "llama":
            raise self._error(f"general.architecture must be 'llama', got '{architecture}'")
        self._expected_shapes: dict[str, list[int]] = {}
        self.config = self._read_config()
        self._check_tensors()

    def holds(self, name: str) -> bool:
        return self._stored_name(name) in self._tensors

    def linear(self, module: str) -> type[QuantizedLinear] | None:
        return LINEARS.get(self.kind(module))

    def kind(self, module: str) -> str:
        """As GGUF calls it, e.g. "Q4_1"."""
        return self._tensors[self._stored_name(f"{module}.weight")].tensor_type.name

    def weight(self, module: str) -> Weight:
        linear, stored = self.linear(module), self._stored_name(f"{module}.weight")
        rows = self._rows(stored)
        if linear is None:
            return rows
        weight_class: Any = linear.weight_class
        try:
            return weight_class.from_gguf(rows, self.kind(module), pack=False)
        except ValueError as error:
            raise self._error(f"tensor {stored}: {error}") from error

    def activations(self, module: str) -> dict[str, torch.Tensor]:
        """Nothing: GGUF stores weights alone."""
        return {}

    def tensor(self, name: str) -> torch.Tensor:
        if not self.holds(name):
            raise self._error(f"tensor {name} is missing")
        return self._rows(self._stored_name(name))

    def finish(self, model: Any) -> None:
        """Nothing is left: that every tensor of the file has a place was checked when it was opened."""

    def _rows(self, stored: str) -> torch.Tensor:
        """A tensor's rows in Transformers' order: blocks of a quantised tensor, values of a dense one."""
        tensor = self._tensors[stored]
        rows = torch.from_numpy(tensor.data.copy())
        if tensor.tensor_type.name == "BF16":
            rows = rows.view(torch.bfloat16)
        if ".attn_q." in stored:
            return unpermute_rows(rows, self.config.num_attention_heads)
        if ".attn_k." in stored:
            assert self.config.num_key_value_heads is not None
            return unpermute_rows(rows, self.config.num_key_value_heads)
        return rows

    def _stored_name(self, name: str) -> str:
        """GGUF's name of a tensor of Transformers' model; the name itself where GGUF has none for it."""
        module, _, key = name.rpartition(".")
        if module in _TOP_LEVEL:
            return f"{_TOP_LEVEL[module]}.{key}"
        layer, _, rest = module.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{_IN_LAYER[rest]}.{key}" if rest in _IN_LAYER else name

    def _error(self, message: str) -> ValueError:
        return ValueError(f"{self.path}: {message}")

    def _key(self, key: str, kind: type, default: Any = None) -> Any:
        """Metadata value `key` as `kind`; numbers must be positive, except token ids, where 0 is a token."""
        field = self._fields.get(key)
        if field is None:
            if default is None:
                raise self._error(f"key {key} is missing")
            return default
        value = self._contents(field)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool):
            shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."
            raise self._error(f"key {key} must be one {kind.__name__}, got {shown}")
        if kind is not str and not value > 0 and not key.endswith("_token_id"):
            raise self._error(f"key {key} must be positive, got {value}")
        if kind is float and value > _MAX_FLOAT:
            raise self._error(f"key {key} must be finite in float32, got {value}")
        return value

    def _contents(self, field: ReaderField) -> Any:
        try:
            return field.contents()
        except ValueError as error:  # a string that is not UTF-8
            raise self._error(f"key {field.name}: {error}") from error

    def _token_id(self, token: str, vocab_size: int) -> int | None:
        key = f"tokenizer.ggml.{token}_token_id"
        if key not in self._fields:
            return None
        value = self._key(key, int)
        if not 0 <= value < vocab_size:
            raise self._error(f"key {key} must be below the vocabulary size {vocab_size}, got {value}")
        return value

    def _read_config(self) -> LlamaConfig:
        from transformers import LlamaConfig

        if "llama.expert_count" in self._fields and self._contents(self._fields["llama.expert_count"]):
            raise self._error("key llama.expert_count: mixtures of experts are not supported")
        if "token_embd.weight" not in self._tensors:
            raise self._error("tensor token_embd.weight is missing")
        hidden = self._key("llama.embedding_length", int)
        heads = self._key("llama.attention.head_count", int)
        key_value_heads = self._key("llama.attention.head_count_kv", int, heads)
        if hidden % heads or heads % key_value_heads:
            raise self._error(
                f"keys llama.embedding_length, llama.attention.head_count and llama.attention.head_count_kv must "
                f"divide one another, got {hidden}, {heads}, {key_value_heads}"
            )
        head_dim = self._key("llama.attention.key_length", int, hidden // heads)
        for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if self._key(key, int, head_dim) != head_dim:
                raise self._error(f"key {key} must equal the head dimension {head_dim}, got {self._key(key, int)}")
        if head_dim % 2:
            raise self._error(f"the head dimension must be even, got {head_dim}")
        context = self._key("llama.context_length", int)
        vocab_size = self._key("llama.vocab_size", int, int(self._tensors["token_embd.weight"].shape[-1]))
        return LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=self._key("llama.feed_forward_length", int),
            num_hidden_layers=self._key("llama.block_count", int),
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            head_dim=head_dim,
            max_position_embeddings=context,
            rms_norm_eps=self._key("llama.attention.layer_norm_rms_epsilon", float),
            rope_parameters=self._read_rope(head_dim, context),
            tie_word_embeddings="output.weight" not in self._tensors,
            attention_bias="blk.0.attn_q.bias" in self._tensors,
            mlp_bias="blk.0.ffn_gate.bias" in self._tensors,
            bos_token_id=self._token_id("bos", vocab_size),
            eos_token_id=self._token_id("eos", vocab_size),
            pad_token_id=self._token_id("padding", vocab_size),
            architectures=["LlamaForCausalLM"],
        )

    def _read_rope(self, head_dim: int, context: int) -> dict[str, Any]:
        rope: dict[str, Any] = {
            "rope_type": "default",
            "rope_theta": self._key("llama.rope.freq_base", float, 10000.0),
        }
        scaling = self._key("llama.rope.scaling.type", str, "none")
        if scaling == "linear":
            rope |= {"rope_type": "linear", "factor": self._key("llama.rope.scaling.factor", float)}
        elif scaling != "none":
            raise self._error(f"key llama.rope.scaling.type must be 'none' or 'linear', got '{scaling}'")
        if "rope_freqs.weight" in self._tensors:
            if scaling != "none":
                raise self._error("tensor rope_freqs.weight together with llama.rope.scaling.type is not supported")
            # Llama 3 files carry one divisor per frequency instead of the formula behind it. Transformers' longrope
            # with equal short and long factors divides by exactly these numbers.
            self._expected_shapes["rope_freqs.weight"] = [head_dim // 2]
            self._check_tensor("rope_freqs.weight")
            divisors = self._rows("rope_freqs.weight").tolist()
            if not all(0 < divisor <= _MAX_FLOAT for divisor in divisors):
                raise self._error(f"tensor rope_freqs.weight must hold positive finite numbers, got {divisors}")
            rope |= {
                "rope_type": "longrope",
                "short_factor": divisors,
                "long_factor": divisors,
                "factor": 1.0,
                "attention_factor": 1.0,
                "original_max_position_embeddings": context,
            }
        return rope

    def _check_tensors(self) -> None:
        """Every tensor that the config asks for is there with its shape and a supported type, and no other is."""
        config = self.config
        hidden, wide = config.hidden_size, config.intermediate_size
        assert config.head_dim is not None and config.num_key_value_heads is not None
        query, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self._expect("model.embed_tokens", [config.vocab_size, hidden])
        self._expect("model.norm", [hidden])
        if not config.tie_word_embeddings:
            self._expect("lm_head", [config.vocab_size, hidden])
        # The first missing tensor ends the loop: an absurd block_count cannot make it run long.
        for index in range(config.num_hidden_layers):
            layer = f"model.layers.{index}"
            self._expect(f"{layer}.input_layernorm", [hidden])
            self._expect(f"{layer}.self_attn.q_proj", [query, hidden], config.attention_bias)
            self._expect(f"{layer}.self_attn.k_proj", [key_value, hidden], config.attention_bias)
            self._expect(f"{layer}.self_attn.v_proj", [key_value, hidden], config.attention_bias)
            self._expect(f"{layer}.self_attn.o_proj", [hidden, query], config.attention_bias)
            self._expect(f"{layer}.post_attention_layernorm", [hidden])
            self._expect(f"{layer}.mlp.gate_proj", [wide, hidden], config.mlp_bias)
            self._expect(f"{layer}.mlp.up_proj", [wide, hidden], config.mlp_bias)
            self._expect(f"{layer}.mlp.down_proj", [hidden, wide], config.mlp_bias)
        unknown = sorted(set(self._tensors) - set(self._expected_shapes))
        if unknown:
            raise self._error(f"unknown tensors: {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}")

    def _expect(self, name: str, shape: list[int], bias: bool = False) -> None:
        for key, extent in {"weight": shape, **({"bias": shape[:1]} if bias else {})}.items():
            stored = self._stored_name(f"{name}.{key}")
            self._expected_shapes[stored] = extent
            self._check_tensor(stored)

    def _check_tensor(self, stored: str) -> None:
        if stored not in self._tensors:
            raise self._error(f"tensor {stored} is missing")
        tensor, shape = self._tensors[stored], self._expected_shapes[stored]
        kind = tensor.tensor_type.name
        found = [int(extent) for extent in reversed(tensor.shape)]
        if found != shape:
            raise self._error(f"tensor {stored} must have shape {shape}, got {found}")
        supported = (*LINEARS, *DENSE_TYPES) if len(shape) == 2 else DENSE_TYPES
        if kind not in supported:
            raise self._error(f"tensor {stored} has type {kind}, supported are {', '.join(supported)}")


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer stored in a GGUF file, chat template included, through Transformers' own reader.

    Args:
        path: of the file.

    Returns:
        A Transformers tokenizer whose special tokens are those of the file.

    Raises:
        ImportError: as :class:`GGUFFile`.
        ValueError: the container is malformed, holds no tokenizer, or one whose special tokens are no tokens.
    """
    require_transformers("qops.formats.gguf")
    from transformers import AutoTokenizer

    path = Path(path)
    fields = _read_container(path).fields
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # whatever its conversion code stumbles over: the file is at fault, and named
        raise ValueError(f"{path}: Transformers finds no tokenizer in it: {error!r}") from error
    # Transformers 5.17 takes the begin-of-sequence token for the end-of-sequence token, so the file has the last word.
    for stored, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        field = fields.get(f"tokenizer.ggml.{stored}_token_id")
        if field is None:
            continue
        try:
            value = field.contents()
            if value == getattr(tokenizer, f"{name}_token_id"):
                continue
            token = tokenizer.convert_ids_to_tokens(value)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{path}: key {field.name} must be the id of a token: {error}") from error
        if not isinstance(token, str):
            raise ValueError(f"{path}: key {field.name} must be the id of a token, got {value}")
        setattr(tokenizer, f"{name}_token", token)
    return tokenizer


# Arrays that are longer hold a vocabulary, which nothing here reads.
_LONGEST_ARRAY = 64


def _read_container(path: Path) -> GGUFReader:
    """Parses the container with `gguf`, whose every read is kept inside the file, without long arrays."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError("reading GGUF files needs the gguf package: pip install 'qops[demo]'") from error
    import numpy

    kinds = gguf.GGUFValueType

    class BoundedReader(gguf.GGUFReader):
        def _get(self, offset: Any, dtype: Any, count: Any = 1, *rest: Any, **named: Any) -> Any:
            # numpy cuts a slice at the file's end without a word, so gguf would spin through a huge array of
            # nothing; refusing the read ends the loop at the file's last byte.
            self._check_end(int(offset) + int(count) * numpy.dtype(dtype).itemsize)
            return super()._get(offset, dtype, count, *rest, **named)

        def _check_end(self, end: int) -> None:
            if end > len(self.data):
                raise ValueError(f"truncated: {end} bytes expected, the file has {len(self.data)}")

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            # gguf keeps an object for each token and merge: 2.2 s for a vocabulary of 49152, 0.1 s without.
            if raw_type != kinds.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            item = kinds(int(self._get(orig_offs, numpy.uint32)[0]))
            length = int(self._get(orig_offs + 4, numpy.uint64)[0])
            if length <= _LONGEST_ARRAY or item == kinds.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            end = orig_offs + 12
            if item == kinds.STRING:
                read_size = struct.Struct("<Q" if self.byte_order == "I" else ">Q").unpack_from
                for _ in range(length):
                    end += 8 + read_size(self.data, end)[0]  # pyright: ignore[reportArgumentType]
            else:
                end += length * numpy.dtype(self.gguf_scalar_to_np[item]).itemsize
            self._check_end(end)
            return end - orig_offs, [], [], [kinds.ARRAY, item]

        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            if self.byte_order != "I":
                raise ValueError("byte order differs from this machine's")
            found: dict[str, Any] = {}
            for field in fields:
                # gguf adds in uint64, which would wrap into the file again.
                if int(field.parts[-1][0]) > len(self.data):
                    raise ValueError(f"tensor {field.name}: offset {int(field.parts[-1][0])} is past the file's end")
                try:
                    super()._build_tensors(start_offs, [field])
                except ValueError as error:
                    raise ValueError(f"tensor {field.name}: {error}") from error
                if field.name in found:
                    raise ValueError(f"tensor {field.name} is stored twice")
                found[field.name] = self.tensors[0]
            self.tensors = list(found.values())

    try:
        return BoundedReader(path)
    except OSError:
        raise
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError, struct.error) as error:
        raise ValueError(f"{path}: not a readable GGUF file: {error}") from error
