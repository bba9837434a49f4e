"""A LLaMA in plain NumPy float64, with nothing cached and nothing fused: the oracle of tests and of ``lab.drift``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ruvllm.model.config import ModelConfig, RopeConfig

Array = NDArray[np.float64]


def reference_logits(checkpoint: Any, ids: ArrayLike) -> Array:
    """Logits (T, V) of the token ids (T,) at positions 0 .. T-1, from anything with `.config` and `.tensor(name)`."""
    *_, last = reference_states(checkpoint, ids)
    return last


def reference_states(checkpoint: Any, ids: ArrayLike) -> Iterator[Array]:
    """The residual stream (T, E) after the embedding and after each layer, and at last the logits (T, V)."""
    config: ModelConfig = checkpoint.config

    def weight(name: str) -> Array:
        tensor = checkpoint.tensor(name)
        return np.asarray(tensor.float32(), dtype=np.float64).reshape(tensor.shape)

    def linear(x: Array, name: str) -> Array:
        y = x @ weight(name).T
        return y + weight(f"{name}_bias") if f"{name}_bias" in checkpoint else y

    ids = np.asarray(ids)
    cos, sin = rope_angles(config, len(ids))
    x = weight("embed")[ids]  # (T, E)
    yield x
    for i in range(config.num_hidden_layers):
        prefix = f"layers.{i}."
        h = rms_norm(x, weight(prefix + "attn_norm"), config.rms_norm_eps)
        q = split_heads(linear(h, prefix + "q"), config.num_attention_heads)  # (H, T, D)
        k = split_heads(linear(h, prefix + "k"), config.num_key_value_heads)  # (KV, T, D)
        v = split_heads(linear(h, prefix + "v"), config.num_key_value_heads)
        a = attention(rotate(q, cos, sin), rotate(k, cos, sin), v, config.sliding_window)  # (T, H·D)
        x = x + linear(a, prefix + "o")
        h = rms_norm(x, weight(prefix + "mlp_norm"), config.rms_norm_eps)
        x = x + linear(silu(linear(h, prefix + "gate")) * linear(h, prefix + "up"), prefix + "down")
        yield x
    x = rms_norm(x, weight("norm"), config.rms_norm_eps)
    yield x @ weight("embed" if config.tie_word_embeddings else "head").T


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x²) + eps) · weight over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x: Array) -> Array:
    """x · sigmoid(x), without overflow for large negative x."""
    return x * 0.5 * (1 + np.tanh(x / 2))


def split_heads(x: Array, heads: int) -> Array:
    """(T, heads·D) -> (heads, T, D)."""
    return x.reshape(len(x), heads, -1).swapaxes(0, 1)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turn the pairs (i, i + D/2) of x (heads, T, D) by the angles given as cos and sin (T, D/2)."""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(q: Array, k: Array, v: Array, window: int | None) -> Array:
    """Causal softmax(q kᵀ / √D) v, query head h reading key/value head h·KV // H. (H, T, D) -> (T, H·D)."""
    H, T, D = q.shape
    group = H // len(k)
    k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
    query, key = np.arange(T)[:, None], np.arange(T)[None, :]
    seen = (key <= query) & (key > query - (window or T))
    scores = np.where(seen, q @ k.swapaxes(1, 2) / np.sqrt(D), -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return (p @ v).swapaxes(0, 1).reshape(T, H * D)


def rope_angles(config: ModelConfig, tokens: int) -> tuple[Array, Array]:
    """cos and sin (T, D/2) of position · inv_freq."""
    angles = np.arange(tokens)[:, None] * inverse_frequencies(config.rope, config.head_dim)
    return np.cos(angles), np.sin(angles)


def inverse_frequencies(rope: RopeConfig, D: int) -> Array:
    """(D/2,) radians per position of each pair, under each kind of scaling."""
    theta = rope.theta * rope.factor ** (D / (D - 2)) if rope.scaling == "ntk" else rope.theta
    base = theta ** (-np.arange(0, D, 2) / D)
    if rope.scaling == "linear":
        return base / rope.factor
    if rope.scaling == "factors":
        return base / np.array(rope.factors)
    if rope.scaling == "llama3":
        # How many wavelengths fit into the original context, from "few" (0: stretched) to "many" (1: left alone).
        turns = rope.original_max_position * base / (2 * np.pi)
        kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
        return base * (kept + (1 - kept) / rope.factor)
    return base
