"""Other architectures as layer code, each a few lines: what a new model file would contain."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from ruvllm.model import Llama, ModelConfig
from ruvllm.model.config import ExpertsConfig
from ruvllm.model.layer import Attention, Decoder, FeedForward, Parameters, TransformerLayer
from ruvllm.model.ops import Ops
from ruvllm.model.random_weights import RandomWeights

CONFIG = ModelConfig(
    vocab_size=300, hidden_size=96, intermediate_size=200, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, head_dim=32, attention_bias=True,
)  # fmt: skip
CONFIGS = {
    "bounded": replace(
        CONFIG, hidden_act="clamped_swiglu", swiglu_limit=0.5, residual_multiplier=0.4, final_logit_softcapping=1.5
    ),
    "mixture": replace(CONFIG, experts=ExpertsConfig(count=5, per_token=2, intermediate_size=72)),
    "shared": replace(
        CONFIG,
        experts=ExpertsConfig(
            count=6, per_token=3, intermediate_size=40, normalised=False, layers=(0, 2), shared_intermediate_size=64,
            shared_gate=True, bias=True,
        ),
    ),
}  # fmt: skip


class Weights(RandomWeights):
    """Random weights, also of the tensors that LLaMA lacks."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__(config, seed)
        E, D = config.hidden_size, config.head_dim
        for i in range(config.num_hidden_layers):
            at = f"layers.{i}."
            self._shapes |= {at + "q_norm": (D,), at + "k_norm": (D,), at + "post_attn": (E,), at + "post_mlp": (E,)}


class Qwen3Attention(Attention):
    """Each head of q and k is normalised before it is rotated."""

    def __init__(self, config: ModelConfig, parameters: Parameters, layer: int) -> None:
        super().__init__(config, parameters, layer)
        self.q_norm, self.k_norm = (parameters.vector(f"layers.{layer}.{name}") for name in ("q_norm", "k_norm"))

    def __call__(self, ops: Ops, h: Any) -> Any:
        q, k, v = (ops.heads(ops.linear(h, matrix), self.dim) for matrix in (self.q, self.k, self.v))
        q, k = ops.rms_norm(q, self.q_norm, 1e-6), ops.rms_norm(k, self.k_norm, 1e-6)
        return ops.linear(ops.attention(ops.rope(q), ops.rope(k), v, self.layer, self.window, self.scale), self.o)


class GemmaFeedForward(FeedForward):
    """GeGLU."""

    def __call__(self, ops: Ops, h: Any) -> Any:
        return ops.linear(ops.gelu_mul(ops.linear(h, self.gate), ops.linear(h, self.up)), self.down)


class Qwen3Layer(TransformerLayer):
    attention_type = Qwen3Attention


class GemmaLayer(TransformerLayer):
    """The outputs of attention and feed-forward are normalised too; attention sees a window of 9 tokens."""

    mlp_type = GemmaFeedForward

    def __init__(self, config: ModelConfig, parameters: Parameters, layer: int) -> None:
        super().__init__(config, parameters, layer)
        self.post_attn, self.post_mlp = (parameters.vector(f"layers.{layer}.{n}") for n in ("post_attn", "post_mlp"))
        self.attention.window = 9

    def __call__(self, ops: Ops, x: Any) -> Any:
        added = self.attention(ops, ops.rms_norm(x, self.attn_norm, self.eps))
        x = ops.add(x, ops.rms_norm(added, self.post_attn, self.eps))
        added = self.mlp(ops, ops.rms_norm(x, self.mlp_norm, self.eps))
        return ops.add(x, ops.rms_norm(added, self.post_mlp, self.eps))


class ParallelLayer(TransformerLayer):
    """x + attention(norm(x)) + feed_forward(norm(x)), as Cohere's and GPT-J's."""

    def __call__(self, ops: Ops, x: Any) -> Any:
        h = ops.rms_norm(x, self.attn_norm, self.eps)
        return ops.add(ops.add(x, self.attention(ops, h)), self.mlp(ops, h))


class ReducedLayer(TransformerLayer):
    """As in tensor parallelism: Python changes attention's output, another call inspects it."""

    seen: ClassVar[list[np.ndarray]] = []

    def __call__(self, ops: Ops, x: Any) -> Any:
        added = ops.call(self.attention(ops, ops.rms_norm(x, self.attn_norm, self.eps)), self.reduce)
        x = ops.call(ops.add(x, added), lambda x: self.seen.append(x.copy()))
        return ops.add(x, self.mlp(ops, ops.rms_norm(x, self.mlp_norm, self.eps)))

    def reduce(self, x: np.ndarray) -> None:
        x += x * np.float32(0.5)


def decoder(layer: type[TransformerLayer]) -> type[Decoder]:
    """The decoder of such layers."""
    return type(f"{layer.__name__}Decoder", (Decoder,), {"layer_type": layer})


ARCHITECTURES: dict[str, type[Decoder]] = {
    "llama": Decoder, "qwen3": decoder(Qwen3Layer), "gemma": decoder(GemmaLayer), "parallel": decoder(ParallelLayer),
    "reduced": decoder(ReducedLayer), "bounded": Decoder, "mixture": Decoder, "shared": Decoder,
}  # fmt: skip


def config_of(name: str) -> ModelConfig:
    """The configuration of an architecture."""
    return CONFIGS.get(name, CONFIG)


def build(name: str, layout: str, threads: int = 1) -> Llama:
    """A random model of an architecture."""
    config = config_of(name)
    return Llama(config, Weights(config, seed=3), layout, threads, architecture=ARCHITECTURES[name])
