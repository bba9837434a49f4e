"""Activations: the input of linear layers, with its 8-bit form made once for all layers that share it."""

from __future__ import annotations

import numpy as np

from ruvllm.kernels.memory import aligned_empty
from ruvllm.kernels.quant.activations import round_activations
from ruvllm.kernels.quant.layout import BLOCK_TOKENS, GROUP, OFFSETS, OUTLIERS, Rounded, token_blocks


class Activations:
    """Inputs of up to ``tokens`` x ``columns``; buffers are allocated once and refilled by ``of``."""

    def __init__(self, tokens: int, columns: int) -> None:
        n = -(-columns // GROUP) * (tokens + BLOCK_TOKENS)  # groups; the last block may not be full
        self._codes = aligned_empty(n * GROUP, np.int8)
        self._scales, self._totals = aligned_empty(n), aligned_empty(n)
        self._offsets = aligned_empty(n * OFFSETS, np.int32)
        self._outliers = aligned_empty((tokens, OUTLIERS, 2))
        self._rounded: Rounded | None = None
        self.x = np.empty((0, columns), np.float32)

    def of(self, x: np.ndarray) -> Activations:
        """These activations now are x (T, K)."""
        self.x = x
        self._rounded = None
        return self

    def rounded(self) -> Rounded:
        """x in 8 bits (see ``kernels.quant.matmul``), computed on first use."""
        if self._rounded is None:
            T = len(self.x)
            B, S = token_blocks(T)
            shape = B, -(-self.x.shape[1] // GROUP), S
            n = B * shape[1] * S
            self._rounded = Rounded(
                self._codes[: n * GROUP].reshape(*shape, GROUP), self._scales[:n].reshape(shape),
                self._offsets[: n * OFFSETS].reshape(*shape, OFFSETS), self._totals[:n].reshape(shape),
                self._outliers[:T],
            )  # fmt: skip
            round_activations(self.x, self._rounded)
        return self._rounded
