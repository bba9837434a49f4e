"""The model, defined once: attention, feed-forward, layer, decoder, in the operations of ``ops`` (``model.ops``).

This is the only place that defines what a model computes. Generation, training, the float64 reference and profiling
run this code with other ``ops``. The variants of ``ModelConfig`` are choices here; anything else is a subclass: see
docs/contribute/model.md.

    q k v o gate up down    matrices (outputs, inputs); attn_norm mlp_norm norm    vectors (E,)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ruvllm.model.config import ModelConfig
from ruvllm.model.experts import MixtureOfExperts
from ruvllm.model.feed_forward import FeedForward, Parameters
from ruvllm.model.linear import Linear
from ruvllm.model.ops import Ops

__all__ = ["Attention", "Decoder", "FeedForward", "MixtureOfExperts", "Parameters", "TransformerLayer", "parts"]


class Attention:
    """Grouped-query attention with rotary position embedding, over a KV cache."""

    def __init__(self, config: ModelConfig, parameters: Parameters, layer: int) -> None:
        at = f"layers.{layer}."
        self.at = at + "attention."
        self.q, self.k, self.v, self.o = (parameters.linear(at + name) for name in "qkvo")
        self.layer, self.dim, self.eps = layer, config.head_dim, config.rms_norm_eps
        self.rope, self.window = config.rope_index(layer), config.window(layer)
        self.scale, self.softcap = config.attention_scale, config.attn_logit_softcapping
        self.sinks = parameters.vector(at + "sinks") if config.attention_sinks else None
        self.qk_norm, self.exchange = config.qk_norm, parameters.exchange
        if self.qk_norm is not None:
            self.q_norm, self.k_norm = parameters.vector(at + "q_norm"), parameters.vector(at + "k_norm")

    def __call__(self, ops: Ops, h: Any) -> Any:
        """h (T, E) -> (T, E); the tokens' keys and values go into the layer's cache."""
        at = self.at
        q, k, v = (ops.name(ops.linear(h, m), at + name) for m, name in ((self.q, "q"), (self.k, "k"), (self.v, "v")))
        if self.qk_norm == "row":
            q = self.exchange.row_norm(ops, q, self.q_norm, self.eps, "heads")
            k = self.exchange.row_norm(ops, k, self.k_norm, self.eps, "kv_heads")
        q, k, v = (ops.heads(x, self.dim) for x in (q, k, v))  # (T, H, D)
        if self.qk_norm == "head":
            q, k = ops.rms_norm(q, self.q_norm, self.eps), ops.rms_norm(k, self.k_norm, self.eps)
        if self.rope is not None:
            q, k = ops.rope(q, self.rope), ops.rope(k, self.rope)
        q, k = ops.name(q, at + "rotated_q"), ops.name(k, at + "rotated_k")
        attended = ops.attention(q, k, v, self.layer, self.window, self.scale, self.softcap, self.sinks)
        return ops.linear(self.exchange.inputs(ops, ops.name(attended, at + "heads"), "heads"), self.o)


class TransformerLayer:
    """x + attention(norm(x)), then that + feed_forward(norm(that)); norms may also follow the blocks, or only that."""

    attention_type: type[Attention] = Attention
    mlp_type: type[FeedForward] = FeedForward
    experts_type: type[MixtureOfExperts] = MixtureOfExperts

    def __init__(self, config: ModelConfig, parameters: Parameters, layer: int) -> None:
        self.at, self.exchange = f"layers.{layer}.", parameters.exchange
        self.eps, self.residual_multiplier = config.rms_norm_eps, config.residual_multiplier
        self.attention = self.attention_type(config, parameters, layer)
        mlp_type = self.experts_type if config.has_experts(layer) else self.mlp_type
        self.mlp: Any = mlp_type(config, parameters, layer)
        # Those that the configuration leaves out are None.
        self.attn_norm: Any = None
        self.mlp_norm: Any = None
        self.attn_post_norm: Any = None
        self.mlp_post_norm: Any = None
        if config.norms != "after":
            self.attn_norm, self.mlp_norm = (parameters.vector(f"layers.{layer}.{x}_norm") for x in ("attn", "mlp"))
        if config.norms != "before":
            self.attn_post_norm, self.mlp_post_norm = (
                parameters.vector(f"layers.{layer}.{x}_post_norm") for x in ("attn", "mlp")
            )

    def __call__(self, ops: Ops, x: Any) -> Any:
        """x (T, E) after the layer."""
        x = self._add(ops, ops.name(x, self.at + "residual"), "attention.", self.attn_norm, self.attn_post_norm)
        return self._add(ops, ops.name(x, self.at + "residual_mid"), "mlp.", self.mlp_norm, self.mlp_post_norm)

    def _add(self, ops: Ops, x: Any, block: str, before: np.ndarray | None, after: np.ndarray | None) -> Any:
        """x + residual_multiplier * after(block(before(x)))."""
        at, function = self.at + block, self.attention if block == "attention." else self.mlp
        added = function(ops, x if before is None else ops.name(ops.rms_norm(x, before, self.eps), at + "norm"))
        added = self.exchange.outputs(ops, added)
        if after is not None:
            added = ops.rms_norm(ops.name(added, at + "before_norm"), after, self.eps)
        if self.residual_multiplier != 1:
            added = ops.scale(added, self.residual_multiplier)
        return ops.add(x, ops.name(added, at + "out"))


class Decoder:
    """Layers, norm and head: from embedded tokens to logits. A tied head is the embedding."""

    layer_type: type[TransformerLayer] = TransformerLayer

    def __init__(self, config: ModelConfig, parameters: Parameters) -> None:
        self.eps = config.rms_norm_eps
        self.embedding_multiplier, self.logits_scaling = config.embedding_multiplier, config.logits_scaling
        self.softcap = config.final_logit_softcapping
        self.embed = parameters.linear("embed")
        self.layers = [self.layer_type(config, parameters, i) for i in range(config.num_hidden_layers)]
        self.norm = parameters.vector("norm")
        self.head = self.embed if config.tie_word_embeddings else parameters.linear("head")

    def __call__(self, ops: Ops, x: Any) -> Any:
        """x (T, E), the embedded tokens, to logits (rows, V)."""
        if self.embedding_multiplier != 1:
            x = ops.scale(x, self.embedding_multiplier)
        x = ops.name(x, "embed")
        for layer in self.layers:
            x = layer(ops, ops.boundary(x))
        return self.unembed(ops, ops.last_rows(ops.name(x, "final.residual")))

    def unembed(self, ops: Ops, x: Any) -> Any:
        """Norm and head: the residual stream (rows, E) to logits (rows, V)."""
        x = ops.name(ops.rms_norm(x, self.norm, self.eps), "final.norm")
        if self.logits_scaling != 1:
            x = ops.scale(x, 1 / self.logits_scaling)
        return ops.name(ops.logits(x, self.head, self.softcap), "logits")

    def linears(self) -> dict[str, Linear]:
        """Every matrix by its canonical name; a tied head appears once, as ``embed``."""
        return {part.name: part for part in parts(self) if not isinstance(part, np.ndarray)}


def parts(block: object) -> Iterator[Linear | np.ndarray]:
    """The matrices and vectors of a block and of the blocks in it, in the order of their attributes."""
    for value in vars(block).values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Linear | np.ndarray):
                yield item
            elif hasattr(item, "__dict__") and callable(item):
                yield from parts(item)
