"""float32 rows -> storage types: the inverse of ``dequant``.

Q8_0, Q4_0 and Q4_1 are the codes and scales of ``kernels.quant.weights`` in ggml's blocks of 32.
"""

from __future__ import annotations

import numpy as np

from ruvllm.checkpoint.storage import BLOCKS
from ruvllm.kernels.quant.layout import GROUP
from ruvllm.kernels.quant.weights import quantize_int4, quantize_int8

_LARGEST_HALF = 65504


def encode_rows(dtype: str, x: np.ndarray) -> np.ndarray:
    """Rows x (n, K) float32 as the bytes (n, row bytes) uint8 of F32, F16, BF16, Q8_0, Q4_0 or Q4_1.

    Raises:
        ValueError: NaN, infinity or a value that the type cannot hold.
    """
    if dtype in ("Q8_0", "Q4_0", "Q4_1"):
        return _blocks(dtype, x)
    if not np.isfinite(x).all():
        raise ValueError("x: expected finite numbers, found NaN or infinity")
    if dtype == "F16":
        if x.size and np.abs(x).max() > _LARGEST_HALF:
            raise ValueError(f"x: expected numbers up to {_LARGEST_HALF}, found {x.flat[np.abs(x).argmax()]}")
        return x.astype("<f2").view(np.uint8)
    if dtype == "BF16":
        bits = x.view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)  # ties to even
        return rounded.astype("<u2").view(np.uint8)
    return np.ascontiguousarray(x, "<f4").view(np.uint8)


def _blocks(dtype: str, x: np.ndarray) -> np.ndarray:
    """Scale, for Q4_1 the min, then 32 codes: bytes, or code j and code j + 16 in the halves of a byte."""
    rows, groups = len(x), x.shape[1] // GROUP
    blocks = np.empty((rows, groups, BLOCKS[dtype][1]), np.uint8)
    if dtype == "Q8_0":
        codes8, scales = quantize_int8(x)
        blocks[..., 2:] = codes8.view(np.uint8).reshape(rows, groups, GROUP)
    else:
        codes, scales, mins = quantize_int4(x, symmetric=dtype == "Q4_0")
        codes = codes.reshape(rows, groups, GROUP)
        blocks[..., -GROUP // 2 :] = codes[..., : GROUP // 2] | codes[..., GROUP // 2 :] << 4
        if mins is not None:
            blocks[..., 2:4] = mins[..., None].view(np.uint8)
    blocks[..., :2] = scales[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)
