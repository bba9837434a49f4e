"""The layouts of a weight matrix in memory: panels of floats, or panels of 4- or 8-bit groups; packed once, at load."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.matmul.panels import halve, linear_panels, pack, panel_count, take_rows
from ruvllm.kernels.memory import weights_empty
from ruvllm.kernels.quant.layout import GROUP, INT4, INT5, INT8, block_bytes
from ruvllm.kernels.quant.matmul import linear_quant
from ruvllm.kernels.quant.panels import Panels, take_quant_rows
from ruvllm.kernels.threads.pool import PARALLEL_ELEMENTS, share_out, threads_for
from ruvllm.kernels.training.transposed import linear_transposed, quant_transposed
from ruvllm.model.activations import Activations
from ruvllm.model.config import ModelConfig

_PACK_BYTES = 1 << 19  # bytes of float32 rows between file and panels: small for the model, large for a call

# bfloat16 travels as int16, IEEE half as uint16.
FLOAT_LAYOUTS: dict[str, Any] = {"f32": np.float32, "f16": np.uint16, "bf16": np.int16}
INTEGER_LAYOUTS = {"int4": INT4, "int5": INT5, "int8": INT8}
LAYOUTS = (*FLOAT_LAYOUTS, "int4", "int8")  # any tensor can be converted to these; int5 holds what a file has in 5 bits

# The layout of each storage type under "auto": the smallest that keeps the precision of the file.
_AUTO = {
    "F16": "f16", "BF16": "bf16", "Q4_0": "int4", "Q4_1": "int4", "Q4_K": "int4", "TQ1_0": "int4", "TQ2_0": "int4",
    "Q4_Z": "int4",
    "Q5_0": "int5", "Q5_1": "int5", "Q5_K": "int5", "MXFP4": "int5", "Q2_K": "int8", "Q3_K": "int8",
    "IQ4_NL": "int8", "IQ4_XS": "int8", "Q6_K": "int8", "Q8_0": "int8", "Q4_P": "int8",
}  # fmt: skip


class WeightTensor(Protocol):
    """What a layer needs of a tensor on disk (``checkpoint.Tensor``) or of a random one."""

    shape: tuple[int, ...]
    dtype: str

    def float32(self, lo: int = 0, hi: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Rows lo:hi as float32."""
        ...

    def quantized(self, layout: str) -> Panels:
        """The whole matrix as "int4", "int5" or "int8" panels: the file's own codes where it has such, else rounded."""
        ...

    def release(self) -> None:
        """It has been read: its mapped pages may leave this process's memory."""
        ...


def layout_for(weights: str, dtype: str) -> str:
    """The layout of a tensor of type ``dtype`` under the user's choice; "auto" keeps the precision of the file."""
    return _AUTO.get(dtype, "f32") if weights == "auto" else weights


def matrix_bytes(shape: tuple[int, ...], layout: str, mins: bool | None = None) -> int:
    """Bytes of a matrix (N, K) in a layout, whose panels have 16 rows, and groups 32 columns.

    mins: whether groups have a min; None: whether weights rounded to this layout get one.
    """
    rows, columns = shape
    if layout not in INTEGER_LAYOUTS:
        return panel_count(rows) * LANES * columns * np.dtype(FLOAT_LAYOUTS[layout]).itemsize
    block = block_bytes(INTEGER_LAYOUTS[layout], layout == "int4" if mins is None else mins)
    return panel_count(rows) * -(-columns // GROUP) * block


def weight_bytes(config: ModelConfig, layout: str) -> int:
    """Bytes of a model's weights if all matrices are in one layout; vectors are float32."""
    shapes = config.tensor_shapes().values()
    return sum(matrix_bytes(shape, layout) if len(shape) == 2 else 4 * shape[0] for shape in shapes)


class FloatWeights:
    """W (N, K) as panels (ceil(N / 16), K, 16) of float32, IEEE half or bfloat16, see ``kernels.matmul.panels``."""

    def __init__(self, panels: np.ndarray, rows: int) -> None:
        self.panels = panels
        self.rows, self.columns = rows, panels.shape[1]
        self.layout = next(name for name, dtype in FLOAT_LAYOUTS.items() if panels.dtype == dtype)
        self.nbytes = panels.nbytes

    @classmethod
    def load(cls, tensor: WeightTensor, layout: str) -> FloatWeights:
        """Read, convert and pack a tensor a few rows at a time."""
        rows, columns = tensor.shape
        panels = weights_empty((panel_count(rows), columns, LANES), FLOAT_LAYOUTS[layout])
        step = max(1, _PACK_BYTES // (4 * columns * LANES)) * LANES

        def load(lo: int) -> None:
            hi = min(rows, lo + step)
            pack(_converted(tensor.float32(lo, hi), layout), panels[lo // LANES : panel_count(hi)])

        starts = range(0, rows, step)
        share_out(load, starts, threads_for(rows * columns, PARALLEL_ELEMENTS, len(starts)))
        return cls(panels, rows)

    def matmul(self, x: Activations, out: np.ndarray) -> None:
        """out (T, N) = x W^T."""
        linear_panels(self.panels, x.x, out)

    def matmul_transposed(self, dy: np.ndarray, out: np.ndarray, add: bool) -> None:
        """out (T, K) = dy W, or += with ``add``."""
        linear_transposed(self.panels, dy, out, add)

    def take(self, ids: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Rows ids (T,) int64 into out (T, K) float32."""
        return take_rows(self.panels, ids, out)

    def plus(self, update: np.ndarray) -> FloatWeights:
        """W + update (N, K), as new weights in the same layout."""
        panels = weights_empty(self.panels.shape, self.panels.dtype)
        for p in range(len(panels)):
            rows = np.arange(p * LANES, min(self.rows, p * LANES + LANES))
            changed = self.take(rows, np.empty((len(rows), self.columns), np.float32)) + update[rows]
            pack(_converted(changed.astype(np.float32), self.layout), panels[p : p + 1])
        return FloatWeights(panels, self.rows)

    def address(self) -> tuple[int, int]:
        """Where the weights are, and whether they have mins, for a tape."""
        return self.panels.ctypes.data, 0


class IntegerWeights:
    """W (N, K) as panels of 4- or 8-bit groups, see ``kernels.quant.matmul``."""

    def __init__(self, panels: Panels, rows: int, columns: int) -> None:
        self.panels = panels
        self.rows, self.columns = rows, columns
        self.layout = next(name for name, kind in INTEGER_LAYOUTS.items() if panels.kind == kind)
        self.nbytes = panels.nbytes

    def matmul(self, x: Activations, out: np.ndarray) -> None:
        """out (T, N) = x W^T, with x rounded to 8 bits."""
        linear_quant(self.panels, x.rounded(), out)

    def matmul_transposed(self, dy: np.ndarray, out: np.ndarray, add: bool) -> None:
        """out (T, K) = dy W, or += with ``add``; dy is not rounded."""
        quant_transposed(self.panels, dy, out, add)

    def take(self, ids: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Rows ids (T,) int64 into out (T, K) float32."""
        return take_quant_rows(self.panels, ids, out)

    def address(self) -> tuple[int, int]:
        """Where the weights are, and whether they have mins, for a tape."""
        return self.panels.blocks.ctypes.data, int(self.panels.has_mins)


class PackedMatrix:
    """A WeightTensor that is packed already; ``dtype`` is that of the tensor that it was packed from."""

    def __init__(self, weights: FloatWeights | IntegerWeights, dtype: str) -> None:
        self.weights = weights
        self.shape: tuple[int, ...] = (weights.rows, weights.columns)
        self.dtype = dtype

    def float32(self, lo: int = 0, hi: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Rows lo:hi as float32."""
        ids = np.arange(lo, self.shape[0] if hi is None else hi)
        return self.weights.take(ids, np.empty((len(ids), self.shape[1]), np.float32) if out is None else out)

    def quantized(self, layout: str) -> Panels:
        """The panels. Raises ValueError for another layout."""
        if not isinstance(self.weights, IntegerWeights) or self.weights.layout != layout:
            raise ValueError(f"layout: expected {self.weights.layout}, as it is packed, found {layout!r}")
        return self.weights.panels

    def release(self) -> None:
        """Its pages stay: they are the weights."""


def load_weights(tensor: WeightTensor, layout: str) -> FloatWeights | IntegerWeights:
    """A tensor (N, K) in one of LAYOUTS."""
    if isinstance(tensor, PackedMatrix) and tensor.weights.layout == layout:
        return tensor.weights
    if layout in INTEGER_LAYOUTS:
        return IntegerWeights(tensor.quantized(layout), *tensor.shape)
    return FloatWeights.load(tensor, layout)


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
