"""Attention, feed-forward and the transformer layer: read from top to bottom like the paper.

Shapes: T tokens, E hidden size, H query heads, KV key/value heads, D head_dim, F feed-forward size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import ruvllm.kernels as K
from ruvllm.kernels._memory import aligned_empty
from ruvllm.kernels.cached_attention import cached_attention, scratch_size
from ruvllm.kernels.kv import append
from ruvllm.model.activations import Activations
from ruvllm.model.config import ModelConfig
from ruvllm.model.kv_cache import KVCache
from ruvllm.model.linear import Linear


@dataclass
class Step:
    """What all layers share while T tokens go through: where they stand, and the buffers they pass through."""

    positions: np.ndarray  # (T,) int64
    cos: np.ndarray  # (T, D/2)
    sin: np.ndarray  # (T, D/2)
    x: np.ndarray  # (T, E) the residual stream
    h: np.ndarray  # (T, E) its normalised form
    q: np.ndarray  # (T, H, D)
    k: np.ndarray  # (T, KV, D)
    v: np.ndarray  # (T, KV, D)
    attended: np.ndarray  # (T, H, D)
    gate: np.ndarray  # (T, F)
    up: np.ndarray  # (T, F)
    inputs: Activations  # what goes into the linear layers, with its 8-bit form
    scratch: np.ndarray  # (threads, ...) for attention


class Buffers:
    """The buffers of a Step for up to ``tokens`` tokens, allocated once: a decode step allocates nothing."""

    def __init__(self, config: ModelConfig, tokens: int, threads: int) -> None:
        T, E, F, D = tokens, config.hidden_size, config.intermediate_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.tokens = tokens
        self.x, self.h = aligned_empty((T, E)), aligned_empty((T, E))
        self.q, self.attended = aligned_empty((T, heads, D)), aligned_empty((T, heads, D))
        self.k, self.v = aligned_empty((T, kv_heads, D)), aligned_empty((T, kv_heads, D))
        self.gate, self.up = aligned_empty((T, F)), aligned_empty((T, F))
        self.inputs = Activations(T, max(E, F, heads * D))
        self.scratch = aligned_empty((threads, scratch_size(D)))

    def step(self, positions: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> Step:
        """A step of len(positions) tokens in these buffers."""
        T = len(positions)
        return Step(
            positions, cos, sin, self.x[:T], self.h[:T], self.q[:T], self.k[:T], self.v[:T],
            self.attended[:T], self.gate[:T], self.up[:T],
            self.inputs, self.scratch,
        )  # fmt: skip


class Attention:
    """Grouped-query attention with rotary position embedding, over a KV cache."""

    def __init__(self, config: ModelConfig, q: Linear, k: Linear, v: Linear, o: Linear) -> None:
        self.q, self.k, self.v, self.o = q, k, v, o
        self.window = config.sliding_window
        self.scale = config.head_dim**-0.5

    def __call__(self, s: Step, cache: KVCache, layer: int) -> np.ndarray:
        """s.h (T, E) -> (T, E) in s.h; the tokens' keys and values go into the cache."""
        T = len(s.h)
        h = s.inputs.of(s.h)
        self.q(h, out=s.q.reshape(T, -1))
        self.k(h, out=s.k.reshape(T, -1))
        self.v(h, out=s.v.reshape(T, -1))
        K.apply_rope_tables(s.q, s.cos, s.sin, out=s.q)
        K.apply_rope_tables(s.k, s.cos, s.sin, out=s.k)
        keys, values = cache.keys[layer], cache.values[layer]
        append(s.k, s.v, keys, values, s.positions)
        cached_attention(s.q, keys, values, s.positions, self.window, self.scale, s.attended, s.scratch)
        return self.o(s.inputs.of(s.attended.reshape(T, -1)), out=s.h)


class FeedForward:
    """SwiGLU: down(silu(gate(h)) * up(h))."""

    def __init__(self, gate: Linear, up: Linear, down: Linear) -> None:
        self.gate, self.up, self.down = gate, up, down

    def __call__(self, s: Step) -> np.ndarray:
        """s.h (T, E) -> (T, E) in s.h."""
        h = s.inputs.of(s.h)
        self.gate(h, out=s.gate)
        self.up(h, out=s.up)
        K.silu_mul(s.gate, s.up, out=s.gate)
        return self.down(s.inputs.of(s.gate), out=s.h)


class TransformerLayer:
    """x += attention(norm(x)); x += feed_forward(norm(x)).

    The two places where ``x`` is added to are the only ones where partial sums of several machines would meet.
    """

    def __init__(
        self, config: ModelConfig, attn_norm: np.ndarray, attention: Attention, mlp_norm: np.ndarray, mlp: FeedForward
    ) -> None:
        self.eps = config.rms_norm_eps
        self.attn_norm, self.attention = attn_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp

    @classmethod
    def load(
        cls, config: ModelConfig, linear: Callable[[str], Linear], vector: Callable[[str], np.ndarray], i: int
    ) -> TransformerLayer:
        """Layer i from functions that give its matrices and vectors by canonical name."""
        at = f"layers.{i}."
        attention = Attention(config, linear(at + "q"), linear(at + "k"), linear(at + "v"), linear(at + "o"))
        mlp = FeedForward(linear(at + "gate"), linear(at + "up"), linear(at + "down"))
        return cls(config, vector(at + "attn_norm"), attention, vector(at + "mlp_norm"), mlp)

    def __call__(self, s: Step, cache: KVCache, layer: int) -> None:
        """Take s.x (T, E) through the layer, in place."""
        K.rms_norm(s.x, self.attn_norm, self.eps, out=s.h)
        np.add(s.x, self.attention(s, cache, layer), out=s.x)
        K.rms_norm(s.x, self.mlp_norm, self.eps, out=s.h)
        np.add(s.x, self.mlp(s), out=s.x)

    def linears(self) -> dict[str, Linear]:
        """The layer's matrices by name: q k v o gate up down."""
        a, m = self.attention, self.mlp
        return {"q": a.q, "k": a.k, "v": a.v, "o": a.o, "gate": m.gate, "up": m.up, "down": m.down}
