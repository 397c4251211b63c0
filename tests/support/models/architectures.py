"""Tiny models of many classes of Transformers: with and without a head, generation, tokens, an encoder, a router."""

from __future__ import annotations

from typing import Any

import torch
import transformers

TOKENS = torch.tensor([[1, 5, 9, 33, 7, 3]])
DECODER = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
ENCODER = {
    key: DECODER[key]
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
} | {"max_position_embeddings": 64, "pad_token_id": 0}
VISION = {key: ENCODER[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
VISION |= {"image_size": 32, "patch_size": 8}
BOTH = {
    "vocab_size": 96,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
T5 = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
WHISPER = {
    "num_mel_bins": 16,
    "max_source_positions": 8,
    "max_target_positions": 32,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
IMAGE = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
PAIR = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
SOUND = {"input_features": torch.linspace(-1, 1, 16 * 16).view(1, 16, 16), "decoder_input_ids": TOKENS}

# Class -> config class, what it takes, inputs.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], dict[str, torch.Tensor]]] = {
    "LlamaForCausalLM": ("LlamaConfig", DECODER, {"input_ids": TOKENS}),
    "LlamaModel": ("LlamaConfig", DECODER, {"input_ids": TOKENS}),
    "LlamaForSequenceClassification": ("LlamaConfig", DECODER | {"num_labels": 8}, {"input_ids": TOKENS}),
    "LlamaForTokenClassification": ("LlamaConfig", DECODER | {"num_labels": 8}, {"input_ids": TOKENS}),
    "Phi3ForCausalLM": ("Phi3Config", DECODER, {"input_ids": TOKENS}),
    # Routers that derive from nn.Linear.
    "Llama4ForCausalLM": (
        "Llama4TextConfig",
        DECODER | {"intermediate_size_mlp": 128, "num_local_experts": 4, "head_dim": 16},
        {"input_ids": TOKENS},
    ),
    "PhimoeForCausalLM": ("PhimoeConfig", DECODER | {"num_local_experts": 4}, {"input_ids": TOKENS}),
    "BertForMaskedLM": ("BertConfig", ENCODER, {"input_ids": TOKENS}),
    "BertModel": ("BertConfig", ENCODER, {"input_ids": TOKENS}),
    "RobertaForSequenceClassification": ("RobertaConfig", ENCODER | {"num_labels": 8}, {"input_ids": TOKENS}),
    "AlbertForMaskedLM": ("AlbertConfig", ENCODER | {"embedding_size": 32}, {"input_ids": TOKENS}),
    "T5ForConditionalGeneration": ("T5Config", T5, PAIR),
    "T5EncoderModel": ("T5Config", T5, {"input_ids": TOKENS}),
    "BartForConditionalGeneration": ("BartConfig", BOTH | {"max_position_embeddings": 64}, PAIR),
    # Its encoder and decoder have embeddings of their own, tied to a third.
    "MarianMTModel": ("MarianConfig", BOTH | {"max_position_embeddings": 64}, PAIR),
    "WhisperForConditionalGeneration": ("WhisperConfig", BOTH | WHISPER, SOUND),
    "ViTModel": ("ViTConfig", VISION, {"pixel_values": IMAGE}),
    "ViTForImageClassification": ("ViTConfig", VISION | {"num_labels": 8}, {"pixel_values": IMAGE}),
    "LlavaForConditionalGeneration": (
        "LlavaConfig",
        {
            "text_config": DECODER | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model"},
            "image_token_index": 95,
        },
        {"input_ids": TOKENS},
    ),
}


def tiny_model(name: str, seed: int = 0) -> Any:
    """A random model of the class; vectors are random too, so that a bias or a norm that is lost shows."""
    config, sizes, _ = ARCHITECTURES[name]
    torch.manual_seed(seed)
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def outputs(model: Any, name: str) -> torch.Tensor:
    """Logits, or the last hidden state."""
    return model(**ARCHITECTURES[name][2])[0]
