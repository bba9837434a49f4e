"""The model, defined once: attention, feed-forward, layer, decoder, in the operations of ``ops`` (``model.ops``).

This is the only place that says what a LLaMA computes. Generation, training, the float64 reference and the profiler
run this code with other ``ops``. A variant is a subclass: see "Add a model" in the README.

    q k v o gate up down    matrices (outputs, inputs); attn_norm mlp_norm norm    vectors (E,)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from ruvllm.model.config import ModelConfig
from ruvllm.model.linear import Linear
from ruvllm.model.ops import Ops


class Parameters(Protocol):
    """Where the parts of a model get their matrices and vectors, by canonical name ("layers.3.q")."""

    def linear(self, name: str) -> Linear:
        """A matrix, with its bias if it has one."""
        ...

    def vector(self, name: str) -> np.ndarray:
        """A vector (n,)."""
        ...


class Attention:
    """Grouped-query attention with rotary position embedding, over a KV cache."""

    def __init__(self, config: ModelConfig, parameters: Parameters, layer: int) -> None:
        self.q, self.k, self.v, self.o = (parameters.linear(f"layers.{layer}.{name}") for name in "qkvo")
        self.layer, self.dim = layer, config.head_dim
        self.window, self.scale = config.sliding_window, config.head_dim**-0.5

    def __call__(self, ops: Ops, h: Any) -> Any:
        """h (T, E) -> (T, E); the tokens' keys and values go into the layer's cache."""
        q, k, v = (ops.heads(ops.linear(h, matrix), self.dim) for matrix in (self.q, self.k, self.v))  # (T, H, D)
        attended = ops.attention(ops.rope(q), ops.rope(k), v, self.layer, self.window, self.scale)
        return ops.linear(attended, self.o)


class FeedForward:
    """SwiGLU: down(silu(gate(h)) * up(h))."""

    def __init__(self, config: ModelConfig, parameters: Parameters, layer: int) -> None:
        self.gate, self.up, self.down = (
            parameters.linear(f"layers.{layer}.{name}") for name in ("gate", "up", "down")
        )  # fmt: skip

    def __call__(self, ops: Ops, h: Any) -> Any:
        """h (T, E) -> (T, E)."""
        return ops.linear(ops.silu_mul(ops.linear(h, self.gate), ops.linear(h, self.up)), self.down)


class TransformerLayer:
    """x + attention(norm(x)), then that + feed_forward(norm(that))."""

    attention_type: type[Attention] = Attention
    mlp_type: type[FeedForward] = FeedForward

    def __init__(self, config: ModelConfig, parameters: Parameters, layer: int) -> None:
        self.eps = config.rms_norm_eps
        self.attention = self.attention_type(config, parameters, layer)
        self.mlp = self.mlp_type(config, parameters, layer)
        self.attn_norm = parameters.vector(f"layers.{layer}.attn_norm")
        self.mlp_norm = parameters.vector(f"layers.{layer}.mlp_norm")

    def __call__(self, ops: Ops, x: Any) -> Any:
        """x (T, E) after the layer."""
        x = ops.add(x, self.attention(ops, ops.rms_norm(x, self.attn_norm, self.eps)))
        return ops.add(x, self.mlp(ops, ops.rms_norm(x, self.mlp_norm, self.eps)))


class Decoder:
    """Layers, norm and head: from embedded tokens to logits. A tied head is the embedding."""

    layer_type: type[TransformerLayer] = TransformerLayer

    def __init__(self, config: ModelConfig, parameters: Parameters) -> None:
        self.eps = config.rms_norm_eps
        self.embed = parameters.linear("embed")
        self.layers = [self.layer_type(config, parameters, i) for i in range(config.num_hidden_layers)]
        self.norm = parameters.vector("norm")
        self.head = self.embed if config.tie_word_embeddings else parameters.linear("head")

    def __call__(self, ops: Ops, x: Any) -> Any:
        """x (T, E), the embedded tokens, to logits (rows, V)."""
        for layer in self.layers:
            x = layer(ops, ops.boundary(x))
        return ops.logits(ops.rms_norm(ops.last_rows(x), self.norm, self.eps), self.head)

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
