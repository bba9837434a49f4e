"""The config.json of each tiny checkpoint that make_architectures.py makes, spelt as in files on the Hub."""

from __future__ import annotations

from typing import Any

_LONG = [1.0, 1.1, 1.35, 1.8, 2.6, 3.7, 5.0, 6.5, 8.0, 9.5, 11.0, 12.5]
_SHORT = [1.0, 1.02, 1.05, 1.1, 1.16, 1.23, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8]


def _sizes(vocab: int, hidden: int, ffn: int, layers: int, heads: int, kv: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv,
    }  # fmt: skip


def _config(name: str, kind: str, sizes: dict[str, Any], **more: Any) -> dict[str, Any]:
    """With the keys that all have; None deletes one."""
    keys = {
        "architectures": [name], "model_type": kind, **sizes, "hidden_act": "silu", "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float32",
        "transformers_version": "4.51.0", "use_cache": True, **more,
    }  # fmt: skip
    return {key: value for key, value in keys.items() if value is not ABSENT}


ABSENT = object()


def _qwen2(**more: Any) -> dict[str, Any]:
    keys = {"max_window_layers": 2, "sliding_window": 11, "use_sliding_window": False, "rope_theta": 1e6, **more}
    return _config("Qwen2ForCausalLM", "qwen2", _sizes(123, 72, 100, 4, 6, 2), **keys)


def _qwen3(**more: Any) -> dict[str, Any]:
    keys = {
        "attention_bias": False, "head_dim": 24, "max_window_layers": 3, "rope_scaling": None, "rope_theta": 1e6,
        "sliding_window": None, "use_sliding_window": False, **more,
    }  # fmt: skip
    return _config("Qwen3ForCausalLM", "qwen3", _sizes(131, 72, 90, 3, 4, 2), **keys)


def _gemma(name: str, kind: str, sizes: dict[str, Any], **more: Any) -> dict[str, Any]:
    keys = {
        "attention_bias": False, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "head_dim": 24,
        "hidden_act": ABSENT, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": ABSENT, **more,
    }  # fmt: skip
    return _config(name, kind, sizes, **keys)


def _gemma2(**more: Any) -> dict[str, Any]:
    keys = {
        "attn_logit_softcapping": 4.0, "final_logit_softcapping": 9.0, "query_pre_attn_scalar": 24,
        "sliding_window": 9, "cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh", **more,
    }  # fmt: skip
    return _gemma("Gemma2ForCausalLM", "gemma2", _sizes(111, 80, 96, 4, 4, 2), **keys)


def _gemma3(layers: int, **more: Any) -> dict[str, Any]:
    keys = {
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 24,
        "sliding_window": 9, "rope_local_base_freq": 10000.0, "rope_theta": 1e6, "rope_scaling": None, **more,
    }  # fmt: skip
    return _gemma("Gemma3ForCausalLM", "gemma3_text", _sizes(119, 80, 96, layers, 4, 1), **keys)


def _smollm3(layers: int, **more: Any) -> dict[str, Any]:
    keys = {
        "attention_bias": False, "mlp_bias": False, "no_rope_layer_interval": 4, "rope_scaling": None,
        "rope_theta": 2e6, "sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": ABSENT,
        "pad_token_id": 0, **more,
    }  # fmt: skip
    return _config("SmolLM3ForCausalLM", "smollm3", _sizes(117, 72, 92, layers, 6, 2), **keys)


def _olmo2(**more: Any) -> dict[str, Any]:
    keys = {"attention_bias": False, "pad_token_id": 0, "rope_scaling": None, "rope_theta": 500000, **more}
    return _config("Olmo2ForCausalLM", "olmo2", _sizes(109, 72, 88, 3, 6, 3), **keys)


def _olmo3(**more: Any) -> dict[str, Any]:
    keys = {
        "attention_bias": False, "pad_token_id": 0, "rope_scaling": None, "rope_theta": 500000, "sliding_window": 9,
        **more,
    }  # fmt: skip
    return _config("Olmo3ForCausalLM", "olmo3", _sizes(109, 72, 88, 5, 6, 3), **keys)


def _granite(**more: Any) -> dict[str, Any]:
    keys = {
        "attention_bias": False, "mlp_bias": False, "attention_multiplier": 0.4, "embedding_multiplier": 3.5,
        "logits_scaling": 1.7, "residual_multiplier": 0.6, "rope_scaling": None, "pad_token_id": 0, **more,
    }  # fmt: skip
    return _config("GraniteForCausalLM", "granite", _sizes(101, 72, 84, 4, 6, 2), **keys)


def _phi3(**more: Any) -> dict[str, Any]:
    keys = {
        "embd_pdrop": 0.0, "resid_pdrop": 0.0, "original_max_position_embeddings": 512, "pad_token_id": 0,
        "rms_norm_eps": 1e-5, "rope_scaling": None, "sliding_window": None, **more,
    }  # fmt: skip
    return _config("Phi3ForCausalLM", "phi3", _sizes(107, 96, 76, 3, 6, 3), **keys)


def _longrope(pairs: int) -> dict[str, Any]:
    return {"long_factor": _LONG[:pairs], "short_factor": _SHORT[:pairs], "type": "longrope"}


def _mixtral(**more: Any) -> dict[str, Any]:
    keys = {
        "num_local_experts": 5, "num_experts_per_tok": 2, "output_router_logits": False, "rope_theta": 1e6,
        "router_aux_loss_coef": 0.02, "rms_norm_eps": 1e-5, "sliding_window": None, **more,
    }  # fmt: skip
    return _config("MixtralForCausalLM", "mixtral", _sizes(105, 72, 44, 3, 6, 2), **keys)


def _qwen2_moe(**more: Any) -> dict[str, Any]:
    keys = {
        "decoder_sparse_step": 1, "max_window_layers": 2, "moe_intermediate_size": 28, "norm_topk_prob": False,
        "num_experts": 7, "num_experts_per_tok": 3, "output_router_logits": False, "rope_theta": 1e6,
        "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 52, "sliding_window": 9,
        "use_sliding_window": False, **more,
    }  # fmt: skip
    return _config("Qwen2MoeForCausalLM", "qwen2_moe", _sizes(113, 72, 60, 4, 6, 3), **keys)


def _qwen3_moe(**more: Any) -> dict[str, Any]:
    keys = {
        "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 20, "max_window_layers": 4,
        "mlp_only_layers": [], "moe_intermediate_size": 28, "norm_topk_prob": True, "num_experts": 9,
        "num_experts_per_tok": 3, "output_router_logits": False, "rope_scaling": None, "rope_theta": 1e6,
        "router_aux_loss_coef": 0.001, "sliding_window": None, "use_sliding_window": False, **more,
    }  # fmt: skip
    return _config("Qwen3MoeForCausalLM", "qwen3_moe", _sizes(127, 72, 60, 4, 4, 2), **keys)


def _olmoe(kv: int, **more: Any) -> dict[str, Any]:
    keys = {
        "attention_bias": False, "clip_qkv": None, "norm_topk_prob": False, "num_experts": 8,
        "num_experts_per_tok": 3, "output_router_logits": False, "pad_token_id": 0, "rms_norm_eps": 1e-5,
        "rope_scaling": None, "router_aux_loss_coef": 0.01, **more,
    }  # fmt: skip
    return _config("OlmoeForCausalLM", "olmoe", _sizes(115, 72, 36, 3, 6, kv), **keys)


def _gpt_oss(truncate: bool, **more: Any) -> dict[str, Any]:
    scaling = {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0, "original_max_position_embeddings": 32,
        "rope_type": "yarn", "truncate": truncate,
    }  # fmt: skip
    keys = {
        "attention_bias": True, "experts_per_token": 2, "num_experts_per_tok": 2, "num_local_experts": 6,
        "head_dim": 20, "initial_context_length": 32, "rms_norm_eps": 1e-5, "rope_scaling": scaling,
        "rope_theta": 1500, "sliding_window": 10, "swiglu_limit": 7.0, "output_router_logits": False,
        "router_aux_loss_coef": 0.9, "pad_token_id": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2, **more,
    }  # fmt: skip
    return _config("GptOssForCausalLM", "gpt_oss", _sizes(121, 72, 40, 4, 6, 2), **keys)


def _llama(**more: Any) -> dict[str, Any]:
    keys = {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "head_dim": 20, **more}
    return _config("LlamaForCausalLM", "llama", _sizes(97, 72, 84, 3, 4, 2), **keys)


def _ministral(**more: Any) -> dict[str, Any]:
    keys = {"head_dim": 20, "sliding_window": 9, **more}
    return _config("MinistralForCausalLM", "ministral", _sizes(99, 72, 84, 4, 4, 2), **keys)


def _nested_gemma3() -> dict[str, Any]:
    """Gemma 3 with images: its text model's keys are often absent, where they are the default."""
    text = {
        "model_type": "gemma3_text", "hidden_size": 72, "intermediate_size": 88, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 28, "vocab_size": 119,
        "query_pre_attn_scalar": 20, "sliding_window": 9, "sliding_window_pattern": 3,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 16, "image_size": 28, "intermediate_size": 20,
        "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    return {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "boi_token_index": 115,
        "eoi_token_index": 116, "eos_token_id": [1, 106], "image_token_index": 117, "initializer_range": 0.02,
        "mm_tokens_per_image": 1, "text_config": text, "vision_config": vision, "torch_dtype": "float32",
        "transformers_version": "4.50.0.dev0",
    }  # fmt: skip


_SLIDING, _FULL = "sliding_attention", "full_attention"
CONFIGS = {
    "qwen2": _qwen2(tie_word_embeddings=True),
    "qwen2_window": _qwen2(use_sliding_window=True),
    "qwen2_yarn": _qwen2(
        rope_theta=3e3, rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32, "type": "yarn"}
    ),
    "qwen3": _qwen3(),
    "qwen3_window": _qwen3(
        tie_word_embeddings=True, attention_bias=True, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "gemma": _gemma(
        "GemmaForCausalLM", "gemma", _sizes(103, 64, 90, 3, 4, 1), hidden_act="gelu", hidden_activation=None
    ),
    "gemma2": _gemma2(),
    "gemma2_scaled": _gemma2(query_pre_attn_scalar=30, attn_logit_softcapping=None, num_hidden_layers=3),
    "gemma3": _gemma3(6, rope_scaling={"factor": 8.0, "rope_type": "linear"}),
    "gemma3_layers": _gemma3(
        4, layer_types=[_SLIDING, _FULL, _SLIDING, _FULL], query_pre_attn_scalar=30, final_logit_softcapping=8.0,
        _sliding_window_pattern=6, use_bidirectional_attention=False,
    ),
    "gemma3_nested": _nested_gemma3(),
    "gemma3_pattern": _gemma3(
        4, layer_types=[_SLIDING, _FULL, _FULL, _SLIDING], rope_local_base_freq=3000.0, final_logit_softcapping=8.0
    ),
    "smollm3": _smollm3(5, no_rope_layers=[1, 1, 1, 0, 1]),
    "smollm3_layers": _smollm3(
        4, no_rope_layers=[1, 0, 0, 1], use_sliding_window=True, sliding_window=10, attention_bias=True, mlp_bias=True
    ),
    "olmo2": _olmo2(),
    "olmo2_biased": _olmo2(attention_bias=True, tie_word_embeddings=True, num_key_value_heads=6),
    "olmo3": _olmo3(
        layer_types=[_SLIDING, _SLIDING, _SLIDING, _FULL, _SLIDING],
        rope_scaling={
            "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
            "original_max_position_embeddings": 32, "rope_type": "yarn",
        },
    ),
    "olmo3_alike": _olmo3(num_hidden_layers=3, layer_types=[_SLIDING] * 3, attention_bias=True),
    "olmo3_layers": _olmo3(
        num_hidden_layers=4, layer_types=[_SLIDING, _FULL, _FULL, _SLIDING],
        rope_scaling={"factor": 4.0, "rope_type": "linear"},
    ),
    "granite": _granite(),
    "granite_biased": _granite(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, num_hidden_layers=3),
    "phi3": _phi3(),
    "phi3_window": _phi3(sliding_window=11),
    "phi3_short": _phi3(max_position_embeddings=2048, rope_scaling=_longrope(8), tie_word_embeddings=True),
    "phi3_long": _phi3(original_max_position_embeddings=32, rope_scaling=_longrope(8)),
    "phi4_mini": _phi3(
        partial_rotary_factor=0.75, original_max_position_embeddings=32, rope_scaling=_longrope(6),
        tie_word_embeddings=True, num_key_value_heads=2, sliding_window=262144,
    ),
    "mixtral": _mixtral(),
    "mixtral_window": _mixtral(sliding_window=9, head_dim=16, tie_word_embeddings=True),
    "qwen2_moe": _qwen2_moe(),
    "qwen2_moe_mixed": _qwen2_moe(
        decoder_sparse_step=2, mlp_only_layers=[3], norm_topk_prob=True, use_sliding_window=True,
        max_window_layers=3,
    ),
    "qwen3_moe": _qwen3_moe(),
    "qwen3_moe_mixed": _qwen3_moe(
        norm_topk_prob=False, mlp_only_layers=[0], tie_word_embeddings=True, use_sliding_window=True, sliding_window=12
    ),
    "olmoe": _olmoe(6),
    "olmoe_clipped": _olmoe(2, clip_qkv=1.2, norm_topk_prob=True, tie_word_embeddings=True),
    "gpt_oss": _gpt_oss(truncate=False, swiglu_limit=3.0),
    "gpt_oss_truncated": _gpt_oss(truncate=True),
    "gpt_oss_mxfp4": _gpt_oss(
        truncate=True, hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_local_experts=4,
        layer_types=[_SLIDING, _FULL], quantization_config={
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
            ],
            "quant_method": "mxfp4",
        },
    ),
    "llama_yarn": _llama(
        rope_theta=500.0,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ),
    "llama_yarn_mscale": _llama(
        rope_theta=500.0,
        rope_scaling={
            "rope_type": "yarn", "factor": 6.0, "original_max_position_embeddings": 32, "mscale": 0.7,
            "mscale_all_dim": 1.3, "beta_fast": 3.0, "beta_slow": 0.5, "truncate": False,
        },
    ),
    "llama_yarn_factor": _llama(
        rope_theta=500.0,
        rope_scaling={
            "type": "yarn", "factor": 6.0, "original_max_position_embeddings": 32, "attention_factor": 1.25,
            "beta_fast": 2.0,
        },
    ),
    "llama_dynamic": _llama(max_position_embeddings=32, rope_scaling={"type": "dynamic", "factor": 2.0}),
    "llama3": _llama(
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "ministral": _ministral(layer_types=[_FULL, _SLIDING, _SLIDING, _FULL]),
    "ministral_alike": _ministral(tie_word_embeddings=True),
}  # fmt: skip
GENERATION = {  # generation_config.json, where its end tokens differ
    "qwen2": {"bos_token_id": 1, "do_sample": True, "eos_token_id": [2, 5], "repetition_penalty": 1.1},
    "gemma3": {"bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106], "pad_token_id": 0},
    "gpt_oss_truncated": {"bos_token_id": 1, "eos_token_id": [2, 7, 9], "pad_token_id": 0},
}
TOKENS = {"phi3_short": 40}  # else 48: beyond windows, and beyond the original context where it is 32
