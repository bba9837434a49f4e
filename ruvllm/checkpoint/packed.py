"""Weights that a safetensors file keeps in several tensors, as one tensor: its rows are assembled when read.

MXFP4 as in GPT-OSS: ``NAME_blocks`` (..., N, G, 16) uint8, two neighbouring elements per byte, the first in the low
half; ``NAME_scales`` (..., N, G) uint8, powers of two. Together NAME (..., N, 32 G) of type MXFP4. GPTQ and AWQ: see
``four_bits``. Source: transformers, integrations/mxfp4.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ruvllm.checkpoint.source import Source
from ruvllm.checkpoint.storage import row_bytes
from ruvllm.checkpoint.tensor import Tensor, TensorInfo
from ruvllm.errors import ModelFormatError
from ruvllm.kernels.jit.decorators import kernel

Array = np.ndarray[Any, Any]

_NUMPY = {"U8": "u1", "I32": "<i4", "F16": "<f2"}


class Part:
    """One of the tensors that a file keeps in place of a weight, of any type. Attributes: ``info``, ``source``."""

    def __init__(self, info: TensorInfo, source: Source) -> None:
        self.info, self.source = info, source
        self._held: Array | None = None

    def require(self, dtype: str, shape: tuple[int | None, ...]) -> None:
        """Raise ModelFormatError unless it has this type and shape; None means any length but 0."""
        found = self.info.shape
        if self.info.type != dtype:
            raise self.error("type", self.info.type, dtype)
        pairs = zip(found, shape, strict=False)
        if len(found) != len(shape) or not all(n == wanted if wanted is not None else n > 0 for n, wanted in pairs):
            wanted = ", ".join("any" if length is None else str(length) for length in shape)
            raise self.error("shape", found, f"({wanted})")

    def rows(self, lo: int, hi: int) -> Array:
        """Rows lo:hi of bytes, leading axes folded."""
        step = self.info.shape[-1]
        return self.source.read(self.info.offset + lo * step, (hi - lo) * step)

    def array(self) -> Array:
        """The whole tensor: a view of a mapped file; else it is read once and held until released."""
        if self._held is not None:
            return self._held
        raw = self.source.read(self.info.offset, self.info.nbytes)
        array = raw.view(_NUMPY[self.info.type]).reshape(self.info.shape)
        if not self.source.mapped:
            self._held = array
        return array

    def release(self) -> None:
        """It has been read: its pages may leave this process's memory."""
        self._held = None
        self.source.release(self.info.offset, self.info.nbytes)

    def error(self, what: str, found: object, expected: object) -> ModelFormatError:
        """An error that names this tensor."""
        return ModelFormatError(
            self.source.path, field=f"tensor {self.info.name!r} {what}".rstrip(), found=found, expected=expected,
            offset=self.info.offset,
        )  # fmt: skip


class PackedRows:
    """What a Tensor reads like a file: rows lo:hi (n, row_bytes), assembled by ``rows``."""

    def __init__(self, parts: tuple[Part, ...], row_bytes: int, rows: Callable[[int, int], Array]) -> None:
        self.path = parts[0].source.path
        self._parts, self._row_bytes, self._rows = parts, row_bytes, rows

    def read(self, offset: int, count: int) -> Array:
        """``count`` bytes from ``offset``, both multiples of a row's."""
        return self._rows(offset // self._row_bytes, (offset + count) // self._row_bytes).reshape(-1)

    def prefetch(self, offset: int, count: int) -> None:
        """The parts are needed now."""
        for part in self._parts:
            part.source.prefetch(part.info.offset, part.info.nbytes)

    def release(self, offset: int, count: int) -> None:
        """The parts may leave this process's memory."""
        for part in self._parts:
            part.release()


def packed_tensor(
    name: str, shape: tuple[int, ...], dtype: str, parts: tuple[Part, ...], rows: Callable[[int, int], Array]
) -> Tensor:
    """The tensor whose stored rows ``rows`` assembles from ``parts``."""
    width = row_bytes(dtype, shape[-1])
    info = TensorInfo(name, shape, dtype, 0, math.prod(shape[:-1]) * width)
    return Tensor(info, PackedRows(parts, width, rows))


@kernel(strict=True)
def mxfp4_rows(scales: Any, pairs: Any, out: Any) -> None:
    """Blocks out (n, 17): a scale, then codes j and j + 16 in a byte; pairs (n, 16) have codes 2j and 2j + 1 in one."""
    for i in range(out.shape[0]):
        x, y = pairs[i], out[i]
        y[0] = scales[i]
        for j in range(8):
            y[1 + 2 * j] = (x[j] & 15) | ((x[8 + j] & 15) << 4)
            y[2 + 2 * j] = (x[j] >> 4) | (x[8 + j] & 0xF0)


def mxfp4_tensor(name: str, blocks: Part, scales: Part) -> Tensor:
    """The MXFP4 tensor ``name`` of a file's blocks and scales.

    Raises:
        ModelFormatError: they are of other types, or their shapes do not match.
    """
    axes = max(len(blocks.info.shape), 3)
    blocks.require("U8", (*(None,) * (axes - 1), 16))
    scales.require("U8", blocks.info.shape[:-1])
    *lead, groups = scales.info.shape

    def rows(lo: int, hi: int) -> Array:
        powers = scales.rows(lo, hi)
        if (no_numbers := powers == 255).any():
            row, group = divmod(int(no_numbers.argmax()), groups)
            raise scales.error(f"row {lo + row} group {group}", "255, which means NaN", "0 to 254")
        out = np.empty((len(powers), 17), np.uint8)
        mxfp4_rows(powers, blocks.rows(lo * groups, hi * groups).reshape(-1, 16), out)
        return out

    return packed_tensor(name, (*lead, 32 * groups), "MXFP4", (blocks, scales), rows)
