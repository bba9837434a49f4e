"""Linear: y = W x (+ bias, + an adapter's output), for W in any precision."""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np

from ruvllm.model.activations import Activations
from ruvllm.model.low_rank import LowRank
from ruvllm.model.weights import FloatWeights, IntegerWeights, WeightTensor, load_weights


class Linear:
    """y (T, N) = x (T, K) W^T + bias, on float or integer weights; ``name`` is its canonical name, "layers.3.q"."""

    def __init__(self, weights: FloatWeights | IntegerWeights, bias: np.ndarray | None = None, name: str = "") -> None:
        self.weights = weights
        self.bias = bias
        self.name = name

    @classmethod
    def load(cls, tensor: WeightTensor, layout: str, bias: WeightTensor | None = None, name: str = "") -> Linear:
        """Read, convert and pack a weight tensor (N, K) and its bias (N,)."""
        return cls(load_weights(tensor, layout), None if bias is None else bias.float32().reshape(-1).copy(), name)

    def __call__(
        self, x: Activations | np.ndarray, out: np.ndarray | None = None, adapter: LowRank | None = None
    ) -> np.ndarray:
        """W x + bias + adapter of x (T, K) as float32 (T, N), into ``out`` if given."""
        if isinstance(x, np.ndarray):
            x = Activations(*x.shape).of(x)
        if x.x.shape[1] != self.columns:
            raise ValueError(f"{self.name or 'linear'}: expected {self.columns} inputs, found {x.x.shape[1]}")
        if out is None:
            out = np.empty((len(x.x), self.rows), np.float32)
        self.weights.matmul(x, out)
        if self.bias is not None:
            out += self.bias
        if adapter is not None:
            adapter.add(x.x, out)
        return out

    def take(self, ids: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Rows ids (T,) int64 of W as (T, K) float32, into ``out`` if given: the embeddings of tokens."""
        return self.weights.take(ids, np.empty((len(ids), self.columns), np.float32) if out is None else out)

    @property
    def rows(self) -> int:
        """N, the number of outputs."""
        return self.weights.rows

    @property
    def columns(self) -> int:
        """K, the number of inputs."""
        return self.weights.columns

    @property
    def size(self) -> int:
        """N K, the number of weights."""
        return self.rows * self.columns

    @property
    def layout(self) -> str:
        """ "f32", "f16", "bf16", "int8" or "int4"."""
        return self.weights.layout

    @property
    def nbytes(self) -> int:
        """Bytes of weights and bias."""
        return self.weights.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __repr__(self) -> str:
        return f"Linear({self.columns} -> {self.rows}, {self.layout}{'' if self.bias is None else ', bias'})"


def require_group(matrices: Sequence[Linear], adapters: Container[str] = ()) -> None:
    """Raise ValueError unless experts' matrices can be multiplied as a group.

    They are of one shape and layout, all with a bias or none, and have no adapters.
    """
    first, kind = matrices[0], _kind(matrices[0])
    for matrix in matrices:
        if _kind(matrix) != kind:
            raise ValueError(
                f"{matrix.name or 'grouped_linear'}: expected a matrix like the first, {_described(first)}, "
                f"found {_described(matrix)}"
            )
        if matrix.name in adapters:
            raise ValueError(f"{matrix.name}: an expert's matrix cannot have an adapter")


def _kind(matrix: Linear) -> tuple[object, ...]:
    return matrix.rows, matrix.columns, matrix.weights.layout, matrix.weights.address()[1], matrix.bias is None


def _described(matrix: Linear) -> str:
    mins, bias = matrix.weights.address()[1], matrix.bias is not None
    return f"{matrix.columns} -> {matrix.rows}, {matrix.weights.layout}{' with mins' * mins}{', bias' * bias}"
