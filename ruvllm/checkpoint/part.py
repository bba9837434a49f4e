"""The part of a checkpoint that one of several ranks holds: rows and columns of its tensors."""

from __future__ import annotations

import numpy as np

from ruvllm.checkpoint.groups import load_panels
from ruvllm.checkpoint.loader import Checkpoint
from ruvllm.checkpoint.tensor import Tensor
from ruvllm.kernels.quant.panels import Panels
from ruvllm.model.share import Share
from ruvllm.model.weights import WeightTensor


class PartOfCheckpoint:
    """The tensors of a share; see ``model.share``. Nothing is read before a tensor is."""

    def __init__(self, checkpoint: Checkpoint, share: Share) -> None:
        self._checkpoint, self._share = checkpoint, share

    def tensor(self, name: str) -> WeightTensor:
        """The part of a tensor, by canonical name. Raises KeyError if this rank has none of it."""
        tensor, part = self._checkpoint.tensor(name), self._share.part(name)
        if part is None:
            raise KeyError(name)
        if part.rows is not None and len(part.rows) < tensor.shape[0]:
            tensor = tensor.permuted(np.arange(part.rows.start, part.rows.stop))
        if part.columns is not None and len(part.columns) < tensor.shape[1]:
            return ColumnsOfTensor(tensor, part.columns)
        return tensor

    def __contains__(self, name: str) -> bool:
        return name in self._checkpoint and self._share.part(name) is not None


class ColumnsOfTensor:
    """Some columns of a matrix. Whole rows are read; what is packed is what one rank would have packed."""

    def __init__(self, tensor: Tensor, columns: range) -> None:
        self.tensor, self.columns = tensor, columns
        self.shape: tuple[int, ...] = (tensor.shape[0], len(columns))
        self.dtype = tensor.dtype

    def float32(self, lo: int = 0, hi: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Rows lo:hi as float32."""
        rows = self.tensor.float32(lo, hi)[:, self.columns.start : self.columns.stop]
        if out is None:
            return np.ascontiguousarray(rows)
        out[...] = rows
        return out

    def quantized(self, layout: str) -> Panels:
        """The columns as integer panels. Raises ValueError where they begin within a group of 32."""
        return load_panels(self.tensor, layout, symmetric=False, columns=self.columns)

    def release(self) -> None:
        """It has been read: its mapped pages may leave this process's memory."""
        self.tensor.release()
