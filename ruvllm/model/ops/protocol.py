"""Ops: the operations that layer code is written in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

Array = Any  # np.ndarray for Eager and Float64; Value for Recorder; Node for Gradients
Matrix = Any  # Linear, or its counterpart
Hooks = Mapping[str, Callable[[np.ndarray], None]]  # by the name of an array: functions that read or change it


class Ops(Protocol):
    """The operations of one pass of T tokens. Letters of axes are those of docs/contribute/layout.md."""

    def rms_norm(self, x: Array, weight: np.ndarray, eps: float) -> Array:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis: x (T, E), or (T, H, D) per head."""
        ...

    def add(self, a: Array, b: Array) -> Array:
        """a + b, both (T, E)."""
        ...

    def silu_mul(self, gate: Array, up: Array) -> Array:
        """silu(gate) * up (SwiGLU)."""
        ...

    def gelu_mul(self, gate: Array, up: Array) -> Array:
        """gelu(gate) * up, with the tanh approximation (GeGLU)."""
        ...

    def clamped_swiglu(self, gate: Array, up: Array, limit: float, alpha: float) -> Array:
        """(clamp(up) + 1) * g * sigmoid(alpha g), g = min(gate, limit)."""
        ...

    def scale(self, x: Array, factor: float) -> Array:
        """factor * x."""
        ...

    def linear(self, x: Array, matrix: Matrix) -> Array:
        """x W^T + bias + the adapters' output: x (T, K) -> (T, N)."""
        ...

    def heads(self, x: Array, dim: int) -> Array:
        """x (T, H D) seen as (T, H, D)."""
        ...

    def rope(self, x: Array, index: int = 0) -> Array:
        """x (T, H, D) rotated by the angles of the tokens' positions, of the model's rotary embedding ``index``."""
        ...

    def attention(
        self, q: Array, k: Array, v: Array, layer: int, window: int | None, scale: float,
        softcap: float | None = None, sinks: np.ndarray | None = None,
    ) -> Array:  # fmt: skip
        """Append k and v (T, KV, D) to the layer's cache; causal attention of q (T, H, D) over it -> (T, H D).

        softcap c: scores s become c tanh(s / c). sinks (H,): a score of each head that has no value.
        """
        ...

    def route(self, scores: Array, k: int, normalised: bool = True) -> Array:
        """The k best experts of each token by the router's scores (T, X), and their weights.

        normalised: softmax over the k chosen scores; else over all, of which the chosen ones keep their share.
        """
        ...

    def gather(self, x: Array, routing: Array) -> Array:
        """x (T, E) -> (T k, E): each token's row once for each of its experts, sorted by expert."""
        ...

    def grouped_linear(self, x: Array, routing: Array, matrices: list[Matrix]) -> Array:
        """Each row of x (T k, K), as ``gather`` sorted them, times its expert's matrix, + bias -> (T k, N).

        matrices: one for each expert, all of one shape and layout. Only those that have rows are read.
        """
        ...

    def combine(self, y: Array, routing: Array) -> Array:
        """For each token the weighted sum of its experts' rows of y (T k, E) -> (T, E)."""
        ...

    def sigmoid_scale(self, x: Array, gate: Array) -> Array:
        """x / (1 + exp(-gate)): x (T, E), gate (T, 1)."""
        ...

    def boundary(self, x: Array) -> Array:
        """Returns x. Between two layers: a pass may pause here, to see Ctrl-C."""
        ...

    def call(self, x: Array, function: Callable[[np.ndarray], None]) -> Array:
        """Returns x after Python's ``function`` has read or changed it in place: hooks, all-reduce."""
        ...

    def filled(self, x: Array, width: int, function: Callable[[np.ndarray, np.ndarray], None]) -> Array:
        """A new array (T, width) that Python's ``function(x, out)`` fills: all-gather."""
        ...

    def name(self, x: Array, name: str) -> Array:
        """Returns x, which is called ``name`` from here on: traces keep it and edits change it (``model.hooks``)."""
        ...

    def last_rows(self, x: Array) -> Array:
        """The rows of x whose logits are wanted: none, the last, or all."""
        ...

    def logits(self, x: Array, head: Matrix, softcap: float | None = None) -> Array:
        """x W^T: the result of the pass, (rows, V); softcap c: each becomes c tanh(logit / c)."""
        ...
