"""Phi 3, 3.5 and 4-mini: fused q, k, v and gate, up; LongRoPE; partly rotated heads."""

from __future__ import annotations

from typing import Any

from ruvllm.checkpoint.family import Choices, Family, Sizes, both, fused_gate_up, fused_qkv
from ruvllm.checkpoint.fields import Fields
from ruvllm.model.config import ModelConfig


def _phi3(keys: Fields, sizes: Sizes) -> Choices:
    return {"sliding_window": keys.get("sliding_window", int)}


def _gguf_values(config: ModelConfig) -> dict[str, Any]:
    return {"attention.sliding_window": config.sliding_window or 0}


PHI3 = Family(
    model_type="phi3", classes=("Phi3ForCausalLM",), architecture="phi3", hf_choices=_phi3,
    gguf_choices=lambda meta, sizes: {"sliding_window": meta.get("attention.sliding_window", int) or None},
    gguf_values=_gguf_values, partial_rotary=True,
    hf_fused=both(fused_qkv("self_attn.qkv_proj.weight"), fused_gate_up("mlp.gate_up_proj.weight")),
    gguf_fused=both(fused_qkv("attn_qkv.weight"), fused_gate_up("ffn_up.weight")),
    defaults={
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
        "eos_token_id": 32000,
    },
)  # fmt: skip
