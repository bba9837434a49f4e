"""A model in float64: the layer code of ``model.layer`` on plain NumPy, nothing cached, nothing fused.

The oracle of tests and of ``lab.drift``. The formulas are written out here, independent of every kernel; that the layer
code itself is right is tested against logits that transformers computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ruvllm.model.config import ModelConfig, RopeConfig
from ruvllm.model.exchange import Alone, Exchange
from ruvllm.model.layer import Decoder
from ruvllm.model.ops.protocol import Hooks
from ruvllm.model.rope_config import YARN

if TYPE_CHECKING:
    from ruvllm.model.ops import Ops

Array = NDArray[np.float64]


class ExactMatrix(Protocol):
    """A matrix as ``Float64`` needs it."""

    def product(self, x: Array) -> Array:
        """x W^T + bias."""
        ...


class Float64:
    """Operations of a whole sequence at once, in float64. ``states`` collects the residual stream between layers."""

    def __init__(self, config: ModelConfig, tokens: int) -> None:
        self.angles = [rope_angles(config, tokens, i) for i in range(len(config.ropes))]
        self.states: list[Array] = []
        self.hooks: Hooks = {}

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """x / sqrt(mean(x²) + eps) · weight over the last axis."""
        return rms_norm(x, weight, eps)

    def add(self, a: Array, b: Array) -> Array:
        """a + b."""
        return a + b

    def silu_mul(self, gate: Array, up: Array) -> Array:
        """silu(gate) · up."""
        return silu(gate) * up

    def gelu_mul(self, gate: Array, up: Array) -> Array:
        """gelu(gate) · up."""
        return gelu(gate) * up

    def clamped_swiglu(self, gate: Array, up: Array, limit: float, alpha: float) -> Array:
        """(clip(up) + 1) · g · sigmoid(alpha g), g = min(gate, limit)."""
        gate = np.minimum(gate, limit)
        return (np.clip(up, -limit, limit) + 1) * silu(alpha * gate) / alpha

    def scale(self, x: Array, factor: float) -> Array:
        """factor · x."""
        return factor * x

    def linear(self, x: Array, matrix: ExactMatrix) -> Array:
        """x W^T + bias."""
        return matrix.product(x)

    def heads(self, x: Array, dim: int) -> Array:
        """x (T, H·D) as (T, H, D)."""
        return x.reshape(len(x), -1, dim)

    def rope(self, x: Array, index: int = 0) -> Array:
        """x (T, H, D) rotated."""
        return rotate(x.swapaxes(0, 1), *self.angles[index]).swapaxes(0, 1)

    def attention(
        self, q: Array, k: Array, v: Array, layer: int, window: int | None, scale: float,
        softcap: float | None = None, sinks: Array | None = None,
    ) -> Array:  # fmt: skip
        """Causal attention of q (T, H, D) to k and v (T, KV, D) -> (T, H·D)."""
        return attention(q.swapaxes(0, 1), k.swapaxes(0, 1), v.swapaxes(0, 1), window, scale, softcap, sinks)

    def route(self, scores: Array, k: int, normalised: bool = True) -> tuple[NDArray[np.int64], Array]:
        """Experts and weights (T, k) of each token."""
        experts = np.argsort(-scores, axis=-1, kind="stable")[:, :k]
        chosen = np.take_along_axis(scores if normalised else softmax(scores), experts, axis=-1)
        return experts, softmax(chosen) if normalised else chosen

    def gather(self, x: Array, routing: tuple[NDArray[np.int64], Array]) -> Array:
        """Each token's row once for each of its experts, sorted by expert."""
        experts, _ = routing
        return np.concatenate([x[(experts == expert).any(axis=-1)] for expert in np.unique(experts)])

    def grouped_linear(self, x: Array, routing: tuple[NDArray[np.int64], Array], matrices: list[ExactMatrix]) -> Array:
        """Each expert's rows times its matrix."""
        experts, counts = np.unique(routing[0], return_counts=True)
        parts = np.split(x, np.cumsum(counts)[:-1])
        return np.concatenate([matrices[expert].product(part) for expert, part in zip(experts, parts, strict=True)])

    def combine(self, y: Array, routing: tuple[NDArray[np.int64], Array]) -> Array:
        """The weighted sum of each token's rows."""
        experts, weights = routing
        out = np.zeros((len(experts), y.shape[1]))
        used, counts = np.unique(experts, return_counts=True)
        for expert, part in zip(used, np.split(y, np.cumsum(counts)[:-1]), strict=True):
            chosen = experts == expert
            out[chosen.any(axis=-1)] += weights[chosen][:, None] * part
        return out

    def sigmoid_scale(self, x: Array, gate: Array) -> Array:
        """x · sigmoid(gate)."""
        return x * 0.5 * (1 + np.tanh(gate / 2))

    def boundary(self, x: Array) -> Array:
        """x, also appended to ``states``."""
        self.states.append(x)
        return x

    def call(self, x: Array, function: Callable[[Any], None]) -> Array:
        """x, after ``function`` has read or changed it."""
        function(x)
        return x

    def filled(self, x: Array, width: int, function: Callable[[Any, Any], None]) -> Array:
        """(T, width), filled by ``function(x, out)``."""
        out = np.empty((len(x), width))
        function(x, out)
        return out

    def name(self, x: Array, name: str) -> Array:
        """x, after its hook."""
        return self.call(x, self.hooks[name]) if name in self.hooks else x

    def last_rows(self, x: Array) -> Array:
        """All rows."""
        self.states.append(x)
        return x

    def logits(self, x: Array, head: ExactMatrix, softcap: float | None = None) -> Array:
        """x W^T."""
        logits = head.product(x)
        return logits if softcap is None else softcap * np.tanh(logits / softcap)


class ExactParameters:
    """The tensors of a checkpoint (anything with `.config` and `.tensor(name)`), converted as they are used."""

    exchange: Exchange = Alone()

    def __init__(self, checkpoint: Any) -> None:
        self.checkpoint = checkpoint

    def vector(self, name: str) -> Array:
        """A tensor in float64."""
        tensor = self.checkpoint.tensor(name)
        return np.asarray(tensor.float32(), dtype=np.float64).reshape(tensor.shape)

    def linear(self, name: str) -> Any:
        """A matrix of the checkpoint."""
        return _CheckpointMatrix(self, name)


class _CheckpointMatrix:
    """A matrix that is read when it is multiplied: the whole model in float64 needs no memory."""

    def __init__(self, parameters: ExactParameters, name: str) -> None:
        self.parameters, self.name = parameters, name

    def product(self, x: Array) -> Array:
        y = x @ self.parameters.vector(self.name).T
        bias = f"{self.name}_bias"
        return y + self.parameters.vector(bias) if bias in self.parameters.checkpoint else y

    def rows(self, ids: ArrayLike) -> Array:
        """Embeddings of token ids."""
        return np.asarray(self.parameters.vector(self.name)[np.asarray(ids)])


def reference_logits(checkpoint: Any, ids: ArrayLike, architecture: type[Decoder] = Decoder) -> Array:
    """Logits (T, V) of the token ids (T,) at positions 0 .. T-1, from anything with `.config` and `.tensor(name)`."""
    return reference_states(checkpoint, ids, architecture)[-1]


def reference_states(
    checkpoint: Any, ids: ArrayLike, architecture: type[Decoder] = Decoder, ops_type: type[Float64] = Float64
) -> list[Array]:
    """The residual stream (T, E) after the embedding and after each layer, and at last the logits (T, V)."""
    decoder: Any = architecture(checkpoint.config, ExactParameters(checkpoint))
    ops = ops_type(checkpoint.config, len(np.asarray(ids)))
    logits = decoder(ops, decoder.embed.rows(ids))
    return [*ops.states, logits]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x²) + eps) · weight over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def gelu(x: Array) -> Array:
    """The tanh approximation of x Φ(x)."""
    return x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x: Array) -> Array:
    """x · sigmoid(x), without overflow for large negative x."""
    return x * 0.5 * (1 + np.tanh(x / 2))


def softmax(x: Array) -> Array:
    """Over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the pairs (i, i + R/2) of x (heads, T, D) by the angles given as cos and sin (T, R/2), R <= D."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def attention(
    q: Array, k: Array, v: Array, window: int | None, scale: float | None = None, softcap: float | None = None,
    sinks: Array | None = None,
) -> Array:  # fmt: skip
    """Causal softmax(scale q kᵀ) v, (H, T, D) -> (T, H·D); scale 1 / √D by default.

    Query head h reads key/value head h·KV // H. softcap c: c tanh(score / c). sinks (H,): one more score of a head.
    """
    H, T, D = q.shape
    scores = attention_scores(q, k, window, 1 / np.sqrt(D) if scale is None else scale, softcap)
    return (attention_pattern(scores, sinks) @ np.repeat(v, H // len(v), axis=0)).swapaxes(0, 1).reshape(T, H * D)


def attention_scores(q: Array, k: Array, window: int | None, scale: float, softcap: float | None) -> Array:
    """Scores (H, T, S) of queries at the last T of S positions; -inf where a query does not see a position."""
    (H, T, _), S = q.shape, k.shape[1]
    query, key = np.arange(S - T, S)[:, None], np.arange(S)[None, :]
    seen = (key <= query) & (key > query - (window or S))
    scores = q @ np.repeat(k, H // len(k), axis=0).swapaxes(1, 2) * scale
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    return np.where(seen, scores, -np.inf)


def attention_pattern(scores: Array, sinks: Array | None) -> Array:
    """Weights of the positions, the softmax of scores (H, T, S); sinks (H,) take their share of it."""
    H, T, S = scores.shape
    if sinks is not None:
        scores = np.concatenate([scores, np.broadcast_to(sinks[:, None, None], (H, T, 1))], axis=-1)
    return softmax(scores)[..., :S]


def rope_angles(config: ModelConfig, tokens: int, index: int = 0) -> tuple[Array, Array]:
    """cos and sin (T, R/2) of position · inv_freq, times the attention factor; for a context of T tokens."""
    rope = config.ropes[index].for_context(tokens)
    angles = np.arange(tokens)[:, None] * inverse_frequencies(rope, rope.rotary_dim or config.head_dim)
    return rope.attention_factor * np.cos(angles), rope.attention_factor * np.sin(angles)


def inverse_frequencies(rope: RopeConfig, D: int) -> Array:
    """(D/2,) radians per position of each pair, under each kind of scaling."""
    theta = rope.theta * rope.factor ** (D / (D - 2)) if rope.scaling == "ntk" else rope.theta
    base = theta ** (-np.arange(0, D, 2) / D)
    if rope.scaling == "linear":
        return base / rope.factor
    if rope.scaling == "factors":
        return base / np.array(rope.factors)
    # Rotations of a pair within the original context: few (stretched by the factor) to many (left alone).
    rotations = rope.original_max_position * base / (2 * np.pi)
    if rope.scaling == "llama3":
        kept = np.clip((rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
        return base * (kept + (1 - kept) / rope.factor)
    if rope.scaling in YARN:
        fast, slow = (
            D * np.log(rope.original_max_position / (2 * np.pi * beta)) / (2 * np.log(theta))
            for beta in (rope.high_freq_factor, rope.low_freq_factor)
        )
        first, last = (np.floor(fast), np.ceil(slow)) if rope.scaling == "yarn" else (fast, slow)
        first, last = max(first, 0), min(last, D - 1)
        kept = 1 - np.clip((np.arange(D // 2) - first) / max(last - first, 0.001), 0, 1)
        return base * (kept + (1 - kept) / rope.factor)
    return base


if TYPE_CHECKING:
    _: type[Ops] = Float64
