"""Eager: each operation computes at once, on NumPy arrays: for debugging, hooks and swapped kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

import ruvllm.kernels as K
from ruvllm.kernels.attention.kv import append
from ruvllm.kernels.attention.prefill import attend_cache, scoring_of
from ruvllm.kernels.experts import Routing, combine_rows, route, sigmoid_scale_rows
from ruvllm.model.activations import Activations
from ruvllm.model.kv_cache import KVCache
from ruvllm.model.linear import Linear, require_group
from ruvllm.model.ops.protocol import Hooks

if TYPE_CHECKING:
    from ruvllm.model.low_rank import AdapterSet
    from ruvllm.model.ops import Ops


class Eager:
    """The operations of T tokens at ``positions`` (T,), whose rope angles are cos and sin (n, T, R/2).

    Subclass it to hook an operation: ``lab.drift`` overrides ``boundary``.

    Args:
        cache: keys and values of the sequence.
        positions: (T,) int64.
        cos, sin: (n, T, R/2) float32, of each of the model's rotary embeddings.
        scratch: a buffer for each thread, for attention.
        out: (rows, V) float32 for the logits of the last rows; None if none are wanted.
        adapters: what is added to each matrix.
    """

    def __init__(
        self, cache: KVCache, positions: np.ndarray, cos: np.ndarray, sin: np.ndarray, scratch: np.ndarray,
        out: np.ndarray | None, adapters: AdapterSet | None = None,
    ) -> None:  # fmt: skip
        self.cache, self.scratch, self.out = cache, scratch, out
        self.adapters = {} if adapters is None else adapters.matrices
        self.positions, self.cos, self.sin = positions, cos, sin
        self._inputs = Activations(0, 0)
        self.hooks: Hooks = {}

    def rms_norm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
        return K.rms_norm(x, weight, eps)

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """a + b."""
        return np.add(a, b)

    def silu_mul(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """silu(gate) * up."""
        return K.silu_mul(gate, up)

    def gelu_mul(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """gelu(gate) * up."""
        return K.gelu_mul(gate, up)

    def clamped_swiglu(self, gate: np.ndarray, up: np.ndarray, limit: float, alpha: float) -> np.ndarray:
        """(clamp(up) + 1) * g * sigmoid(alpha g), g = min(gate, limit)."""
        return K.clamped_swiglu(gate, up, limit, alpha)

    def scale(self, x: np.ndarray, factor: float) -> np.ndarray:
        """factor * x."""
        return K.scale(x, factor)

    def linear(self, x: np.ndarray, matrix: Linear) -> np.ndarray:
        """x W^T + bias + adapter."""
        return matrix(self._activations(x), adapter=self.adapters.get(matrix.name))

    def heads(self, x: np.ndarray, dim: int) -> np.ndarray:
        """x (T, H D) as (T, H, D)."""
        return x.reshape(len(x), -1, dim)

    def rope(self, x: np.ndarray, index: int = 0) -> np.ndarray:
        """x (T, H, D) rotated."""
        return K.apply_rope_tables(x, self.cos[index], self.sin[index])

    def attention(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, layer: int, window: int | None, scale: float,
        softcap: float | None = None, sinks: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Append k and v, then attention of q over the layer's cache -> (T, H D)."""
        cache, out = self.cache.of_layer(layer), np.empty_like(q)
        append(k, v, cache, self.positions)
        scoring = scoring_of(window, scale, softcap, sinks)
        attend_cache(q, cache, self.positions, scoring, out, self.scratch)
        return out.reshape(len(q), -1)

    def route(self, scores: np.ndarray, k: int, normalised: bool = True) -> Routing:
        """See ``kernels.experts``."""
        return route(scores, k, normalised)

    def gather(self, x: np.ndarray, routing: Routing) -> np.ndarray:
        """Each token's row once for each of its experts."""
        return x[routing.tokens]

    def grouped_linear(self, x: np.ndarray, routing: Routing, matrices: list[Linear]) -> np.ndarray:
        """Each expert's rows times its matrix."""
        require_group(matrices, self.adapters)
        out = np.empty((len(x), matrices[0].rows), np.float32)
        for expert, rows in routing.parts:
            matrices[expert](x[rows], out[rows])
        return out

    def combine(self, y: np.ndarray, routing: Routing) -> np.ndarray:
        """The weighted sum of each token's rows."""
        out = np.empty((len(routing.slots), y.shape[1]), np.float32)
        combine_rows(y, routing.slots, routing.weights, out, 0, len(out))
        return out

    def sigmoid_scale(self, x: np.ndarray, gate: np.ndarray) -> np.ndarray:
        """x / (1 + exp(-gate))."""
        out = np.empty_like(x)
        sigmoid_scale_rows(x, gate, out, 0, len(out))
        return out

    def boundary(self, x: np.ndarray) -> np.ndarray:
        """x."""
        return x

    def call(self, x: np.ndarray, function: Callable[[np.ndarray], None]) -> np.ndarray:
        """x, after ``function`` has read or changed it."""
        function(x)
        self._inputs = Activations(0, 0)  # the function may have changed what was rounded
        return x

    def filled(self, x: np.ndarray, width: int, function: Callable[[np.ndarray, np.ndarray], None]) -> np.ndarray:
        """(T, width), filled by ``function(x, out)``."""
        out = np.empty((len(x), width), np.float32)
        function(x, out)
        return out

    def name(self, x: np.ndarray, name: str) -> np.ndarray:
        """x, after its hook."""
        return self.call(x, self.hooks[name]) if name in self.hooks else x

    def last_rows(self, x: np.ndarray) -> np.ndarray:
        """The rows whose logits are wanted."""
        return x[len(x) - (0 if self.out is None else len(self.out)) :]

    def logits(self, x: np.ndarray, head: Linear, softcap: float | None = None) -> np.ndarray:
        """x W^T, into ``out``."""
        if self.out is None:
            return x
        logits = head(self._activations(x), self.out)
        return logits if softcap is None else K.softcap(logits, softcap, out=logits)

    def _activations(self, x: np.ndarray) -> Activations:
        """x with its 8-bit form, made once for all matrices that read it."""
        if self._inputs.x is not x:
            self._inputs = Activations(*x.shape).of(x)
        return self._inputs


if TYPE_CHECKING:
    _: type[Ops] = Eager
