"""Tensors that are computed from those of a file when they are read: transposed, or with a constant added."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import numpy.typing as npt

from ruvllm.checkpoint.source import Source
from ruvllm.checkpoint.tensor import Tensor, TensorInfo


class _Computed:
    """The bytes of an array that is computed when it is read and freed when it is released."""

    def __init__(self, tensor: Tensor, make: Callable[[Tensor], npt.NDArray[np.float32]]) -> None:
        self.path = tensor.path
        self._tensor, self._make = tensor, make
        self._bytes: npt.NDArray[np.uint8] | None = None

    def read(self, offset: int, count: int) -> npt.NDArray[np.uint8]:
        """``count`` bytes from ``offset`` on."""
        if self._bytes is None:
            made = np.ascontiguousarray(self._make(self._tensor), np.float32)
            self._bytes = made.reshape(-1).view(np.uint8)
            self._bytes.flags.writeable = False
        return self._bytes[offset : offset + count]

    def prefetch(self, offset: int, count: int) -> None:
        """It is computed when it is read."""

    def release(self, offset: int, count: int) -> None:
        """Free the array, and release the file's pages."""
        self._bytes = None
        self._tensor.release()


def _computed(
    tensor: Tensor, shape: tuple[int, ...], make: Callable[[Tensor], npt.NDArray[np.float32]]
) -> Tensor:
    count = int(np.prod(shape))
    return Tensor(TensorInfo(tensor.name, shape, "F32", 0, 4 * count), cast(Source, _Computed(tensor, make)))


def transposed(tensor: Tensor) -> Tensor:
    """A matrix (K, N) as (N, K), in float32."""
    return _computed(tensor, tensor.shape[::-1], lambda matrix: matrix.float32().T)


def shifted(tensor: Tensor, offset: float) -> Tensor:
    """A tensor plus a constant, in float32."""
    return _computed(tensor, tensor.shape, lambda values: values.float32() + np.float32(offset))
