"""Small random models of every family that quantize_model knows, as a whole or in part, and of one it does not know."""

from __future__ import annotations

import torch
import transformers

VOCAB = 72
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 4}
# Family -> class prefix, config class, and what makes it differ from Llama.
FUSED = {
    "llama": ("Llama", "LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", "MistralConfig", WINDOW),
    "phi3": ("Phi3", "Phi3Config", {"partial_rotary_factor": 0.5, **WINDOW}),
    "qwen2": ("Qwen2", "Qwen2Config", {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}),
    "qwen3": ("Qwen3", "Qwen3Config", {"head_dim": 24}),
    "smollm3": ("SmolLM3", "SmolLM3Config", {"no_rope_layer_interval": 2}),
    "gemma": ("Gemma", "GemmaConfig", {"head_dim": 16}),
    "gemma2": ("Gemma2", "Gemma2Config", {"head_dim": 16, "query_pre_attn_scalar": 24, **WINDOW}),
    "gemma3": (
        "Gemma3",
        "Gemma3TextConfig",
        {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window_pattern": 2, **WINDOW},
    ),
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Of whose layers some parts are fused.
PARTLY = {
    "granite": ("Granite", "GraniteConfig", {"residual_multiplier": 0.5}),
    "mixtral": ("Mixtral", "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, **WINDOW}),
    "olmo2": ("Olmo2", "Olmo2Config", {}),
    "qwen3_moe": ("Qwen3Moe", "Qwen3MoeConfig", {"num_experts": 4, "head_dim": 24, "mlp_only_layers": [1], **EXPERTS}),
}
OTHER = {"glm": ("Glm", "GlmConfig", {"head_dim": 16})}
FAMILIES = FUSED | PARTLY | OTHER
SHARED = {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "n_routed_experts": 4}
RANKS = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "q_lora_rank": 32}
# Mixtures of experts, those above among them.
MIXTURES = {name: PARTLY[name] for name in ("mixtral", "qwen3_moe")} | {
    "deepseek_v2": ("DeepseekV2", "DeepseekV2Config", {"num_key_value_heads": 4, **SHARED, **EXPERTS, **RANKS}),
    "deepseek_v3": ("DeepseekV3", "DeepseekV3Config", {"num_key_value_heads": 4, **SHARED, **EXPERTS, **RANKS}),
    "glm4_moe": ("Glm4Moe", "Glm4MoeConfig", {"head_dim": 16, **SHARED, **EXPERTS}),
    "gpt_oss": ("GptOss", "GptOssConfig", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **WINDOW}),
    "olmoe": ("Olmoe", "OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", "Qwen2MoeConfig", {"num_experts": 4, "shared_expert_intermediate_size": 64, **EXPERTS}),
}
IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(7))


def random_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    prefix, config, differences = (FAMILIES | MIXTURES)[family]
    torch.manual_seed(seed)
    config = getattr(transformers, config)(**(SIZES | differences | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    assert type(model).__name__ == f"{prefix}ForCausalLM"
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif name.endswith("bias"):
            parameter.data.normal_()
    return model
