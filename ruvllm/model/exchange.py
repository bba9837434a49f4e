"""Exchange: what the ranks of a split model send each other within a layer, in the operations of ``ops``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

import ruvllm.kernels as K
from ruvllm.model.ops.protocol import Ops
from ruvllm.model.ranks import Ranks
from ruvllm.model.share import Share

WIRES = ("auto", "exact", "f32", "f16")


def require_wire(wire: object) -> None:
    """Raise ValueError unless it is one of WIRES."""
    if wire not in WIRES:
        raise ValueError(f"wire: expected one of {', '.join(WIRES)}, found {wire!r}")


class Exchange(Protocol):
    """Completes what one rank computed of a layer. ``of``: the ranges of a ``Share`` that x holds, as "columns"."""

    def inputs(self, ops: Ops, x: Any, of: str) -> Any:
        """The inputs of this rank's part of o or down."""
        ...

    def outputs(self, ops: Ops, x: Any) -> Any:
        """All outputs (T, E) of o or down, from this rank's part of the computation."""
        ...

    def row_norm(self, ops: Ops, x: Any, weight: np.ndarray, eps: float, of: str) -> Any:
        """RMSNorm over all heads together."""
        ...


class Alone:
    """One rank has the whole model: nothing is exchanged."""

    def inputs(self, ops: Ops, x: Any, of: str) -> Any:
        """x."""
        return x

    def outputs(self, ops: Ops, x: Any) -> Any:
        """x."""
        return x

    def row_norm(self, ops: Ops, x: Any, weight: np.ndarray, eps: float, of: str) -> Any:
        """RMSNorm of x."""
        return ops.rms_norm(x, weight, eps)


class Sums:
    """Each rank multiplies its own inputs by its columns of o and down; one all-reduce follows each.

    add: sums an array over the ranks, in place: ``Ranks.add``, or ``Ranks.add_halves``.
    """

    def __init__(self, ranks: Ranks, add: Callable[[np.ndarray], None]) -> None:
        self.ranks, self.add = ranks, add

    def inputs(self, ops: Ops, x: Any, of: str) -> Any:
        """x."""
        return x

    def outputs(self, ops: Ops, x: Any) -> Any:
        """The sum of all ranks' x."""
        return ops.call(x, self.add)

    def row_norm(self, ops: Ops, x: Any, weight: np.ndarray, eps: float, of: str) -> Any:
        """With the mean of all ranks' squares."""
        return ops.call(x, partial(self.ranks.rms_norm, weight=weight, eps=eps))


class Gathers:
    """Each rank multiplies all inputs by its rows of o and down; an all-gather precedes and follows each.

    Nothing is summed over ranks, so results have the bits of one rank's. Sums in another order differ by a unit in the
    last place, which rounding to 8 bits then turns into a step of 1/127: with integer weights, logits differ by 1.
    """

    def __init__(self, ranks: Ranks, shares: Sequence[Share]) -> None:
        self.ranks, self.mine = ranks, shares[ranks.rank]
        names = ("heads", "kv_heads", "columns", "expert_columns", "shared_columns", "outputs")
        self.cuts = {name: [share.elements(name) for share in shares] for name in names}

    def inputs(self, ops: Ops, x: Any, of: str) -> Any:
        """All ranks' x, concatenated."""
        return self._whole(ops, x, of)

    def outputs(self, ops: Ops, x: Any) -> Any:
        """All ranks' x, concatenated."""
        return self._whole(ops, x, "outputs")

    def _whole(self, ops: Ops, x: Any, of: str) -> Any:
        cuts = self.cuts[of]
        return ops.filled(x, cuts[-1].stop, partial(self.ranks.join, columns=cuts))

    def row_norm(self, ops: Ops, x: Any, weight: np.ndarray, eps: float, of: str) -> Any:
        """This rank's part of the normalised rows of all; the whole weight."""
        cuts, mine = self.cuts[of], self.mine.elements(of)

        def normalise(part: np.ndarray) -> None:
            whole, rows = np.empty((len(part), cuts[-1].stop), np.float32), part.reshape(len(part), -1)
            self.ranks.join(rows, whole, cuts)
            rows[...] = K.rms_norm(whole, weight, eps)[:, mine.start : mine.stop]

        return ops.call(x, normalise)


def exchange_of(ranks: Ranks, shares: Sequence[Share], wire: str) -> Exchange:
    """What suits the shares; ``wire``: one of WIRES, as ``divide`` had it."""
    if shares[ranks.rank].outputs is not None:
        return Gathers(ranks, shares)
    return Sums(ranks, ranks.add_halves if wire == "f16" else ranks.add)
