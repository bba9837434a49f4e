"""A named tensor in a file: its stored bytes, or its rows as float32, in stored or permuted order."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ruvllm.checkpoint.dequant import dequantize_rows, first_bad_scale
from ruvllm.checkpoint.groups import load_panels
from ruvllm.checkpoint.source import Readable
from ruvllm.checkpoint.storage import BLOCKS, SAFETENSORS_BITS, row_bytes
from ruvllm.errors import ModelFormatError
from ruvllm.kernels.quant.panels import Panels

_CHUNK_BYTES = 1 << 22  # raw bytes decoded at a time, so that a gathered or read copy stays small


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as its file describes it.

    ``shape`` is row-major (NumPy's order), ``type`` a storage type ("F32", "Q4_1"), ``offset`` the position of its
    first byte in the file, ``nbytes`` its length there.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


class Tensor:
    """A tensor of a file, viewed as ``rows`` rows of ``columns`` elements: leading axes folded, one row for a vector.

    Attributes: ``info``; ``name``; ``shape`` (row-major); ``dtype``, the storage type ("F32", "Q6_K"); ``rows``;
    ``columns``; ``row_bytes``; ``path`` of its file.

    Raises:
        ModelFormatError: the file stores it in a type that cannot be decoded.
    """

    def __init__(
        self, info: TensorInfo, source: Readable, index: npt.NDArray[np.intp] | None = None, by_element: bool = False
    ) -> None:
        if info.type not in BLOCKS:
            raise ModelFormatError(
                source.path,
                field=f"tensor {info.name!r} type",
                found=f"{info.type}, which is not supported",
                expected="one of " + ", ".join(kind for kind in SAFETENSORS_BITS if kind in BLOCKS),
                offset=info.offset,
            )
        self.info = info
        self._source = source
        self._index = index
        self._by_element = by_element
        self.path = source.path
        self.name = info.name
        self.dtype = info.type
        self.shape = info.shape
        if index is not None:
            self.shape = (len(index), *info.shape[1:])
        self.columns = self.shape[-1] if self.shape else 1
        self.rows = math.prod(self.shape[:-1])
        self.row_bytes = row_bytes(self.dtype, self.columns)

    def __repr__(self) -> str:
        return f"Tensor({self.name!r}, shape={self.shape}, dtype={self.dtype!r})"

    def raw(self, lo: int = 0, hi: int | None = None, checked: bool = True) -> npt.NDArray[np.uint8]:
        """The stored bytes of rows lo:hi, uint8 (hi - lo, row_bytes), read-only; scales are checked to be finite.

        A view of the file if it is mapped and the rows are in stored order; else a copy. checked: False where the
        caller looks at the scales.

        Raises:
            ModelFormatError: a block scale is NaN or infinite; names tensor, row and block.
            ValueError: lo, hi outside of the tensor.
        """
        lo, hi = self._range(lo, hi)
        if self._index is None or lo == hi:
            rows = self._stored(lo, hi)
        elif self._by_element:
            elements = self._source.read(self.info.offset, self.info.nbytes).reshape(self.info.shape[0], -1)
            rows = elements[self._index].reshape(1, -1)
        else:
            wanted = self._index[lo:hi]
            first = int(wanted.min())
            rows = self._stored(first, int(wanted.max()) + 1)[wanted - first]
        rows.flags.writeable = False
        if checked:
            self._check_scales(rows, lo)
        return rows

    def float32(
        self, lo: int = 0, hi: int | None = None, out: npt.NDArray[np.float32] | None = None
    ) -> npt.NDArray[np.float32]:
        """Rows lo:hi as float32 (hi - lo, columns), exact to the storage type; always two axes, also for a vector.

        Args:
            lo, hi: the rows; all by default.
            out: where to write, C-contiguous float32 of that shape; allocated if None.

        Raises:
            ModelFormatError: a block scale is NaN or infinite; names tensor, row and block.
            ValueError, TypeError: a wrong range or ``out``.
        """
        lo, hi = self._range(lo, hi)
        if out is None:
            out = np.empty((hi - lo, self.columns), np.float32)
        elif out.shape != (hi - lo, self.columns):
            raise ValueError(f"out must have the shape {(hi - lo, self.columns)}, not {out.shape}")
        step = max(1, _CHUNK_BYTES // max(self.row_bytes, 1))
        for start in range(lo, hi, step):
            stop = min(start + step, hi)
            dequantize_rows(self.dtype, self.raw(start, stop), self.columns, out[start - lo : stop - lo])
        return out

    def permuted(self, row_index: npt.ArrayLike) -> Tensor:
        """The tensor whose row i is row ``row_index[i]`` of this one; of a vector, whose element i is that element.

        Raises:
            ValueError: an index out of range, or a vector stored in blocks, whose elements cannot be moved.
        """
        index = np.asarray(row_index)
        length = self.shape[0] if self.shape else 0
        if index.ndim != 1 or index.dtype.kind not in "iu":
            raise ValueError(f"row_index must be a vector of integers, not {index.dtype} {index.shape}")
        if len(self.shape) not in (1, 2):
            raise ValueError(f"{self.name!r} has {len(self.shape)} axes; rows of 1 or 2 can be permuted")
        if len(self.shape) == 1 and BLOCKS[self.dtype][0] != 1:
            raise ValueError(f"{self.name!r} is a vector in blocks of {self.dtype}; its elements cannot be permuted")
        if index.size and not (0 <= int(index.min()) and int(index.max()) < length):
            raise ValueError(f"row_index must lie in 0:{length}, found {index.min()} to {index.max()}")
        index = index.astype(np.intp)
        if self._index is not None:
            index = self._index[index]
        return Tensor(self.info, self._source, index, by_element=len(self.shape) == 1)

    def expert(self, i: int) -> Tensor:
        """Part i of the first axis: the matrix (N, K) of one expert, if a file stacks them in one tensor (E, N, K).

        Its name is that of the whole with ``[i]`` after it. Nothing is read.

        Raises:
            ValueError: there is no such part, or the tensor is permuted.
        """
        if len(self.shape) < 2 or self._index is not None:
            raise ValueError(f"{self!r} has no experts: expected two axes or more, not permuted")
        if not 0 <= i < self.shape[0]:
            raise ValueError(f"expert must lie in 0:{self.shape[0]}, not {i}")
        whole = self.info
        nbytes = whole.nbytes // self.shape[0]
        part = TensorInfo(f"{whole.name}[{i}]", whole.shape[1:], whole.type, whole.offset + i * nbytes, nbytes)
        return Tensor(part, self._source)

    def reshaped(self, shape: tuple[int, ...]) -> Tensor:
        """The same elements in another shape, with the last axis as it is: (n,) as (1, n)."""
        if self._index is not None or math.prod(shape) != math.prod(self.shape) or shape[-1] != self.columns:
            raise ValueError(f"{self!r} cannot be seen as {shape}")
        return Tensor(replace(self.info, shape=shape), self._source)

    def quantized(self, layout: str) -> Panels:
        """The whole matrix as "int4" or "int8" panels: the file's own codes where it has such, else rounded."""
        self._source.prefetch(self.info.offset, self.info.nbytes)
        return load_panels(self, layout, symmetric=False)

    def release(self) -> None:
        """Tell the system that the tensor's mapped pages are not needed for now, to free memory."""
        self._source.release(self.info.offset, self.info.nbytes)

    def _range(self, lo: int, hi: int | None) -> tuple[int, int]:
        hi = self.rows if hi is None else hi
        if not 0 <= lo <= hi <= self.rows:
            raise ValueError(f"rows {lo}:{hi} are outside of {self.name!r}, which has {self.rows}")
        return lo, hi

    def _stored(self, lo: int, hi: int) -> npt.NDArray[np.uint8]:
        """Rows lo:hi in stored order."""
        start = self.info.offset + lo * self.row_bytes
        return self._source.read(start, (hi - lo) * self.row_bytes).reshape(hi - lo, self.row_bytes)

    def _check_scales(self, rows: npt.NDArray[Any], lo: int) -> None:
        bad = first_bad_scale(self.dtype, rows)
        if bad is None:
            return
        row, block, value = bad
        row = lo + row if self._index is None else int(self._index[lo + row])
        raise ModelFormatError(
            self.path,
            field=f"tensor {self.name!r} row {row} block {block} scale",
            found=value,
            expected="a finite number",
            offset=self.info.offset + row * self.row_bytes + block * BLOCKS[self.dtype][1],
        )
