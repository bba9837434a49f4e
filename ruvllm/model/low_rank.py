"""Adapters as the forward pass reads them: packed once when chosen, then shared."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ruvllm.kernels.lora.packed import add_low_rank
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.matmul.panels import pack, panel_count
from ruvllm.kernels.memory import weights_empty

_LARGEST = np.float32(127)  # the largest code

Factors = tuple[np.ndarray, np.ndarray]  # down (R, K) and up (N, R), float32, scaling included


# Matrices that share an input, in the order of a token's pass. Adapters are stored in the order in which they are read,
# all first parts before the second parts, so that hardware prefetching fetches what comes next.
_TOGETHER = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


class LowRank:
    """The adapter of one matrix: out += (scales * (x down^T)) up^T; down and up are panels of float32 or of int8."""

    def __init__(self, down: np.ndarray, up: np.ndarray, scales: np.ndarray) -> None:
        self.down, self.up, self.scales, self.rank = down, up, scales, up.shape[1]

    def add(self, x: np.ndarray, out: np.ndarray) -> None:
        """out (T, N) += the adapter's output for x (T, K)."""
        add_low_rank(self.down, self.scales, self.up, x, out)


class AdapterSet:
    """The adapters of all matrices of a model. Immutable: a swap installs another set.

    Args:
        layers: of the model.
        factors: of the matrices that have an adapter, by name.
        rounded: keep them in 8 bits, with one scale for each rank: they are read with every token. The error of an
            element is at most 1/254 of its rank's largest; an adapter's output usually changes by 1 or 2 %.
        held: cuts factors to what a model's matrices hold, after rounding, so that parts have the numbers of the whole.

    Raises:
        ValueError: elements too large for float32.
    """

    def __init__(
        self, layers: int, factors: Mapping[str, Factors], rounded: bool,
        held: Callable[[str, Factors], Factors] = lambda name, whole: whole,
    ) -> None:  # fmt: skip
        scales = {name: np.ones(panel_count(len(down)) * LANES, np.float32) for name, (down, _) in factors.items()}
        if rounded:
            factors = {name: _rounded(*pair, scales[name]) for name, pair in factors.items()}
        factors = {name: held(name, pair) for name, pair in factors.items()}
        dtype = np.int8 if rounded else np.float32
        together = [[f"layers.{i}.{module}" for module in group] for i in range(layers) for group in _TOGETHER]
        parts = [(name, part) for group in together for part in (0, 1) for name in group if name in factors]
        sizes = [panel_count(len(factors[name][part])) * factors[name][part].shape[1] * LANES for name, part in parts]
        storage, at = weights_empty(sum(sizes), dtype), 0
        packed: dict[tuple[str, int], np.ndarray] = {}
        for (name, part), size in zip(parts, sizes, strict=True):
            packed[name, part] = _pack(factors[name][part], storage[at : at + size])
            at += size
        self.nbytes = storage.nbytes
        self.matrices = {name: LowRank(packed[name, 0], packed[name, 1], scales[name]) for name in factors}
        self.rank = max((m.rank for m in self.matrices.values()), default=0)


def _rounded(down: np.ndarray, up: np.ndarray, scales: np.ndarray) -> Factors:
    """Both as int8; ``scales`` gets the factor of each rank's product."""
    a, b = np.abs(down).max(axis=1) / _LARGEST, np.abs(up).max(axis=0) / _LARGEST
    with np.errstate(over="ignore"):
        scales[: len(a)] = a * b
    if not np.isfinite(scales).all():
        raise ValueError("adapter: expected elements whose products fit into float32, found larger ones")
    a, b = np.where(a > 0, a, 1), np.where(b > 0, b, 1)  # 1 for a rank that adds nothing
    down, up = (np.clip(np.rint(x), -_LARGEST, _LARGEST) for x in (down / a[:, None], up / b))
    return down.astype(np.int8), up.astype(np.int8)


def _pack(rows: np.ndarray, storage: np.ndarray) -> np.ndarray:
    """Rows (n, K) as panels (ceil(n / 16), K, 16) in ``storage``."""
    panels = storage.reshape(panel_count(len(rows)), rows.shape[1], LANES)
    pack(np.ascontiguousarray(rows, storage.dtype), panels)
    return panels
