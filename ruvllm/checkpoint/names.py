"""The names of tensors in GGUF files and in Hugging Face checkpoints, and the order of q/k rows in GGUF.

Canonical names are those of `ModelConfig.tensor_shapes`: `embed`, `norm`, `head`, and for each layer
`layers.{i}.` followed by attn_norm, q, k, v, o, mlp_norm, gate, up, down (and `{matrix}_bias`), and the
tensors of other families. These are the names that most families share; `family` lists the exceptions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GGUF_MODEL = {"embed": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}
GGUF_LAYER = {
    "attn_norm": "attn_norm.weight",
    "q": "attn_q.weight", "k": "attn_k.weight", "v": "attn_v.weight", "o": "attn_output.weight",
    "q_bias": "attn_q.bias", "k_bias": "attn_k.bias", "v_bias": "attn_v.bias", "o_bias": "attn_output.bias",
    "mlp_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight", "up": "ffn_up.weight", "down": "ffn_down.weight",
    "gate_bias": "ffn_gate.bias", "up_bias": "ffn_up.bias", "down_bias": "ffn_down.bias",
    "q_norm": "attn_q_norm.weight", "k_norm": "attn_k_norm.weight", "sinks": "attn_sinks.weight",
    "attn_post_norm": "post_attention_norm.weight", "mlp_post_norm": "post_ffw_norm.weight",
    "router": "ffn_gate_inp.weight", "router_bias": "ffn_gate_inp.bias",
    "experts.gate": "ffn_gate_exps.weight", "experts.up": "ffn_up_exps.weight", "experts.down": "ffn_down_exps.weight",
    "experts.gate_bias": "ffn_gate_exps.bias", "experts.up_bias": "ffn_up_exps.bias",
    "experts.down_bias": "ffn_down_exps.bias",
    "shared.gate": "ffn_gate_shexp.weight", "shared.up": "ffn_up_shexp.weight", "shared.down": "ffn_down_shexp.weight",
    "shared_gate": "ffn_gate_inp_shexp.weight",
}  # fmt: skip
GGUF_ROPE_FACTORS = "rope_freqs.weight"
GGUF_SHORT_FACTORS, GGUF_LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"

HF_MODEL = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
HF_LAYER = {
    "attn_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight", "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight", "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias", "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias", "o_bias": "self_attn.o_proj.bias",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight", "up": "mlp.up_proj.weight", "down": "mlp.down_proj.weight",
    "gate_bias": "mlp.gate_proj.bias", "up_bias": "mlp.up_proj.bias", "down_bias": "mlp.down_proj.bias",
    "q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight", "sinks": "self_attn.sinks",
    "attn_post_norm": "post_attention_layernorm.weight", "mlp_post_norm": "post_feedforward_layernorm.weight",
    "router": "mlp.gate.weight",
    "experts.gate": "mlp.experts.{x}.gate_proj.weight", "experts.up": "mlp.experts.{x}.up_proj.weight",
    "experts.down": "mlp.experts.{x}.down_proj.weight",
    "shared.gate": "mlp.shared_expert.gate_proj.weight", "shared.up": "mlp.shared_expert.up_proj.weight",
    "shared.down": "mlp.shared_expert.down_proj.weight", "shared_gate": "mlp.shared_expert_gate.weight",
}  # fmt: skip


def hf_name(name: str) -> str:
    """The Hugging Face name: `layers.3.q` is `model.layers.3.self_attn.q_proj.weight`. Raises KeyError if unknown."""
    if not name.startswith("layers."):
        return HF_MODEL[name]
    _, number, part = name.split(".")
    return f"model.layers.{number}.{HF_LAYER[part]}"


def half_split_rows(heads: int, head_dim: int) -> NDArray[np.int64]:
    """The positions of the rows of a half-split q or k matrix in a GGUF file of the llama architecture.

    GGUF pairs rows (2i, 2i+1) of a head for rotation, Hugging Face and this library pair (i, i + D/2):
    row h·D + s·D/2 + i of ours is row h·D + 2i + s of the file, for s in {0, 1}, i < D/2.

    Returns: (heads · head_dim,) int64, for `Tensor.permuted`.
    """
    rows = np.arange(heads * head_dim, dtype=np.int64).reshape(heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)
