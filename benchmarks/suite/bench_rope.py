"""Rotary position embedding of one head: angles computed in the call, and from tables."""

from typing import Any

import numpy as np

from ruvllm.kernels import apply_rope, apply_rope_tables, rope_tables


class Rope:
    """The seed's "RoPE Apply": cosines and sines are computed for each call."""

    version = "1"
    timeout = 60
    params: Any = ([64, 128], [1, 8, 32, 128])
    param_names = ("head_dim", "tokens")

    def setup(self, head_dim: int, tokens: int) -> None:
        self.x = np.random.default_rng(0).standard_normal((tokens, 1, head_dim), np.float32)
        self.positions, self.out = np.arange(tokens), np.empty_like(self.x)
        self.time_apply(head_dim, tokens)

    def time_apply(self, head_dim: int, tokens: int) -> None:
        apply_rope(self.x, self.positions, out=self.out)


class RopeTables(Rope):
    """The seed's "RoPE with Tables"."""

    def setup(self, head_dim: int, tokens: int) -> None:
        self.cos, self.sin = rope_tables(np.arange(tokens), head_dim)
        super().setup(head_dim, tokens)

    def time_apply(self, head_dim: int, tokens: int) -> None:
        apply_rope_tables(self.x, self.cos, self.sin, out=self.out)
