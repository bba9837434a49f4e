"""Storage types -> groups of 32 codes with 16-bit scales: weights for the integer kernels, without a float32 copy.

The layout of each type (``kernels.quant.weights`` defines the codes):

    Q4_0  int4              exact
    Q4_1  int4 with mins    exact
    Q4_K  int4 with mins    codes exact; scale d s and min -dmin z rounded to half precision
    Q8_0  int8              exact
    Q5_0  int5              exact
    Q5_1  int5 with mins    exact
    Q5_K  int5 with mins    codes exact; scale and min rounded as for Q4_K
    Q6_K  int8              one scale in place of two of 16 elements: see ``q6_k_rows``
    Q3_K  int8              exact: codes -s q, scale -d, see ``whole_numbers``
    Q2_K  int8              rounded by ``kernels.quant.weights``, as floats are: two mins of 16 elements have no common
                            scale. It adds 0.5 % to the type's own error of 31 % (rms, matrices of SmolLM2)
    IQ4_NL          int8    exact
    IQ4_XS          int8    codes exact; scale d s rounded as for Q4_K
    MXFP4           int5    exact for scales of 2^-24 to 2^15; codes of a smaller one rounded to multiples of 2^-24
    TQ1_0, TQ2_0    int4    exact
    Q4_Z  int4 with mins    codes and scales exact; min -d z rounded to half precision
    F64, F32, F16, BF16, Q4_P       int8, or int4: rounded by ``kernels.quant.weights``

Rounding to half precision has a relative error of at most 2^-11. Where it would be subnormal (below 2^-14) d s is a
multiple of 2^-24 and stays exact; where it would exceed 65504 the tensor is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from ruvllm.checkpoint.copied_blocks import COPIED, copy_blocks
from ruvllm.checkpoint.dequant import half, scale_and_minimum
from ruvllm.checkpoint.whole_numbers import whole_numbers
from ruvllm.errors import ModelFormatError
from ruvllm.kernels.jit.decorators import kernel
from ruvllm.kernels.quant.layout import GROUP, INT4, INT5, INT8
from ruvllm.kernels.quant.panels import Panels, empty_panels, pack_groups
from ruvllm.kernels.quant.weights import quantize_int4, quantize_int8
from ruvllm.kernels.simd.vectors import f16_to_f32, f32_to_f16
from ruvllm.kernels.threads.pool import PARALLEL_ELEMENTS, share_out, threads_for

KINDS = {"int4": INT4, "int5": INT5, "int8": INT8}
ZEROS = {"int4": 8, "int5": 16, "int8": 0}  # codes of 0 where weights have no min

_CHUNK_ELEMENTS = 1 << 18  # between file and panels, for each thread: they stay in the L2 cache

_ZERO, _QUARTER, _ONE = np.float32(0), np.float32(0.25), np.float32(1)
_LARGEST, _LOWEST, _REACH = np.float32(127), np.float32(-128), np.float32(127.5)
_ONE_BIT = np.uint16(1)
_INFINITE_BITS = np.uint16(0x7C00)
_LARGEST_HALF = 65504
_SMALLEST_HALF = np.float32(2.0**-24)


# What is rounded when a type is converted to its layout; types that are not listed convert exactly.
ROUNDED = {
    **dict.fromkeys(("Q4_K", "Q5_K", "IQ4_XS"), "scales to 16 bits"),
    "Q4_Z": "mins to 16 bits",
    **dict.fromkeys(("Q2_K", "Q6_K", "Q4_P"), "weights to int8"),
}


class StoredRows(Protocol):
    """The part of ``checkpoint.tensor.Tensor`` that is used here."""

    path: str
    name: str
    dtype: str
    rows: int
    columns: int

    def raw(self, lo: int = 0, hi: int | None = None, checked: bool = True) -> np.ndarray: ...

    def float32(self, lo: int = 0, hi: int | None = None) -> np.ndarray: ...


class Groups(NamedTuple):
    """Rows in groups of 32: ``kind`` one of KINDS; codes (n, 32 G) uint8, for int8 the bits of signed codes.

    scales and mins (n, G) uint16 are bits of IEEE half floats; mins None for w = scale (code - zero), see ``ZEROS``.
    """

    kind: str
    codes: np.ndarray
    scales: np.ndarray
    mins: np.ndarray | None

    def taken(self, groups: slice) -> Groups:
        """Some groups of each row."""
        codes = np.ascontiguousarray(self.codes[:, groups.start * GROUP : groups.stop * GROUP])
        mins = None if self.mins is None else np.ascontiguousarray(self.mins[:, groups])
        return Groups(self.kind, codes, np.ascontiguousarray(self.scales[:, groups]), mins)


@kernel(strict=True)
def k_rows(raw: Any, codes: Any, scales: Any, mins: Any, block: Any, fifth_at: Any, codes_at: Any) -> None:
    """Rows of Q4_K, Q5_K: d, dmin; 12 bytes of scales; perhaps 32 of fifth bits; 4 x 32 bytes of two codes.

    A block has so many bytes; its fifth bits (0: there are none) and codes begin at these.
    """
    for row in range(raw.shape[0]):
        for g in range(scales.shape[1]):
            x, y = raw[row, g // 8 * block : g // 8 * block + block], codes[row, g * GROUP : g * GROUP + GROUP]
            part = g % 8
            s, z = scale_and_minimum(x[4:16], part)
            scales[row, g] = f32_to_f16(half(x[0], x[1]) * s)
            mins[row, g] = f32_to_f16(_ZERO - half(x[2], x[3]) * z)
            packed, shift = x[codes_at + part // 2 * 32 : codes_at + part // 2 * 32 + 32], np.uint8(part % 2 * 4)
            if fifth_at == 0:
                for j in range(GROUP):
                    y[j] = (packed[j] >> shift) & 15
            else:
                for j in range(GROUP):
                    y[j] = ((packed[j] >> shift) & 15) | (((x[fifth_at + j] >> np.uint8(part)) & 1) << 4)


@kernel(strict=True)
def q6_k_rows(raw: Any, codes: Any, scales: Any) -> None:
    """Rows of Q6_K, whose groups have two scales d s: w = d s (q - 32). One scale: a quarter of the larger d s.

    The half with the larger scale keeps its codes, four times as large, with no error but the scale's rounding. In the
    other an error is at most |scale| / 2, an eighth of the larger |d s|; but |scale| where q is 0 and the two s are
    opposite.
    """
    for row in range(raw.shape[0]):
        for g in range(scales.shape[1]):
            x, y = raw[row, g // 8 * 210 : g // 8 * 210 + 210], codes[row, g * GROUP : g * GROUP + GROUP]
            part = g % 8
            d = half(x[208], x[209])
            first, second = np.float32(np.int8(x[192 + 2 * part])), np.float32(np.int8(x[193 + 2 * part]))
            wanted = _QUARTER * d * (first if abs(first) >= abs(second) else second)
            bits = f32_to_f16(wanted)
            if abs(wanted) * _LARGEST > _REACH * abs(f16_to_f32(bits)):  # subnormal, rounded down too far
                bits = np.uint16(bits + _ONE_BIT)
            scales[row, g] = bits
            scale = f16_to_f32(bits)
            inverse = _ONE / scale if scale != _ZERO else _ZERO
            low, high = part // 4 * 64 + part % 2 * 32, 128 + part // 4 * 32
            low_shift, high_shift = np.uint8(part % 4 // 2 * 4), np.uint8(part % 4 * 2)
            for j in range(GROUP):
                q = ((x[low + j] >> low_shift) & 15) | (((x[high + j] >> high_shift) & 3) << 4)
                steps = d * (first if j < 16 else second) * np.float32(np.int32(q) - 32) * inverse
                y[j] = np.uint8(np.int32(np.rint(min(max(steps, _LOWEST), _LARGEST))) & 255)


def _zero_point_rows(raw: np.ndarray, codes: np.ndarray, scales: np.ndarray, mins: np.ndarray) -> None:
    """Rows of Q4_Z: as Q4_1, with a zero point z in place of m: m = -d z."""
    _whole_rows("Q4_1", raw, codes, scales, mins)
    with np.errstate(over="ignore"):  # refused by ``_check_half``
        zeros = raw.reshape(*scales.shape, 20)[:, :, 2].astype(np.float32)
        lowest = scales.view(np.float16).astype(np.float32) * -zeros
        mins[:] = lowest.astype(np.float16).view(np.uint16)


def _whole_rows(dtype: str, raw: np.ndarray, codes: np.ndarray, scales: np.ndarray, mins: np.ndarray) -> None:
    """Rows of a type of ``whole_numbers``; without mins the code of 0 is that of ``ZEROS``."""
    numbers = codes.view(np.int8)
    exact, lowest = whole_numbers(dtype, raw, numbers)
    tiny = (exact != 0) & (np.abs(exact) < _SMALLEST_HALF)  # of MXFP4: other scales are multiples of it
    if tiny.any():
        groups = numbers.reshape(*exact.shape, GROUP)
        groups[tiny] = np.rint(groups[tiny] * (exact[tiny] / _SMALLEST_HALF)[:, None])
        exact[tiny] = _SMALLEST_HALF
    if not mins.size:
        numbers += np.int8(ZEROS[_TYPES[dtype][0]])
    with np.errstate(over="ignore"):  # refused by ``_check_half``
        scales[:], mins[:] = (x.astype(np.float16).view(np.uint16) for x in (exact, lowest))


# kind, has mins
_TYPES = {
    "Q4_0": ("int4", False), "Q4_1": ("int4", True), "Q5_0": ("int5", False), "Q5_1": ("int5", True),
    "Q8_0": ("int8", False), "Q4_K": ("int4", True), "Q5_K": ("int5", True), "Q6_K": ("int8", False),
    "Q3_K": ("int8", False), "IQ4_NL": ("int8", False), "IQ4_XS": ("int8", False), "MXFP4": ("int5", False),
    "TQ1_0": ("int4", False), "TQ2_0": ("int4", False), "Q4_Z": ("int4", True),
}  # fmt: skip
# Decoders of what is not ``_whole_rows``, or not as these: rows, codes, scales, mins.
_DECODERS: dict[str, Callable[..., None]] = {
    "Q4_K": lambda *arrays: k_rows(*arrays, 144, 0, 16),
    "Q5_K": lambda *arrays: k_rows(*arrays, 176, 16, 48),
    "Q6_K": lambda raw, codes, scales, mins: q6_k_rows(raw, codes, scales),
    "Q4_Z": _zero_point_rows,
}


def group_layout(dtype: str, kind: str | None = None, symmetric: bool = True) -> tuple[str, bool]:
    """(kind, has mins) of the groups that a storage type becomes.

    Args:
        dtype: a storage type.
        kind: one of KINDS; None for that of the type, which is int8 for floats. Only types listed as int5 above can
            become int5.
        symmetric: for values that must be rounded to int4, whether to do without mins.

    Raises:
        ValueError: another ``kind``, or int5 for another type.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    stored, mins = _TYPES[dtype] if dtype in _TYPES else ("int8", False)
    if kind is None or kind in (stored, "int8"):  # narrower codes fit into 8 bits
        return kind or stored, mins
    if kind == "int5":
        raise ValueError(f"kind: {dtype} cannot become int5, which is for codes of 5 bits")
    return kind, not symmetric


def tensor_groups(
    tensor: StoredRows, lo: int = 0, hi: int | None = None, kind: str | None = None, symmetric: bool = True
) -> Groups:
    """Rows lo:hi of a tensor in groups of 32: its own codes where the layout can hold them, else rounded.

    Args:
        tensor: any type; a row of floats is padded to a multiple of 32.
        kind, symmetric: as in ``group_layout``. 4- and 5-bit codes are widened to int8 without loss.

    Raises:
        ModelFormatError: a scale, a min or a weight is not finite or beyond what half-precision scales can hold.
        ValueError: lo, hi outside of the tensor; another ``kind``.
    """
    kind, with_mins = group_layout(tensor.dtype, kind, symmetric)
    hi = tensor.rows if hi is None else hi
    stored = _TYPES[tensor.dtype][0] if tensor.dtype in _TYPES else None
    if stored is None or (kind == "int4" and stored != "int4"):
        return _rounded(tensor, lo, hi, kind, symmetric)
    codes, scales, mins = decode_groups(tensor.dtype, tensor.raw(lo, hi), tensor.columns)
    _check_half(tensor, lo, scales, "scale")
    _check_half(tensor, lo, mins, "min")
    if kind != stored and not with_mins:
        codes -= np.uint8(ZEROS[stored])  # int8 codes have their zero at 0
    return Groups(kind, codes, scales, mins if with_mins else None)


def decode_groups(dtype: str, raw: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (n, K) uint8, scales (n, G) and mins (n, G or 0) uint16 of stored rows (n, row_bytes) of a block type."""
    _, with_mins = _TYPES[dtype]
    n, groups = len(raw), columns // GROUP
    codes, scales = np.empty((n, groups * GROUP), np.uint8), np.empty((n, groups), np.uint16)
    mins = np.empty((n, groups if with_mins else 0), np.uint16)
    if dtype in _DECODERS:
        _DECODERS[dtype](raw, codes, scales, mins)
    else:
        _whole_rows(dtype, raw, codes, scales, mins)
    return codes, scales, mins


def load_panels(
    tensor: StoredRows, kind: str | None = None, symmetric: bool = True, columns: range | None = None
) -> Panels:
    """A whole matrix (N, K) as panels for ``quant_matmul``; arguments and errors as for ``tensor_groups``.

    columns: only these of each row, which begin and end with a group of 32, or with the row.

    A few rows at a time go from the file into the panels, split over Python threads: the compiled bodies release
    the GIL, and page faults and NumPy's checks run in parallel too.
    """
    rows, columns = tensor.rows, range(tensor.columns) if columns is None else columns
    if columns.start % GROUP or (columns.stop % GROUP and columns.stop != tensor.columns):
        raise ValueError(f"columns: expected whole groups of {GROUP}, found {columns.start}:{columns.stop}")
    taken = slice(columns.start // GROUP, -(-columns.stop // GROUP))
    layout, with_mins = group_layout(tensor.dtype, kind, symmetric)
    panels = empty_panels(KINDS[layout], rows, len(columns), with_mins)
    step = max(1, _CHUNK_ELEMENTS // (16 * max(tensor.columns, 1))) * 16
    starts = range(0, rows, step)
    whole = len(columns) == tensor.columns
    copied = whole and tensor.dtype in COPIED and layout == _TYPES[tensor.dtype][0]

    def load(lo: int) -> None:
        hi = min(rows, lo + step)
        if copied:
            if not copy_blocks(tensor.dtype, tensor.raw(lo, hi, checked=False), panels.part(lo, hi)):
                tensor.raw(lo, hi)  # raises the error that says which scale
            return
        groups = tensor_groups(tensor, lo, hi, kind, symmetric)
        if not whole:
            groups = groups.taken(taken)
        pack_groups(groups.codes, groups.scales, groups.mins, panels.part(lo, hi))

    share_out(load, starts, threads_for(rows * tensor.columns, PARALLEL_ELEMENTS, len(starts)))
    return panels


def _rounded(tensor: StoredRows, lo: int, hi: int, kind: str, symmetric: bool) -> Groups:
    x = tensor.float32(lo, hi)
    try:
        if kind == "int8":
            codes, scales = quantize_int8(x)
            return Groups(kind, codes.view(np.uint8), scales, None)
        return Groups(kind, *quantize_int4(x, symmetric))
    except ValueError as error:
        row, column = np.unravel_index(int(np.argmax(np.where(np.isfinite(x), np.abs(x), np.inf))), x.shape)
        raise ModelFormatError(
            tensor.path,
            field=f"tensor {tensor.name!r} row {lo + row} column {column}",
            found=x[row, column],
            expected="a finite number that 16-bit scales can hold",
        ) from error


def _check_half(tensor: StoredRows, lo: int, halves: np.ndarray, what: str) -> None:
    bad = halves & _INFINITE_BITS == _INFINITE_BITS
    if bad.any():
        row, group = divmod(int(bad.argmax()), halves.shape[1])
        raise ModelFormatError(
            tensor.path,
            field=f"tensor {tensor.name!r} row {lo + row} group {group} {what}",
            found=f"a number beyond {_LARGEST_HALF}",
            expected="one that a 16-bit float can hold",
        )
