"""Node: an array of a training pass, and the gradient that arrives at it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import ruvllm.kernels as K
from ruvllm.kernels.memory import aligned_empty


class Node:
    """An array of the forward pass, and the gradient that arrives at it.

    learns: whether an adapter before it learns, so that it needs a gradient. remake: recomputes the array from
    ``sources``; it is then freed after its layer.
    """

    def __init__(
        self, array: np.ndarray, learns: bool, remake: Callable[[], np.ndarray] | None = None,
        sources: tuple[Node, ...] = (),
    ) -> None:  # fmt: skip
        self.shape, self.learns, self.remake, self.sources = array.shape, learns, remake, sources
        self._array: np.ndarray | None = array
        self.kept = False  # whether the backward pass reads it
        self._gradient: np.ndarray | None = None
        self._shared = False  # whether the gradient's array is another node's too

    @property
    def array(self) -> np.ndarray:
        """Its value."""
        if self._array is None:
            assert self.remake is not None
            self._array = self.remake()
        return self._array

    def keep(self) -> Node:
        """Keep the array for the backward pass."""
        self.kept = True
        if self.remake is not None:
            for source in self.sources:
                source.keep()
        return self

    def drop(self) -> None:
        """Free the array, if nothing reads it again or it can be recomputed."""
        if not self.kept or self.remake is not None:
            self._array = None

    def target(self) -> tuple[np.ndarray, bool]:
        """Where to write a gradient, and whether it is to be added to what is there."""
        if self._gradient is None:
            self._gradient, self._shared = aligned_empty(self.shape), False
            return self._gradient, False
        if self._shared:
            self._gradient, self._shared = self._gradient.copy(), False
        return self._gradient, True

    def receive(self, gradient: np.ndarray, shared: bool = False) -> None:
        """Adopt a gradient, or add it; shared: others hold the array too."""
        if not self.learns:
            return
        if self._gradient is None:
            self._gradient, self._shared = gradient.reshape(self.shape), shared
        else:
            into, _ = self.target()
            K.add(into, gradient.reshape(self.shape), out=into)

    def take(self) -> np.ndarray:
        """The gradient, complete; it is no longer held."""
        gradient, self._gradient = self._gradient, None
        return np.zeros(self.shape, np.float32) if gradient is None else gradient
