"""Linear: y = W x (+ bias) on weights packed once, at load."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from ruvllm.kernels._memory import aligned_empty
from ruvllm.kernels.decode import BF16, F16, F32
from ruvllm.kernels.panels import LANES, halve, linear_panels, pack, panel_count, unpack_row

_ROWS_AT_ONCE_BYTES = 4 << 20  # of float32 rows between file and panels: small beside the model, large beside a call

# How weights may be kept: the dtype of their panels. bfloat16 travels as int16, IEEE half as uint16.
LAYOUTS = {"f32": np.float32, "f16": np.uint16, "bf16": np.int16}


class WeightTensor(Protocol):
    """What a layer needs of a tensor on disk (``checkpoint.Tensor``) or of a random one."""

    shape: tuple[int, ...]
    dtype: str

    def float32(self, lo: int = 0, hi: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Rows lo:hi as float32."""
        ...


def layout_for(weights: str, dtype: str) -> str:
    """The layout for a tensor of type ``dtype`` under the user's choice ``weights``: "auto" keeps 16-bit floats."""
    if weights == "auto":
        return {"F16": "f16", "BF16": "bf16"}.get(dtype, "f32")
    return weights


def bytes_per_weight(layout: str) -> int:
    """Bytes of one weight in a layout."""
    return np.dtype(LAYOUTS[layout]).itemsize


class Linear:
    """y (T, N) = x (T, K) W^T + bias.

    The weights are panels (ceil(N / 16), K, 16), see ``kernels.panels``.
    """

    def __init__(self, panels: np.ndarray, rows: int, bias: np.ndarray | None = None) -> None:
        self.panels = panels
        self.rows = rows
        self.columns = panels.shape[1]
        self.bias = bias

    @classmethod
    def load(cls, tensor: WeightTensor, layout: str, bias: WeightTensor | None = None) -> Linear:
        """Read, convert and pack a weight tensor (N, K), a few rows at a time."""
        rows, columns = tensor.shape
        panels = aligned_empty((panel_count(rows), columns, LANES), LAYOUTS[layout])
        step = max(1, _ROWS_AT_ONCE_BYTES // (4 * columns * LANES)) * LANES
        for lo in range(0, rows, step):
            hi = min(rows, lo + step)
            part = _converted(tensor.float32(lo, hi), layout)
            pack(part, panels[lo // LANES : panel_count(hi)])
        return cls(panels, rows, None if bias is None else bias.float32().reshape(-1).copy())

    def __call__(self, x: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Write W x + bias of x (T, K) into out (T, N)."""
        linear_panels(self.panels, x, out)
        if self.bias is not None:
            out += self.bias
        return out

    def row(self, i: int) -> np.ndarray:
        """Row i of W as (K,) float32: the embedding of token i."""
        return unpack_row(self.panels, i)

    def address_fields(self) -> list[int]:
        """The matrix's row in a table of addresses (kernels.decode): layout, weights, ..., bias, rows, columns."""
        layout = {"f32": F32, "f16": F16, "bf16": BF16}[self.layout]
        bias = 0 if self.bias is None else self.bias.ctypes.data
        return [layout, self.panels.ctypes.data, 0, 0, 0, bias, self.rows, self.columns]

    @property
    def layout(self) -> str:
        """ "f32", "f16" or "bf16"."""
        return next(name for name, dtype in LAYOUTS.items() if self.panels.dtype == dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of weights and bias."""
        return self.panels.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __repr__(self) -> str:
        return f"Linear({self.columns} -> {self.rows}, {self.layout}{'' if self.bias is None else ', bias'})"


def _converted(rows: np.ndarray, layout: str) -> np.ndarray:
    """Float32 rows in the dtype of a layout. From files of 16-bit floats this is exact."""
    if layout == "f16":
        halves = np.empty(rows.shape, np.uint16)
        halve(np.ascontiguousarray(rows).reshape(-1), halves.reshape(-1))
        return halves
    if layout == "bf16":
        return _round_to_bf16(rows)
    return np.ascontiguousarray(rows)


def _round_to_bf16(rows: np.ndarray) -> np.ndarray:
    """Nearest bfloat16, ties to even, as int16 bits. NaN stays NaN."""
    bits: Any = np.ascontiguousarray(rows).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(rows), quiet_nan, rounded).astype(np.uint16).view(np.int16)
