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
def nibble_rows(
    raw: Any, codes: Any, scales: Any, mins: Any, block: Any, fifth_at: Any, codes_at: Any, lo: Any, hi: Any
) -> None:
    """Rows lo:hi of Q4_0, Q4_1, Q5_0, Q5_1: d, perhaps m, perhaps 32 fifth bits, then 16 bytes of two codes each."""
    for row in range(lo, hi):
        for g in range(scales.shape[1]):
            x, y = raw[row, g * block : g * block + block], codes[row, g * GROUP : g * GROUP + GROUP]
            scales[row, g] = np.uint16(x[0]) | (np.uint16(x[1]) << np.uint16(8))
            if mins.shape[1] > 0:
                mins[row, g] = np.uint16(x[2]) | (np.uint16(x[3]) << np.uint16(8))
            if fifth_at == 0:
                for j in range(16):
                    y[j] = x[codes_at + j] & 15
                    y[16 + j] = x[codes_at + j] >> 4
            else:
                for j in range(16):
                    fifth = (x[fifth_at + j // 8] >> np.uint8(j % 8)) & 1
                    y[j] = (x[codes_at + j] & 15) | (fifth << 4)
                    fifth = (x[fifth_at + 2 + j // 8] >> np.uint8(j % 8)) & 1
                    y[16 + j] = (x[codes_at + j] >> 4) | (fifth << 4)


@kernel(strict=True)
def k_rows(
    raw: Any, codes: Any, scales: Any, mins: Any, block: Any, fifth_at: Any, codes_at: Any, lo: Any, hi: Any
) -> None:
    """Rows lo:hi of Q4_K, Q5_K: d, dmin; 12 bytes of scales; perhaps 32 of fifth bits; 4 x 32 bytes of two codes."""
    for row in range(lo, hi):
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
def q6_k_rows(
    raw: Any, codes: Any, scales: Any, mins: Any, block: Any, fifth_at: Any, codes_at: Any, lo: Any, hi: Any
) -> None:
    """Rows lo:hi of Q6_K, whose groups have two scales d s: w = d s (q - 32). One scale: a quarter of the larger d s.

    The half with the larger scale keeps its codes, four times as large, with no error but the scale's rounding. In the
    other an error is at most |scale| / 2, an eighth of the larger |d s|; but |scale| where q is 0 and the two s are
    opposite.
    """
    for row in range(lo, hi):
        for g in range(scales.shape[1]):
            x, y = raw[row, g // 8 * block : g // 8 * block + block], codes[row, g * GROUP : g * GROUP + GROUP]
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


def byte_rows(
    raw: Any, codes: Any, scales: Any, mins: Any, block: int, fifth_at: int, codes_at: int, lo: int, hi: int
) -> None:
    """Rows lo:hi of Q8_0: d, 32 signed bytes. Only copies, for which NumPy needs no compiled code."""
    blocks = raw[lo:hi].reshape(hi - lo, scales.shape[1], block)
    scales[lo:hi] = np.ascontiguousarray(blocks[:, :, :2]).view("<u2")[:, :, 0]
    codes[lo:hi].reshape(hi - lo, scales.shape[1], GROUP)[:] = blocks[:, :, codes_at:]


def zero_point_rows(
    raw: Any, codes: Any, scales: Any, mins: Any, block: int, fifth_at: int, codes_at: int, lo: int, hi: int
) -> None:
    """Rows lo:hi of Q4_Z: as Q4_1, with a zero point z in place of m: m = -d z."""
    nibble_rows(raw, codes, scales, mins, block, fifth_at, codes_at, lo, hi)
    with np.errstate(over="ignore"):  # refused by ``_check_half``
        lowest = scales[lo:hi].view(np.float16).astype(np.float32) * -mins[lo:hi].astype(np.float32)
        mins[lo:hi] = lowest.astype(np.float16).view(np.uint16)


def _whole_rows(dtype: str, zero: int) -> Any:
    """The decoder of a type of ``whole_numbers`` into codes whose zero is ``zero``."""

    def rows(
        raw: Any, codes: Any, scales: Any, mins: Any, block: int, fifth_at: int, codes_at: int, lo: int, hi: int
    ) -> None:
        numbers = codes[lo:hi].view(np.int8)
        exact = whole_numbers(dtype, raw[lo:hi], numbers)
        tiny = (exact != 0) & (np.abs(exact) < _SMALLEST_HALF)  # of MXFP4: other scales are multiples of it
        if tiny.any():
            groups = numbers.reshape(*exact.shape, GROUP)
            groups[tiny] = np.rint(groups[tiny] * (exact[tiny] / _SMALLEST_HALF)[:, None])
            exact[tiny] = _SMALLEST_HALF
        numbers += np.int8(zero)
        with np.errstate(over="ignore"):  # refused by ``_check_half``
            scales[lo:hi] = exact.astype(np.float16).view(np.uint16)

    return rows


# kind, has mins, decoder of rows; and the layout of a block: its bytes, the offset of the fifth bits (0: none) and of
# the codes.
_TYPES: dict[str, tuple[str, bool, Any, int, int, int]] = {
    "Q4_0": ("int4", False, nibble_rows, 18, 0, 2),
    "Q4_1": ("int4", True, nibble_rows, 20, 0, 4),
    "Q5_0": ("int5", False, nibble_rows, 22, 2, 6),
    "Q5_1": ("int5", True, nibble_rows, 24, 4, 8),
    "Q8_0": ("int8", False, byte_rows, 34, 0, 2),
    "Q4_K": ("int4", True, k_rows, 144, 0, 16),
    "Q5_K": ("int5", True, k_rows, 176, 16, 48),
    "Q6_K": ("int8", False, q6_k_rows, 210, 0, 0),
    "Q3_K": ("int8", False, _whole_rows("Q3_K", ZEROS["int8"]), 110, 0, 0),
    "IQ4_NL": ("int8", False, _whole_rows("IQ4_NL", ZEROS["int8"]), 18, 0, 0),
    "IQ4_XS": ("int8", False, _whole_rows("IQ4_XS", ZEROS["int8"]), 136, 0, 0),
    "MXFP4": ("int5", False, _whole_rows("MXFP4", ZEROS["int5"]), 17, 0, 0),
    "TQ1_0": ("int4", False, _whole_rows("TQ1_0", ZEROS["int4"]), 54, 0, 0),
    "TQ2_0": ("int4", False, _whole_rows("TQ2_0", ZEROS["int4"]), 66, 0, 0),
    "Q4_Z": ("int4", True, zero_point_rows, 20, 0, 4),
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
    stored, mins = _TYPES[dtype][:2] if dtype in _TYPES else ("int8", False)
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
    _, with_mins, decode, *where = _TYPES[dtype]
    n, groups = len(raw), columns // GROUP
    codes, scales = np.empty((n, groups * GROUP), np.uint8), np.empty((n, groups), np.uint16)
    mins = np.empty((n, groups if with_mins else 0), np.uint16)
    decode(raw, codes, scales, mins, *where, 0, n)
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
