"""Adapters as the forward pass reads them: packed once when they are chosen, and then only pointed at."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ruvllm.kernels import forward as f
from ruvllm.kernels._memory import weights_empty
from ruvllm.kernels._tile import LANES
from ruvllm.kernels.low_rank import add_low_rank
from ruvllm.kernels.panels import halve, pack, panel_count

_HALF_MAX = 65504.0

Factors = tuple[np.ndarray, np.ndarray]  # down (R, K) and up (N, R), float32, scaling included


# Matrices that share an input, in the order in which a token meets them: the two parts of an adapter lie in memory as
# they are read, first parts before second parts, so that what is asked for ahead of time is what comes next.
_TOGETHER = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


class LowRank:
    """What is added to one matrix: out += (x down^T) up^T; down and up are panels of float32 or of IEEE half bits."""

    def __init__(self, down: np.ndarray, up: np.ndarray) -> None:
        self.down, self.up, self.rank = down, up, up.shape[1]
        layout = f.F16 if down.dtype == np.uint16 else f.F32
        self.numbers = np.array([layout, down.ctypes.data, up.ctypes.data, self.rank], np.int64)

    def add(self, x: np.ndarray, out: np.ndarray) -> None:
        """out (T, N) += what the adapter makes of x (T, K)."""
        add_low_rank(self.down, self.up, x, out)


class AdapterSet:
    """What is added to all matrices of a model at one moment. Never changed: to swap is to point at another set.

    Args:
        layers: of the model.
        modules: the matrices of a layer in the order of the layers' table.
        factors: of the matrices that have an adapter, by name.
        half: keep them in 16 bits.

    Raises:
        ValueError: numbers too large for 16 bits.
    """

    def __init__(self, layers: int, modules: tuple[str, ...], factors: Mapping[str, Factors], half: bool) -> None:
        if half:
            factors = {name: _balanced(*pair) for name, pair in factors.items()}
        dtype = np.uint16 if half else np.float32
        together = [[f"layers.{i}.{module}" for module in group] for i in range(layers) for group in _TOGETHER]
        parts = [(name, part) for group in together for part in (0, 1) for name in group if name in factors]
        sizes = [panel_count(len(factors[name][part])) * factors[name][part].shape[1] * LANES for name, part in parts]
        storage, at = weights_empty(sum(sizes), dtype), 0
        packed: dict[tuple[str, int], np.ndarray] = {}
        for (name, part), size in zip(parts, sizes, strict=True):
            packed[name, part] = _pack(factors[name][part], storage[at : at + size])
            at += size
        self.nbytes = storage.nbytes
        self.matrices = {name: LowRank(packed[name, 0], packed[name, 1]) for name in factors}
        self.rank = max((m.rank for m in self.matrices.values()), default=0)
        # Addresses in the columns of the layers' table.
        self.addresses = np.zeros((layers, len(modules)), np.int64)
        for name, matrix in self.matrices.items():
            _, layer, module = name.split(".")
            self.addresses[int(layer), modules.index(module)] = matrix.numbers.ctypes.data


def _balanced(down: np.ndarray, up: np.ndarray) -> Factors:
    """The same product, each rank's share of it of like size in both: exact, by powers of two."""
    a, b = np.abs(down).max(axis=1), np.abs(up).max(axis=0)
    used = (a > 0) & (b > 0)
    if not used.all():  # a rank that adds nothing
        down, up = np.where(used[:, None], down, 0), np.where(used, up, 0)
    ratio = np.divide(b, a, out=np.ones_like(a), where=used)
    step = np.exp2(np.rint(np.log2(ratio) / 2)).astype(np.float32)
    down, up = down * step[:, None], up / step
    largest = max(float(np.abs(down).max()), float(np.abs(up).max()))
    if largest > _HALF_MAX:
        raise ValueError(f"adapter: numbers up to {largest:g} do not fit 16 bits; load the model with weights='f32'")
    return down, up


def _pack(rows: np.ndarray, storage: np.ndarray) -> np.ndarray:
    """Rows (n, K) as panels (ceil(n / 16), K, 16) in ``storage``."""
    rows = np.ascontiguousarray(rows, np.float32)
    if storage.dtype == np.uint16:
        halves = np.empty(rows.shape, np.uint16)
        halve(rows.reshape(-1), halves.reshape(-1))
        rows = halves
    panels = storage.reshape(panel_count(len(rows)), rows.shape[1], LANES)
    pack(rows, panels)
    return panels
