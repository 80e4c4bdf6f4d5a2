"""Tiny configs of decoder-only families of transformers, by their ``model_type``."""

from __future__ import annotations

from typing import Any

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
HEAD = {"head_dim": 48}
GEMMA = HEAD | {"query_pre_attn_scalar": 48, "sliding_window": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# One dense layer in front, a shared expert, groups of experts, a correction of the router's scores.
ROUTED_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
# Latent attention has no groups of heads: transformers itself fails where the numbers differ.
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 48,
    "num_key_value_heads": 4,
}
LINEAR_LAYERS = {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3_ROPE},
    "mistral": {"sliding_window": 4},
    "mixtral": LOCAL_EXPERTS,
    "qwen2": {},
    "qwen3": HEAD,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 128},
    "qwen3_moe": EXPERTS | HEAD,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma": HEAD,
    "gemma2": GEMMA | {"final_logit_softcapping": 0.5},
    "gemma3_text": GEMMA,
    "phi3": {},
    "phi": {},
    "gpt_neox": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "stablelm": {},
    "olmo": {},
    "olmo2": {},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "deepseek_v3": ROUTED_EXPERTS | LATENT,
    "gpt_oss": LOCAL_EXPERTS | HEAD | {"sliding_window": 4},
    "phimoe": LOCAL_EXPERTS,
    "hunyuan_v1_moe": HEAD | {"num_experts": 4, "moe_topk": 2},
}
"""Compared with transformers at every run of the tests."""

MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "bloom": {},
    "cohere2": {"sliding_window": 4},
    "cwm": HEAD | {"sliding_window": 4},
    "deepseek_v2": ROUTED_EXPERTS | LATENT | {"topk_method": "greedy"},
    "doge": {},
    "dots1": ROUTED_EXPERTS | HEAD,
    "ernie4_5": HEAD,
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 64,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "exaone4": HEAD | {"sliding_window": 4},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "glm": HEAD,
    "glm4": HEAD,
    "glm4_moe": ROUTED_EXPERTS | HEAD,
    "gpt_bigcode": {},
    "gptj": {"rotary_dim": 16},
    "granitemoe": LOCAL_EXPERTS,
    "granitemoeshared": LOCAL_EXPERTS | {"shared_intermediate_size": 64},
    "helium": HEAD,
    "hunyuan_v1_dense": HEAD,
    "hyperclovax": {},
    "jais2": {},
    "minimax_m2": LOCAL_EXPERTS | HEAD,
    "ministral": HEAD | {"sliding_window": 4},
    "ministral3": HEAD,
    "mpt": {},
    "nanochat": {},
    "nemotron": HEAD,
    "olmo3": {"sliding_window": 4},
    "opt": {},
    "persimmon": {},
    "qwen3_5_text": HEAD | LINEAR_LAYERS,
    "qwen3_next": HEAD | EXPERTS | LINEAR_LAYERS | {"shared_expert_intermediate_size": 64},
    "seed_oss": HEAD,
    "smollm3": {},
    "starcoder2": {},
    "vaultgemma": HEAD,
}
"""Compared when `FSDPQ_FAMILIES=all` is set."""

ONLY_EAGER = {"bloom", "gemma2", "gpt_oss", "gptj", "mpt", "vaultgemma"}
"""Families that transformers runs, or runs exactly, with ``attn_implementation: eager`` only."""
