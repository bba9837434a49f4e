"""RopeTables: cosines and sines of every rotary embedding of a model, extended on demand."""

from __future__ import annotations

import numpy as np

from ruvllm.kernels.rope.frequencies import rope_inv_freq
from ruvllm.model.config import ModelConfig
from ruvllm.model.rope_config import RopeConfig

_FIRST = 1024  # the fewest positions of a table
_MOST_KEPT = 4  # tables for caches of different capacities


class RopeTables:
    """cos and sin (n, T, R/2) float32 of the n rotary embeddings of a configuration at positions 0, 1, 2 ..."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._ropes = config.ropes
        self.vary = any(rope.for_context(1 << 30) is not rope for rope in self._ropes)  # whether with the capacity
        self._made: dict[tuple[RopeConfig, ...], tuple[np.ndarray, np.ndarray]] = {}

    def kinds(self, capacity: int) -> tuple[RopeConfig, ...]:
        """The rotary embeddings for a KV cache of ``capacity`` positions: tokens of the same ones are comparable."""
        return tuple([rope.for_context(capacity) for rope in self._ropes]) if self.vary else self._ropes

    def upto(self, length: int, capacity: int) -> tuple[np.ndarray, np.ndarray]:
        """Tables of at least ``length`` positions for a KV cache of ``capacity`` positions."""
        ropes = self.kinds(capacity)
        cos, sin = self._made.get(ropes, (np.empty((1, 0, 1), np.float32),) * 2)
        if cos.shape[1] < length:
            positions = np.arange(max(length, _FIRST, 2 * cos.shape[1]))
            pairs = [angles(rope, positions, self.config.head_dim) for rope in ropes]
            cos, sin = (np.stack(tables) for tables in zip(*pairs, strict=True))
            self._made.pop(ropes, None)
            while len(self._made) >= _MOST_KEPT:
                del self._made[next(iter(self._made))]
            self._made[ropes] = cos, sin
        return cos, sin


def angles(rope: RopeConfig, positions: np.ndarray, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin (T, R/2) float32 of the angles at ``positions`` (T,), times the rope's attention factor."""
    turned = positions[:, None] * frequencies(rope, head_dim)
    factor = np.float32(rope.attention_factor)
    return np.cos(turned).astype(np.float32) * factor, np.sin(turned).astype(np.float32) * factor


def frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position (R/2,) of each pair, after a scaling that is one ``for_context``."""
    return rope_inv_freq(
        rope.rotary_dim or head_dim, rope.theta, rope.scaling, rope.factor, rope.low_freq_factor,
        rope.high_freq_factor, rope.original_max_position, rope.factors,
    )  # fmt: skip
