"""OLMo 2: norms after attention and feed-forward, q and k normalised by row. OLMo 3: windows in three of four layers,
which the scaling of RoPE leaves alone. OLMoE: a mixture with such q and k."""

from __future__ import annotations

from ruvllm.checkpoint.families.choices import (
    biased,
    gguf_expert_values,
    gguf_experts,
    gguf_window_values,
    gguf_windows,
    windows,
)
from ruvllm.checkpoint.family import Choices, Family, Sizes
from ruvllm.checkpoint.fields import Fields
from ruvllm.model.config import ExpertsConfig, RopeConfig

_EVERY = 4  # layer of OLMo 3 sees all positions
_COMMON: Choices = {"norms": "after", "qk_norm": "row"}
_DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": 50279}


def _olmo2(keys: Fields, sizes: Sizes) -> Choices:
    return biased(keys) | _COMMON


def _olmo3(keys: Fields, sizes: Sizes) -> Choices:
    # rope_theta is that of all layers, as in llama.cpp and in transformers 4. Version 5.24 has 5e5 in windowed layers.
    local = RopeConfig(theta=keys.require("rope_theta", float))
    window = keys.get("sliding_window", int)
    return _olmo2(keys, sizes) | windows(keys, sizes, window, lambda i: (i + 1) % _EVERY != 0) | {"local_rope": local}


def _olmoe(keys: Fields, sizes: Sizes) -> Choices:
    keys.require_plain("clip_qkv", ())
    experts = ExpertsConfig(
        count=keys.default("num_experts", int, 64), per_token=keys.default("num_experts_per_tok", int, 8),
        intermediate_size=keys.require("intermediate_size", int),
        normalised=keys.default("norm_topk_prob", bool, False),
    )  # fmt: skip
    return biased(keys) | {"qk_norm": "row", "experts": experts}


def _gguf_olmo2(meta: Fields, sizes: Sizes) -> Choices:
    """OLMo 2; with a window OLMo 3."""
    window = meta.get("attention.sliding_window", int)
    if not window:
        return _COMMON
    local = RopeConfig(theta=meta.default("rope.freq_base", float, 10000.0))
    return _COMMON | gguf_windows(meta, sizes, window, _EVERY) | {"local_rope": local, "model_type": "olmo3"}


def _gguf_olmoe(meta: Fields, sizes: Sizes) -> Choices:
    return {"qk_norm": "row"} | gguf_experts(meta, "feed_forward_length", normalised=False)


OLMO2 = Family(
    model_type="olmo2", classes=("Olmo2ForCausalLM",), architecture="olmo2", hf_choices=_olmo2,
    gguf_choices=_gguf_olmo2,
    defaults=_DEFAULTS,
)  # fmt: skip
OLMO3 = Family(
    model_type="olmo3", classes=("Olmo3ForCausalLM",), architecture="olmo2", hf_choices=_olmo3,
    gguf_values=lambda config: gguf_window_values(config, _EVERY),
    defaults=_DEFAULTS | {"rope_theta": 5e5, "sliding_window": 4096},
)  # fmt: skip
OLMOE = Family(
    model_type="olmoe", classes=("OlmoeForCausalLM",), architecture="olmoe", hf_choices=_olmoe,
    gguf_choices=_gguf_olmoe, gguf_values=gguf_expert_values,
    defaults=_DEFAULTS | {"max_position_embeddings": 4096},
)  # fmt: skip
