"""What tests of the demo share: a tokenizer of bytes and a tiny model folder, as `--model` takes it."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qops.models import Int4, quantize_model, save_model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over ASCII with one merge, in the class a saved GGUF tokenizer comes back as."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, [("h", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        chat_template="{% for m in messages %}{{ bos_token + m['role'] + ' ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ bos_token }}{% endif %}",
    )


def write_folder(path: Path, tokenizer: PreTrainedTokenizerFast, scheme: str = "int4") -> Path:
    """A tiny random model of 128 positions that never ends an answer by itself, quantised, with its tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.inference_mode(False):
        model = quantize_model(LlamaForCausalLM(config), Int4(32) if scheme == "int4" else scheme)
    save_model(model, path)
    tokenizer.save_pretrained(path)
    return path
