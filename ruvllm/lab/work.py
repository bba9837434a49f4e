"""The work of a tape's rows: arithmetic, and bytes read and written.

The recorded layer code lists the operations of a model; this file counts the work of each. Profile, cost and report
use it, so that no formula repeats what a model computes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ruvllm.kernels import operations as o
from ruvllm.kernels import tape as t
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.tape import Operation
from ruvllm.model.config import ModelConfig
from ruvllm.model.kv_size import key_value_bytes
from ruvllm.model.ops.schedule import Step, Value
from ruvllm.model.weights import matrix_bytes

# Operations on rows: arithmetic, and bytes of activations, per element.
_ELEMENTS: dict[Operation, tuple[float, float]] = {
    o.rms_norm: (4, 8), o.add: (1, 12), o.silu_mul: (5, 12), o.gelu_mul: (9, 12), o.clamped_swiglu: (9, 12),
    o.scale: (1, 8), o.softcap: (5, 8), o.rope: (3, 8), o.quantize: (4, 5), o.add_bias: (1, 8), o.last_rows: (0, 8),
    o.broadcast: (0, 8), o.gather: (0, 8), o.merge: (2, 8), o.quantize_runs: (4, 5), o.add_grouped_bias: (1, 8),
    o.sigmoid_scale: (1, 8),
}  # fmt: skip


class Work(NamedTuple):
    """flops: arithmetic operations. weights, cached: bytes read of weights, of keys and values; moved: all others."""

    flops: float
    weights: float = 0.0
    cached: float = 0.0
    moved: float = 0.0

    @property
    def nbytes(self) -> float:
        """All bytes read and written."""
        return self.weights + self.cached + self.moved


def counted(steps: Iterable[Step], tokens: int, logits: int = 1) -> Iterator[tuple[Step, float]]:
    """The steps of a pass with their numbers of rows."""
    rows: dict[int, float] = {t.ONE: 1, t.TOKENS: tokens, t.LOGIT_ROWS: logits}
    for step in steps:
        routed = step.count - t.EACH  # experts of a token, of rows that are routed
        yield step, rows[step.count] if step.count in rows else float(tokens * routed)


def work_of(
    step: Step, rows: float, positions: np.ndarray, matrices: Mapping[Hashable, float], key_value: float
) -> Work:
    """The work of one step.

    Args:
        step: of a tape.
        rows: their number.
        positions: of the pass's tokens, ascending.
        matrices: bytes of each matrix by its name, of the two of its adapter by (name, "down") and (name, "up").
        key_value: bytes of a key and a value of one head in the cache.
    """
    a: dict[str, Any] = step.arguments
    if step.label in matrices:  # the first expert's for a grouped product
        return _product(rows, a["outputs"], a["columns"], _experts(rows, a) * matrices[step.label])
    if isinstance(a.get("weights"), tuple):  # an adapter's product
        outputs, columns = (a["panels"] * LANES, a["columns"]) if "panels" in a else (a["outputs"], a["rank"])
        return _product(rows, outputs, columns, matrices[a["weights"]])
    if "q" in a:
        # q with each visible position, twice; each key and value is read once, in blocks of LANES positions.
        query = a["heads"] * a["dim"]
        pairs = float(np.minimum(positions + 1, a["window"]).sum())
        read = int(positions[-1]) + 1 - max(0, int(positions[0]) + 1 - a["window"])
        cached = -(-read // LANES) * LANES * a["kv_heads"] * key_value
        return Work(4.0 * query * pairs, cached=cached, moved=8.0 * rows * query)
    if "kv_heads" in a:  # append
        return Work(0.0, moved=rows * a["kv_heads"] * (8.0 * a["dim"] + key_value))
    if step.operation is o.route:
        return Work(5.0 * rows * a["count"], moved=4.0 * rows * a["count"])
    if step.operation is o.combine:
        return Work(2.0 * rows * a["k"] * a["columns"], moved=4.0 * rows * (a["k"] + 1) * a["columns"])
    return _on_elements(step.operation, rows, a)


def _product(rows: float, outputs: int, columns: int, nbytes: float) -> Work:
    return Work(2.0 * rows * outputs * columns, weights=nbytes if rows else 0.0, moved=4.0 * rows * (outputs + columns))


def _experts(rows: float, a: Mapping[str, Any]) -> float:
    """The experts whose weights are read: as many as the rows can reach. 1 where all rows meet the same weights."""
    routing = a.get("routing")
    return min(rows, routing.dim) if isinstance(routing, Value) else 1.0


def _on_elements(operation: Operation, rows: float, a: Mapping[str, Any]) -> Work:
    flops, nbytes = _ELEMENTS[operation]
    vector = a["columns"] if operation is o.rms_norm else a.get("outputs", 0)  # a norm's weight, a bias
    width = a["heads"] * a["dim"] if "heads" in a else a.get("columns", vector) * a.get("vectors", 1)
    return Work(flops * rows * width, weights=4.0 * vector * _experts(rows, a), moved=nbytes * rows * width)


class PassWork(NamedTuple):
    """The work of a pass: arithmetic of its matrix products and of attention; bytes of weights, of keys and values.

    Element-wise arithmetic and activations, which stay in the caches, are small in comparison and left out.
    """

    products: float
    attention: float
    weights: float
    cached: float

    @property
    def flops(self) -> float:
        """All arithmetic."""
        return self.products + self.attention


def pass_work(config: ModelConfig, steps: Sequence[Step], layout: str, positions: np.ndarray, kv: str) -> PassWork:
    """The work of a pass at these positions, of which the last gets logits.

    Args:
        config: of the model.
        steps: of one pass through it, as ``replay.recorded`` returns them.
        layout: of all matrices.
        positions: ascending.
        kv: precision of the KV cache.
    """
    shapes = config.tensor_shapes()
    matrices: dict[Hashable, float] = {name: matrix_bytes(x, layout) for name, x in shapes.items() if len(x) == 2}
    products = attention = cached = 0.0
    weights = len(positions) * matrix_bytes((LANES, config.hidden_size), layout) / LANES  # rows of the embedding
    for step, rows in counted(steps, len(positions)):
        work = work_of(step, rows, positions, matrices, key_value_bytes(config, kv))
        products += work.flops if step.label in matrices else 0.0
        attention += work.flops if step.label == "attention" else 0.0
        weights += work.weights
        cached += work.cached
    return PassWork(products, attention, weights, cached)
