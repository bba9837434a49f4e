"""OLMo 2: norms after attention and feed-forward, q and k normalised by row. OLMoE: a mixture with such q and k."""

from __future__ import annotations

from ruvllm.checkpoint.families.choices import biased, gguf_expert_values, gguf_experts
from ruvllm.checkpoint.family import Choices, Family, Sizes
from ruvllm.checkpoint.fields import Fields
from ruvllm.model.config import ExpertsConfig


def _olmo2(keys: Fields, sizes: Sizes) -> Choices:
    return biased(keys) | {"norms": "after", "qk_norm": "row"}


def _olmoe(keys: Fields, sizes: Sizes) -> Choices:
    keys.require_plain("clip_qkv", ())
    experts = ExpertsConfig(
        count=keys.default("num_experts", int, 64), per_token=keys.default("num_experts_per_tok", int, 8),
        intermediate_size=keys.require("intermediate_size", int),
        normalised=keys.default("norm_topk_prob", bool, False),
    )  # fmt: skip
    return biased(keys) | {"qk_norm": "row", "experts": experts}


def _gguf_olmoe(meta: Fields, sizes: Sizes) -> Choices:
    return {"qk_norm": "row"} | gguf_experts(meta, "feed_forward_length", normalised=False)


OLMO2 = Family(
    model_type="olmo2", classes=("Olmo2ForCausalLM",), architecture="olmo2", hf_choices=_olmo2,
    gguf_choices=lambda meta, sizes: {"norms": "after", "qk_norm": "row"},
    defaults={
        "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": 50279,
    },
)  # fmt: skip
OLMOE = Family(
    model_type="olmoe", classes=("OlmoeForCausalLM",), architecture="olmoe", hf_choices=_olmoe,
    gguf_choices=_gguf_olmoe, gguf_values=gguf_expert_values,
    defaults={
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": 50279,
    },
)  # fmt: skip
