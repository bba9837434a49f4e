"""Quantisation in groups of 32, in plain NumPy float64."""

from typing import Any

import numpy as np


def _f64(array: Any) -> np.ndarray:
    return np.asarray(array, np.float64)


def _in_groups(x: np.ndarray, repeat_first: bool = False) -> np.ndarray:
    """x (..., K) as (..., G, 32), the last group filled up with zeros or with its first element."""
    missing = -x.shape[-1] % 32
    filling = np.zeros((*x.shape[:-1], missing))
    if repeat_first and missing:
        filling += x[..., -(x.shape[-1] % 32), None]
    return np.concatenate((x, filling), axis=-1).reshape(*x.shape[:-1], -1, 32)


def _from_half(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float16).astype(np.float64)


def _half_scale(wanted: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Bits of the nearest half floats to ``wanted``, or of the next larger ones where these are below ``least``."""
    bits = wanted.astype(np.float16).view(np.uint16)
    return bits + (_from_half(bits) < least).astype(np.uint16)


def _steps(x: np.ndarray, scale: np.ndarray, first: int, last: int) -> np.ndarray:
    """round(x / scale) within first..last; 0 / 0 is 0."""
    with np.errstate(invalid="ignore"):
        return np.clip(np.nan_to_num(np.rint(x / scale[..., None])), first, last)


def quantize_int8(x: Any) -> tuple[np.ndarray, np.ndarray]:
    """Codes round(x / scale) and the bits of scale = max|x| / 127, in groups of 32."""
    x = _in_groups(_f64(x))
    largest = np.abs(x).max(-1)
    bits = _half_scale(largest / 127, largest / 127.5)
    return _steps(x, _from_half(bits), -127, 127).reshape(*x.shape[:-2], -1), bits.astype(np.float64)


def quantize_int4(x: Any, symmetric: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Codes 0..15, bits of scales, and of mins or None: the best of the scales (and mins) that the kernel tries."""
    x = _in_groups(_f64(x), repeat_first=not symmetric)
    candidates = _symmetric_candidates(x) if symmetric else _min_candidates(x)
    codes, scales, mins = np.zeros(x.shape), np.zeros(x.shape[:-1], np.uint16), np.zeros(x.shape[:-1], np.uint16)
    best = np.full(x.shape[:-1], np.inf)
    for scale_bits, low_bits, fits in candidates:
        scale, low = _from_half(scale_bits), _from_half(low_bits)[..., None]
        first, last = (-8, 7) if symmetric else (0, 15)
        found = _steps(x - low, scale, first, last)
        error = np.where(fits, np.sum((x - low - scale[..., None] * found) ** 2, -1), np.inf)
        better = error < best
        best = np.where(better, error, best)
        codes = np.where(better[..., None], found - first, codes)
        scales, mins = np.where(better, scale_bits, scales), np.where(better, low_bits, mins)
    return codes.reshape(*x.shape[:-2], -1), _f64(scales), None if symmetric else _f64(mins)


def _symmetric_candidates(x: np.ndarray) -> Any:
    """(bits of a scale, of 0, whether it reaches all elements) for the scales that quantize_int4 tries."""
    low, high = np.maximum(-x.min(-1), 0), np.maximum(x.max(-1), 0)
    upright, flipped = np.maximum(low / 8.5, high / 7.5), np.maximum(high / 8.5, low / 7.5)
    smallest, sign = np.minimum(upright, flipped), np.where(flipped < upright, 0x8000, 0).astype(np.uint16)
    for i in range(8):
        wanted = np.maximum(np.maximum(low, high) / (8.5 - 0.25 * i), smallest)
        yield _half_scale(wanted, smallest) | sign, np.zeros_like(sign), np.ones(sign.shape, bool)


def _min_candidates(x: np.ndarray) -> Any:
    """The same for the scales and mins that quantize_int4 tries when it is not symmetric."""
    smallest, largest = x.min(-1), x.max(-1)
    for i in range(3):
        for j in range(3):
            step = (largest - smallest) / (15 + 0.25 * (i + j))
            wanted = smallest + 0.25 * i * step
            low = wanted.astype(np.float16)
            low = np.where(low > wanted, np.nextafter(low, np.float16(-np.inf)), low).view(np.uint16)
            reach = (largest - _from_half(low)) / 15.5
            scale = _half_scale(np.maximum(step, reach), reach)
            yield scale, low, _from_half(low) - smallest <= 0.5 * _from_half(scale)


def dequantize(codes: Any, scales: Any, mins: Any = None, columns: int | None = None) -> np.ndarray:
    """scale code + min; without mins, scale code for int8 codes and scale (code - 8) for uint8 ones."""
    codes, scale = np.asarray(codes), _from_half(np.asarray(scales))[..., None]
    zero = 8 if codes.dtype == np.uint8 and mins is None else 0
    y = (codes.reshape(*scale.shape[:-1], 32).astype(np.float64) - zero) * scale
    y = y if mins is None else y + _from_half(np.asarray(mins))[..., None]
    return y.reshape(codes.shape)[..., :columns]


def quantize_activations(x: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and outliers of x (..., K): the four largest of a row's first 65536 elements, by column."""
    x = _f64(x)
    rows = x.reshape(-1, x.shape[-1]).copy()
    outliers = np.zeros((len(rows), 4, 2))
    for row, found in zip(rows, outliers, strict=True):
        magnitudes = np.abs(row[:65536])
        for first in range(0, len(magnitudes), 1024):  # next to NaN or infinity, none is sought
            if not np.isfinite(magnitudes[first : first + 1024]).all():
                magnitudes[first : first + 1024] = 0
        largest = np.argsort(-magnitudes, kind="stable")[:4]
        for i, column in enumerate(largest[magnitudes[largest] > 2.0**-120]):
            found[i] = column, row[column]
            row[column] = 0
        found[:] = found[np.argsort(found[:, 0], kind="stable")]
    groups = _in_groups(rows)
    scales = np.where(np.isfinite(groups).all(-1), np.abs(groups).max(-1) / 127, np.nan)
    codes = _steps(groups, scales, -127, 127)
    lead = x.shape[:-1]
    return codes.reshape(*lead, -1), scales.reshape(*lead, -1), outliers.reshape(*lead, 4, 2)


def quant_matmul(x: Any, w: Any) -> np.ndarray:
    """x W^T with x rounded as above, and W (N, K) from the packed bytes of a ``QuantMatrix``."""
    codes, scales, outliers = quantize_activations(x)
    rounded = codes * np.repeat(scales, 32, -1)
    for row, found in zip(rounded.reshape(-1, rounded.shape[-1]), outliers.reshape(-1, 4, 2), strict=True):
        np.add.at(row, found[:, 0].astype(np.int64), found[:, 1])
    rows, columns = w.shape
    return np.asarray(rounded[..., :columns] @ _unpacked(w.panels, w.bits)[:rows, :columns].T)


def _unpacked(panels: Any, bits: int) -> np.ndarray:
    """The matrix (16 P, 32 G) that packed blocks hold: a line of codes has four columns of 16 rows."""
    count, groups = panels.blocks.shape[:2]
    lines = panels.codes.reshape(count, groups, -1, 16, 4)
    if bits == 8:
        codes, zero = lines.view(np.int8).astype(np.float64), 0.0
    else:
        codes, zero = np.concatenate((lines & 15, lines >> 4), axis=2).astype(np.float64), 8.0
    scales = _from_half(panels.scales)[:, :, None, :, None]
    low = _from_half(panels.mins)[:, :, None, :, None] if panels.has_mins else -zero * scales
    values = codes * scales + low
    return np.asarray(values.transpose(0, 3, 1, 2, 4).reshape(16 * count, -1))
