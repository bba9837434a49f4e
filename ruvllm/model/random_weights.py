"""Random weights of any configuration: models for tests, benchmarks and experiments without a file."""

from __future__ import annotations

import zlib

import numpy as np

from ruvllm.kernels.quant.layout import INT4, INT8
from ruvllm.kernels.quant.panels import Panels, empty_panels, pack_groups
from ruvllm.kernels.quant.weights import quantize_int4, quantize_int8
from ruvllm.kernels.threads.pool import PARALLEL_ELEMENTS, share_out, threads_for
from ruvllm.model.config import ModelConfig

_BLOCK = 256  # rows per random generator


class RandomTensor:
    """Normally distributed rows that depend only on seed, name and row: any range can be read at any time."""

    dtype = "F32"

    def __init__(self, name: str, shape: tuple[int, ...], seed: int) -> None:
        self.name = name
        self.shape = shape
        self._seed = (seed, zlib.crc32(name.encode()))

    def float32(self, lo: int = 0, hi: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Rows lo:hi of a matrix with deviation 1/sqrt(columns); a norm's vector is near one, a bias near zero."""
        if len(self.shape) == 1:
            noise = np.random.default_rng(self._seed).standard_normal(self.shape, np.float32) * np.float32(0.1)
            values = noise if self.name.endswith("bias") else noise + np.float32(1)
        else:
            hi = self.shape[0] if hi is None else hi
            first = lo // _BLOCK
            values = np.concatenate([self._rows(block) for block in range(first, -(-hi // _BLOCK))])
            values = values[lo - first * _BLOCK : hi - first * _BLOCK]
        if out is None:
            return values
        out[...] = values
        return out

    def quantized(self, layout: str) -> Panels:
        """The matrix rounded to "int4" (symmetric) or "int8" panels, a few rows at a time."""
        rows, columns = self.shape
        panels = empty_panels(INT4 if layout == "int4" else INT8, rows, columns, mins=False)

        def make(lo: int) -> None:
            hi = min(rows, lo + _BLOCK)
            x = self.float32(lo, hi)
            codes, scales = quantize_int4(x)[:2] if layout == "int4" else quantize_int8(x)
            pack_groups(codes, scales, None, panels.part(lo, hi))

        starts = range(0, rows, _BLOCK)
        share_out(make, starts, threads_for(rows * columns, PARALLEL_ELEMENTS, len(starts)))
        return panels

    def release(self) -> None:
        """There is nothing to release."""

    def _rows(self, block: int) -> np.ndarray:
        columns = self.shape[1]
        noise = np.random.default_rng((*self._seed, block)).standard_normal((_BLOCK, columns), np.float32)
        return noise * np.float32(columns**-0.5)


class RandomWeights:
    """Every tensor of a configuration, random."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self.config = config
        self._shapes = config.tensor_shapes()
        self._seed = seed

    def tensor(self, name: str) -> RandomTensor:
        """The tensor of a canonical name; KeyError if the configuration has none of that name."""
        return RandomTensor(name, self._shapes[name], self._seed)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes
