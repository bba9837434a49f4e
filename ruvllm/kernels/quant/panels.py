"""Panels of quantised weights: allocate them, pack them from row-major groups, unpack rows of them."""

from typing import NamedTuple

import numpy as np

from ruvllm.kernels.jit.decorators import inline_kernel, kernel
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.matmul.panels import panel_count
from ruvllm.kernels.memory import weights_empty
from ruvllm.kernels.quant.layout import GROUP, INT4, INT5, INT8, LINES, block_bytes
from ruvllm.kernels.simd.vectors import f16_to_f32

_QUADS = GROUP // 4  # quads (four columns) of one row's group
_NIBBLE = np.uint32(4)
_BYTE = np.uint32(255)
_ZERO_CODES = {INT4: 8, INT5: 16, INT8: 0}  # the code of 0 in symmetric weights
_NIBBLES, _ONES = np.uint32(0x0F0F0F0F), np.uint32(0x01010101)  # in each of four bytes


class Panels(NamedTuple):
    """A quantised matrix as ``quant_matmul`` takes it: ``kind`` is INT4, INT5 or INT8; blocks (P, G, bytes) uint8."""

    kind: int
    has_mins: bool
    blocks: np.ndarray

    def part(self, lo: int, hi: int) -> "Panels":
        """Views of the panels that hold rows lo:hi.

        Raises:
            ValueError: ``lo`` is not a multiple of 16.
        """
        if lo % LANES:
            raise ValueError(f"lo: expected a multiple of {LANES}, found {lo}")
        return self._replace(blocks=self.blocks[lo // LANES : (hi + LANES - 1) // LANES])

    @property
    def codes(self) -> np.ndarray:
        """A view of the lines of codes, (P, G, 4, 5 or 8, 64) uint8."""
        head = 64 if self.has_mins else 32
        return self.blocks[:, :, head:].reshape(*self.blocks.shape[:2], LINES[self.kind], 64)

    @property
    def scales(self) -> np.ndarray:
        """A view of the scales, (P, G, 16) uint16."""
        return self.blocks.view(np.uint16)[:, :, :LANES]

    @property
    def mins(self) -> np.ndarray:
        """A view of the mins, (P, G, 16) uint16, or (P, G, 0)."""
        return self.blocks.view(np.uint16)[:, :, LANES : 2 * LANES if self.has_mins else LANES]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and mins."""
        return self.blocks.nbytes


def empty_panels(kind: int, rows: int, columns: int, mins: bool) -> Panels:
    """Uninitialised panels for a matrix (rows, columns) of INT4, INT5 or INT8, on whole cache lines."""
    panels, groups = panel_count(rows), (columns + GROUP - 1) // GROUP
    return Panels(kind, mins, weights_empty((panels, groups, block_bytes(kind, mins)), np.uint8))


@kernel
def pack_quant_rows(kind, quads, scales, mins, words, halves, lo, hi):
    """Panels lo:hi of pack_groups, four codes at a time: quads (n, 8 G) uint32; words, halves: blocks in those units.

    The quads of a row are a line apart: the 16 rows of a panel complete the lines while they are in the L1 cache.
    """
    count, groups = quads.shape[0], words.shape[1]
    lines = LINES[kind]
    head = words.shape[2] - lines * LANES  # words of scales and mins, before the codes
    for p in range(lo, hi):
        first = p * LANES
        rows = min(LANES, count - first)
        for g in range(groups):
            to, scaling = words[p, g, head:], halves[p, g]
            for r in range(rows):
                at = quads[first + r, _QUADS * g : _QUADS * g + _QUADS]
                if kind == INT8:
                    for j in range(8):
                        to[j * LANES + r] = at[j]
                else:
                    for j in range(4):
                        to[j * LANES + r] = (at[j] & _NIBBLES) | ((at[4 + j] & _NIBBLES) << _NIBBLE)
                if kind == INT5:
                    fifth = np.uint32(0)
                    for j in range(8):
                        fifth |= ((at[j] >> _NIBBLE) & _ONES) << np.uint32(j)
                    to[4 * LANES + r] = fifth
                scaling[r] = scales[first + r, g]
                if mins.shape[1] > 0:
                    scaling[LANES + r] = mins[first + r, g]
            for r in range(rows, LANES):
                for j in range(lines):
                    to[j * LANES + r] = 0
                for j in range(0, 2 * head, LANES):
                    scaling[j + r] = 0


def pack_groups(codes: np.ndarray, scales: np.ndarray, mins: np.ndarray | None, to: Panels) -> None:
    """Write the groups of n rows into panels; rows past n, up to the end of the last panel, become zeros.

    A matrix that comes a few rows at a time goes into ``panels.part(lo, hi)``, lo a multiple of 16.

    Args:
        codes: (n, 32 G): uint8 0..15 for INT4, 0..31 for INT5, which is not checked; int8, or its bits as uint8, for
            INT8.
        scales, mins: (n, G) uint16, IEEE half bits; mins None for symmetric weights.
        to: panels for n rows.

    Raises:
        TypeError: an argument has a wrong dtype.
        ValueError: shapes do not match.
    """
    panels, groups = to.blocks.shape[:2]
    rows = len(codes)
    if panels != panel_count(rows):
        raise ValueError(f"codes: expected the rows of {panels} panels of {LANES}, found {rows}")
    codes = _checked("codes", codes, (rows, groups * GROUP), np.uint8, np.int8)
    scales = _checked("scales", scales, (rows, groups), np.uint16)
    if mins is None:
        mins = np.empty((rows, 0), np.uint16)
    mins = _checked("mins", mins, (rows, groups if to.has_mins else 0), np.uint16)
    quads = codes.view(np.uint32)
    pack_quant_rows(to.kind, quads, scales, mins, to.blocks.view(np.uint32), to.blocks.view(np.uint16), 0, panels)


def _checked(name: str, array: np.ndarray, shape: tuple[int, int], *dtypes: type) -> np.ndarray:
    if array.dtype not in dtypes:
        raise TypeError(f"{name}: expected {np.dtype(dtypes[0])}, found {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, found {array.shape}")
    return np.require(array, None, ("C", "A", "W"))


@inline_kernel
def _quad(kind, lines, j, r):
    """The codes of quad j of row r, four bytes, from the words of a block's lines."""
    if kind == INT8:
        return lines[j * LANES + r]
    codes = (lines[j % 4 * LANES + r] >> (_NIBBLE * np.uint32(j // 4))) & _NIBBLES
    if kind == INT5:
        codes |= ((lines[4 * LANES + r] >> np.uint32(j)) & _ONES) << _NIBBLE
    return codes


@kernel(strict=True)
def unpack_quant_rows(kind, zero, words, halves, ids, out):
    """out[i] (K,) float32 = row ids[i] of blocks, given in words and in halves.

    zero: the zero point; -1 where there are mins.
    """
    groups, columns, symmetric = words.shape[1], out.shape[1], zero >= 0
    head = words.shape[2] - LINES[kind] * LANES  # words of scales and mins, before the codes
    subtracted = zero if symmetric else 0
    for i in range(ids.shape[0]):
        p, r = ids[i] // LANES, ids[i] % LANES
        for g in range(groups):
            lines = words[p, g, head:]
            scale = f16_to_f32(halves[p, g, r])
            low = np.float32(0) if symmetric else f16_to_f32(halves[p, g, LANES + r])
            for k in range(min(GROUP, columns - g * GROUP)):  # no loop over quads: LLVM would unroll it
                code = np.int64((_quad(kind, lines, k >> 2, r) >> np.uint32(8 * (k & 3))) & _BYTE)
                if kind == INT8 and code > 127:
                    code -= 256
                product = np.float32(code - subtracted) * scale
                out[i, g * GROUP + k] = product if symmetric else product + low


def take_quant_rows(panels: Panels, ids: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Rows ids (T,) int64 into out (T, K) float32, K <= 32 G: embeddings looked up in a tied head."""
    zero = -1 if panels.has_mins else _ZERO_CODES[panels.kind]
    blocks = panels.blocks
    unpack_quant_rows(panels.kind, zero, blocks.view(np.uint32), blocks.view(np.uint16), ids, out)
    return out
