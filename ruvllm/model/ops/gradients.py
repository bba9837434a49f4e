"""Gradients: layer code that runs with it computes the forward pass and records the backward pass.

Only adapters learn: base weights, norms and embedding are fixed. So a gradient flows through an operation only where
an adapter below it learns. Integer weights multiply activations rounded to 8 bits, as they do in generation; the
gradient passes through that rounding unchanged (Bengio et al. 2013, "straight-through").

What the backward pass reads is kept; norms and gated products, which are cheap, are recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

import ruvllm.kernels as K
from ruvllm.kernels.attention.flash import attend_sequence
from ruvllm.kernels.attention.prefill import scoring_of
from ruvllm.kernels.experts import Routing, combine_rows, route, sigmoid_scale_rows
from ruvllm.kernels.memory import aligned_empty
from ruvllm.kernels.training.attention import Batch, attention_gradients
from ruvllm.model.activations import Activations
from ruvllm.model.linear import Linear, require_group
from ruvllm.model.ops.node import Node

if TYPE_CHECKING:
    from ruvllm.model.ops import Ops


class Learner(Protocol):
    """The adapters of a training pass, as ``Gradients`` meets them."""

    def learns(self, name: str) -> bool:
        """Whether an adapter on this matrix learns."""
        ...

    def add(self, name: str, x: np.ndarray, out: np.ndarray) -> None:
        """out (T, N) += the output of the adapters on a matrix for x (T, K)."""
        ...

    def add_backward(self, name: str, dy: np.ndarray, dx: np.ndarray) -> None:
        """dx (T, K) += the gradient that flows back through the adapters on a matrix from dy (T, N)."""
        ...

    def accumulate(self, name: str, x: np.ndarray, dy: np.ndarray) -> None:
        """Add the gradients of the learning adapter's own matrices."""
        ...

    def loss(self, logits: np.ndarray, rows: slice, grad: np.ndarray | None) -> None:
        """The loss of some rows of logits; their gradient goes into ``grad``."""
        ...


class Gradients:
    """The operations of several concatenated sequences; only attention keeps them apart.

    Args:
        starts: (n + 1,) where each sequence begins, and T.
        cos, sin: (n, T, R/2) of each token's position in its sequence, of each of the model's rotary embeddings.
        learner: the adapters.
        rows: the tokens whose logits are wanted.
        keep: record the backward pass; else only the loss is computed.
        checkpointing: keep only the input of each layer, and run the layer again in the backward pass.
    """

    def __init__(
        self, starts: np.ndarray, cos: np.ndarray, sin: np.ndarray, learner: Learner, rows: np.ndarray, keep: bool,
        checkpointing: bool = False,
    ) -> None:  # fmt: skip
        self.starts, self.cos, self.sin = starts, cos, sin
        self.learner, self.rows, self.keep, self.checkpointing = learner, rows, keep, checkpointing
        self._noting = keep and not checkpointing
        self._stream: list[Node] = []  # what goes into each layer, and what comes out of the last
        self._way_back: list[Callable[[], None]] = []
        self._nodes: list[Node] = []  # those of the current layer
        self._inputs = Activations(0, 0)

    def backward(self, layers: Sequence[Callable[[Any, Any], Any]]) -> None:
        """Run all recorded steps, last first. layers: of the decoder, to run again with checkpointing."""
        self._run_back()
        if self.checkpointing:
            for layer, x, after in zip(layers[::-1], self._stream[-2::-1], self._stream[:0:-1], strict=True):
                if after.learns:
                    self._noting, leaf = True, Node(x.array, x.learns)
                    layer(self, leaf).receive(after.take())
                    self._run_back()
                    x.receive(leaf.take())

    def _run_back(self) -> None:
        while self._way_back:
            self._way_back.pop()()

    # Operations.

    def rms_norm(self, x: Node, weight: np.ndarray, eps: float) -> Node:
        """Over the last axis."""
        out = self._node(lambda: K.rms_norm(x.array, weight, eps), x, remake=True)

        def back() -> None:
            dx, add = x.target()
            K.rms_norm_backward(x.array, weight, out.take(), eps, add=add, out=dx)

        return self._noted(out, back, x)

    def add(self, a: Node, b: Node) -> Node:
        """a + b."""
        out = self._node(lambda: K.add(a.array, b.array), a, b)

        def back() -> None:
            dy = out.take()
            for x in (a, b):
                x.receive(dy, shared=True)

        return self._noted(out, back)

    def silu_mul(self, gate: Node, up: Node) -> Node:
        """silu(gate) * up."""
        out = self._node(lambda: K.silu_mul(gate.array, up.array), gate, up, remake=True)

        def back() -> None:
            for x, dx in zip((gate, up), K.silu_mul_backward(gate.array, up.array, out.take()), strict=True):
                x.receive(dx)

        return self._noted(out, back, gate, up)

    def gelu_mul(self, gate: Node, up: Node) -> Node:
        """gelu(gate) * up."""
        out = self._node(lambda: K.gelu_mul(gate.array, up.array), gate, up, remake=True)

        def back() -> None:
            x, dy = gate.array, out.take()
            # gelu(x) = x s(u), u = 2 sqrt(2/pi) (x + 0.044715 x^3), s the logistic function
            u, slope = _GELU * (x + _CUBIC * x**3), _GELU * (1 + 3 * _CUBIC * x * x)
            s = 1 / (1 + np.exp(-u))
            gate.receive(dy * up.array * (s + x * s * (1 - s) * slope))
            up.receive(dy * x * s)

        return self._noted(out, back, gate, up)

    def clamped_swiglu(self, gate: Node, up: Node, limit: float, alpha: float) -> Node:
        """(clamp(up) + 1) * g * sigmoid(alpha g), g = min(gate, limit)."""
        out = self._node(lambda: K.clamped_swiglu(gate.array, up.array, limit, alpha), gate, up, remake=True)

        def back() -> None:
            g, u, dy = np.minimum(gate.array, limit), np.clip(up.array, -limit, limit), out.take()
            s = 1 / (1 + np.exp(-np.float32(alpha) * g))
            gate.receive(dy * (u + 1) * (s + np.float32(alpha) * g * s * (1 - s)) * (gate.array <= limit))
            up.receive(dy * g * s * (abs(up.array) <= limit))

        return self._noted(out, back, gate, up)

    def scale(self, x: Node, factor: float) -> Node:
        """factor * x."""
        out = self._node(lambda: K.scale(x.array, factor), x)
        return self._noted(out, lambda: x.receive(K.scale(out.take(), factor)))

    def linear(self, x: Node, matrix: Linear) -> Node:
        """x W^T + bias + the adapters' output."""
        name = matrix.name
        y = aligned_empty((len(x.array), matrix.rows))
        matrix(self._activations(x.array), y)
        self.learner.add(name, x.array, y)
        out = self._node(lambda: y, x, learns=self.learner.learns(name))

        def back() -> None:
            dy = out.take().reshape(y_shape)
            if x.learns:
                dx, add = x.target()
                matrix.weights.matmul_transposed(dy, dx.reshape(len(dx), -1), add)
                self.learner.add_backward(name, dy, dx.reshape(len(dx), -1))
            if self.learner.learns(name):
                self.learner.accumulate(name, x.array, dy)

        y_shape = y.shape
        return self._noted(out, back, *([x] if self.learner.learns(name) else []))

    def heads(self, x: Node, dim: int) -> Node:
        """x (T, H D) as (T, H, D)."""
        out = self._node(lambda: x.array.reshape(len(x.array), -1, dim), x)
        return self._noted(out, lambda: x.receive(out.take()))

    def rope(self, x: Node, index: int = 0) -> Node:
        """x (T, H, D) rotated; the gradient is rotated back."""
        cos, sin = self.cos[index], self.sin[index]
        out = self._node(lambda: K.apply_rope_tables(x.array, cos, sin), x)
        return self._noted(out, lambda: x.receive(K.apply_rope_tables(out.take(), cos, sin, inverse=True)))

    def attention(
        self, q: Node, k: Node, v: Node, layer: int, window: int | None, scale: float,
        softcap: float | None = None, sinks: np.ndarray | None = None,
    ) -> Node:  # fmt: skip
        """Causal attention within each sequence -> (T, H D)."""
        attended, scoring = aligned_empty(q.shape), scoring_of(window, scale, softcap, sinks)
        for a, b in pairwise(self.starts):
            attend_sequence(q.array[a:b], k.array[a:b], v.array[a:b], True, scoring, attended[a:b])
        out = self._node(lambda: attended.reshape(len(attended), -1), q, k, v)

        def back() -> None:
            dy = out.take().reshape(q.shape)
            gradients = attention_gradients(Batch(q.array, k.array, v.array, dy, self.starts), scoring)
            for x, dx in zip((q, k, v), gradients, strict=True):
                x.receive(dx)

        return self._noted(out, back, q, k, v)

    def route(self, scores: Node, k: int, normalised: bool = True) -> tuple[Routing, Node]:
        """The k best experts of each token, and the node of their weights."""
        routing = route(scores.array, k, normalised)
        out = self._node(lambda: routing.weights, scores)

        def back() -> None:
            dw, w = out.take(), routing.weights
            experts = np.empty(len(routing.tokens), np.int64)
            for expert, rows in routing.parts:
                experts[rows] = expert
            experts = experts[routing.slots]
            total = np.sum(w * dw, axis=1, keepdims=True)
            dx = np.zeros(scores.shape, np.float32)
            if not normalised:  # every score has its share in the softmax
                e = np.exp(scores.array - scores.array.max(axis=1, keepdims=True))
                dx -= e / e.sum(axis=1, keepdims=True) * total
            for_chosen = w * (dw - total) if normalised else w * dw + np.take_along_axis(dx, experts, axis=1)
            np.put_along_axis(dx, experts, for_chosen, axis=1)
            scores.receive(dx)

        return routing, self._noted(out, back, *([] if normalised else [scores]))

    def gather(self, x: Node, routing: tuple[Routing, Node]) -> Node:
        """Each token's row once for each of its experts."""
        tokens, slots = routing[0].tokens, routing[0].slots
        out = self._node(lambda: x.array[tokens], x)

        def back() -> None:
            x.receive(out.take()[slots].sum(axis=1))

        return self._noted(out, back)

    def grouped_linear(self, x: Node, routing: tuple[Routing, Node], matrices: list[Linear]) -> Node:
        """Each expert's rows times its matrix."""
        require_group(matrices, [matrix.name for matrix in matrices if self.learner.learns(matrix.name)])
        parts = routing[0].parts
        y = aligned_empty((len(x.array), matrices[0].rows))
        for expert, rows in parts:
            matrices[expert](x.array[rows], y[rows])
        out = self._node(lambda: y, x)

        def back() -> None:
            dy, (dx, add) = out.take(), x.target()
            for expert, rows in parts:
                matrices[expert].weights.matmul_transposed(dy[rows], dx[rows], add)

        return self._noted(out, back)

    def combine(self, y: Node, routing: tuple[Routing, Node]) -> Node:
        """The weighted sum of each token's rows."""
        (tokens, slots, weights, _), weights_node = routing

        def forward() -> np.ndarray:
            combined = aligned_empty((len(slots), y.shape[1]))
            combine_rows(y.array, slots, weights, combined, 0, len(slots))
            return combined

        out = self._node(forward, y, weights_node)

        def back() -> None:
            dy = out.take()[tokens]
            of_rows = np.empty(len(tokens), np.float32)
            of_rows[slots] = weights
            weights_node.receive(np.sum(y.array * dy, axis=1)[slots])
            y.receive(of_rows[:, None] * dy)

        return self._noted(out, back, y)

    def sigmoid_scale(self, x: Node, gate: Node) -> Node:
        """x / (1 + exp(-gate))."""

        def forward() -> np.ndarray:
            scaled = aligned_empty(x.shape)
            sigmoid_scale_rows(x.array, gate.array, scaled, 0, len(scaled))
            return scaled

        out = self._node(forward, x, gate, remake=True)

        def back() -> None:
            dy, s = out.take(), 1 / (1 + np.exp(-gate.array))
            gate.receive(np.sum(dy * x.array, axis=1, keepdims=True) * s * (1 - s))
            x.receive(dy * s)

        return self._noted(out, back, x, gate)

    def boundary(self, x: Node) -> Node:
        """Between two layers: arrays that the backward pass does not read are freed."""
        self._begin(x)
        return x

    def call(self, x: Node, function: Callable[[np.ndarray], None]) -> Node:
        """x, after ``function`` has read it. Raises ValueError if it changed x: the change has no known gradient."""
        before = x.array.copy()
        function(x.array)
        if not np.array_equal(before, x.array, equal_nan=True):
            raise ValueError("call: a function may read values that a gradient flows through, not change them")
        return x

    def filled(self, x: Node, width: int, function: Callable[[np.ndarray, np.ndarray], None]) -> Node:
        """Raises ValueError: what Python fills has no known gradient."""
        raise ValueError("filled: a gradient cannot flow through what a function fills")

    def name(self, x: Node, name: str) -> Node:
        """x: training has no hooks."""
        return x

    def last_rows(self, x: Node) -> Node:
        """The rows whose logits are wanted."""
        self._begin(x)
        self._noting = self.keep
        rows = self.rows
        out = self._node(lambda: x.array[rows], x)

        def back() -> None:
            dx = np.zeros(x.shape, np.float32)
            dx[rows] = out.take()
            x.receive(dx)

        return self._noted(out, back)

    def logits(self, x: Node, head: Linear, softcap: float | None = None) -> Node:
        """The loss of each row, a few rows of logits at a time: all of them would be the largest array by far."""
        h, count = x.array, len(x.array)
        logits = aligned_empty((min(_LOGIT_ROWS, count), head.rows))
        dh = aligned_empty(h.shape) if self.keep and x.learns else None
        for lo in range(0, count, _LOGIT_ROWS):
            rows = slice(lo, min(count, lo + _LOGIT_ROWS))
            some = logits[: rows.stop - lo]
            head(Activations(*h[rows].shape).of(h[rows]), some)
            slope = None
            if softcap is not None:
                K.softcap(some, softcap, out=some)
                slope = 1 - (some / np.float32(softcap)) ** 2
            self.learner.loss(some, rows, None if dh is None else some)
            if dh is not None:
                if slope is not None:
                    some *= slope
                head.weights.matmul_transposed(some, dh[rows], False)
        if dh is not None:
            x.receive(dh)
        return x

    # How it is recorded.

    def _node(
        self, compute: Callable[[], np.ndarray], *inputs: Node, learns: bool = False, remake: bool = False
    ) -> Node:
        learns = learns or any(x.learns for x in inputs)
        node = Node(compute(), learns, compute if remake else None, inputs if remake else ())
        self._nodes.append(node)
        return node

    def _noted(self, out: Node, back: Callable[[], None], *read: Node) -> Node:
        """Record the backward step of an operation, and what it reads."""
        if self._noting and out.learns:
            for node in read:
                node.keep()
            self._way_back.append(back)
        return out

    def _begin(self, x: Node) -> None:
        """A layer begins with x: free the arrays of earlier layers that the backward pass does not read."""
        if self.checkpointing:
            x.keep()
        self._stream.append(x)
        for node in self._nodes:
            if node is not x:
                node.drop()
        self._nodes = [x]

    def _activations(self, x: np.ndarray) -> Activations:
        if self._inputs.x is not x:
            self._inputs = Activations(*x.shape).of(x)
        return self._inputs


_LOGIT_ROWS = 64  # rows whose logits exist at one time
_CUBIC = np.float32(0.044715)
_GELU = np.float32(2 * np.sqrt(2 / np.pi))

if TYPE_CHECKING:
    _: type[Ops] = Gradients
