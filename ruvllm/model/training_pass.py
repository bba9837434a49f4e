"""A training pass: the loss of an adapter on a batch of sequences, and its gradient (``ops.gradients``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

import ruvllm.kernels as K
from ruvllm.brief import brief
from ruvllm.kernels.threads.pool import limited_to
from ruvllm.model.exchange import Alone
from ruvllm.model.llama import Llama
from ruvllm.model.lora_adapter import TARGETS, LoraAdapter
from ruvllm.model.low_rank import Factors
from ruvllm.model.ops.gradients import Gradients
from ruvllm.model.ops.node import Node

NO_TARGET = -1


@dataclass(frozen=True)
class Batch:
    """Sequences, concatenated.

    ids: (T,) token ids. targets: (T,) the id that each position should predict, or NO_TARGET. starts: (n + 1,) where
    each sequence begins, and T.
    """

    ids: np.ndarray
    targets: np.ndarray
    starts: np.ndarray

    __repr__ = brief

    def sequences(self, first: int, step: int) -> Batch | None:
        """Sequences first, first + step, ... as a batch; None if there are none."""
        spans = list(pairwise(self.starts.tolist()))[first::step]
        if not spans:
            return None
        ids, targets = (np.concatenate([x[lo:hi] for lo, hi in spans]) for x in (self.ids, self.targets))
        return Batch(ids, targets, np.cumsum([0, *(hi - lo for lo, hi in spans)]))


class TrainingPass:
    """The loss of an adapter on a model, and its gradient; the ``Learner`` of ``ops.gradients``.

    Args:
        model: its weights stay frozen.
        adapter: what learns.
        fixed: other adapters that are active, as ``MicroLora`` mixes them.
        checkpointing: keep only the input of each layer and recompute the rest; the results are the same, from a
            tenth of the memory.
    """

    def __init__(
        self, model: Llama, adapter: LoraAdapter, fixed: Mapping[str, Factors] | None = None,
        checkpointing: bool = False,
    ) -> None:  # fmt: skip
        if not isinstance(model.exchange, Alone):
            raise ValueError("training: expected a whole model on each rank, found one that is split over them")
        self.model, self.adapter, self.checkpointing = model, adapter, checkpointing
        self._fixed = {
            name: (np.ascontiguousarray(down.T), np.ascontiguousarray(up.T))
            for name, (down, up) in (fixed or {}).items()
        }
        self._dropout: np.random.SeedSequence | None = None
        self._targets = self._losses = np.empty(0)
        self._scale = 0.0
        self._grad_a: dict[str, np.ndarray] = {}
        self._grad_b: dict[str, np.ndarray] = {}

    def losses(self, batch: Batch) -> np.ndarray:
        """The negative log-likelihood of each target, in nats, in their order: (number of targets,) float32."""
        self._run(batch, keep=False)
        return self._losses

    def gradients(
        self, batch: Batch, into: np.ndarray, scale: float, dropout_seed: tuple[int, ...] | None = None
    ) -> np.ndarray:
        """Add ``scale`` times the gradient of the summed loss to ``into``, laid out as ``adapter.parameters``.

        dropout_seed: seeds the adapter's dropout; None for no dropout.

        Returns:
            The loss of each target.
        """
        seeded = dropout_seed is not None and self.adapter.config.dropout > 0
        self._dropout = np.random.SeedSequence(dropout_seed) if seeded else None
        self._scale, (self._grad_a, self._grad_b) = scale, self.adapter.views(into)
        self._run(batch, keep=True)
        return self._losses

    def _run(self, batch: Batch, keep: bool) -> None:
        """Forward through the decoder, and back."""
        positions = np.concatenate([np.arange(b - a) for a, b in pairwise(batch.starts)])
        longest = int(positions.max()) + 1
        cos, sin = (table[:, positions] for table in self.model.rope.upto(longest, longest))
        rows = np.flatnonzero(batch.targets != NO_TARGET)
        self._targets, self._losses = batch.targets[rows], np.empty(len(rows), np.float32)
        ops = Gradients(batch.starts, cos, sin, self, rows, keep, self.checkpointing)
        decoder = self.model.decoder
        with limited_to(self.model.threads):
            decoder(ops, Node(self.model.embedded(batch.ids), learns=False))
            if keep:
                ops.backward(decoder.layers)

    # The ``Learner`` of ``Gradients``.

    def learns(self, name: str) -> bool:
        """Whether the adapter that learns sits on this matrix."""
        return name in self.adapter.a

    def add(self, name: str, x: np.ndarray, out: np.ndarray) -> None:
        """out (T, N) += the output of the fixed adapters and the learning one for x (T, K)."""
        if name in self._fixed:
            K.lora_forward_add(x, *self._fixed[name], 1.0, out)
        if self.learns(name):
            inputs, scaling = self._dropped(name, x), self.adapter.config.scaling
            K.lora_forward_add(inputs, self.adapter.a[name], self.adapter.b[name], scaling, out)

    def add_backward(self, name: str, dy: np.ndarray, dx: np.ndarray) -> None:
        """dx (T, K) += the gradient that flows back through the adapters on a matrix from dy (T, N)."""
        if name in self._fixed:
            a, b = self._fixed[name]
            K.lora_forward_add(dy, np.ascontiguousarray(b.T), np.ascontiguousarray(a.T), 1.0, dx)
        if self.learns(name):
            a, b = self.adapter.a[name], self.adapter.b[name]
            a_t, b_t = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
            mask, scaling = self._mask(name, dx.shape), self.adapter.config.scaling
            if mask is None:
                K.lora_forward_add(dy, b_t, a_t, scaling, dx)
            else:
                dx += mask * K.lora_forward(dy, b_t, a_t, scaling)

    def accumulate(self, name: str, x: np.ndarray, dy: np.ndarray) -> None:
        """Add the gradients of A and B on a matrix, from its input x (T, K) and dy (T, N)."""
        a, b, scaling = self.adapter.a[name], self.adapter.b[name], self.adapter.config.scaling
        K.lora_accumulate_grad(self._dropped(name, x), dy, a, b, scaling, self._grad_a[name], self._grad_b[name])

    def loss(self, logits: np.ndarray, rows: slice, grad: np.ndarray | None) -> None:
        """The loss of some targets, and its gradient times the scale; ``grad`` may be ``logits``."""
        scale = 0.0 if grad is None else self._scale
        self._losses[rows], _ = K.cross_entropy(logits, self._targets[rows], scale, grad=logits)

    def _mask(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """The factors of an adapter's inputs under dropout, the same forward and backward; None for no dropout."""
        if self._dropout is None:
            return None
        entropy = self._dropout.entropy
        assert isinstance(entropy, tuple)
        _, layer, module = name.split(".")
        rng = np.random.default_rng((*entropy, int(layer), TARGETS.index(module)))
        p = self.adapter.config.dropout
        return (rng.random(shape, np.float32) >= p) / np.float32(1 - p)

    def _dropped(self, name: str, x: np.ndarray) -> np.ndarray:
        """x (T, K) after the dropout of a matrix's adapter."""
        mask = self._mask(name, x.shape)
        return x if mask is None else x * mask
