"""The layout of quantised weights, and of the activations that multiply them.

Weights W (N, K) are stored in panels of 16 rows, like float weights (matmul/panels.py), and in quantisation groups of
32 columns. Four columns of a group are a quad: a vector of 64 bytes holds one quad of 16 rows, so that one integer
dot-product instruction multiplies 16 rows by four broadcast activations.

    w = scale (code - zero)      symmetric        or      w = scale code + min

A block holds one group of one panel: 16 scales and perhaps 16 mins as IEEE halves, then lines of 64 bytes of codes.

- ``INT4``: codes 0..15 in 4 lines; byte i of line j holds quad j in its low and quad j + 4 in its high four bits.
- ``INT5``: codes 0..31 in 5 lines: four as above with the low four bits of each code, and a fifth, of whose byte i bit
  j is the highest bit of quad j.
- ``INT8``: signed codes in 8 lines, one quad in each.

Weights are blocks (P, G, block_bytes), one sequential stream for each panel; the zero points are 8, 16, 0.

Activations are stored in blocks of S = 12 tokens (or of all, if there are fewer), group by group, with the tokens of a
group contiguous: xq (B, G, S, 32) int8, xs (B, G, S) = max|x| / 127, totals (B, G, S) = xs sum(xq), and offsets
(B, G, S, 4) int32 = sum(xq) times -8, -16, -128, 0. Integer sums start from an offset, so that subtracting the zero
point costs nothing: -8 for INT4, -16 for INT5, 0 for these with mins; -128 for INT8 where the instruction takes
unsigned weights, so that 128 is added to them (simd/dot_llvm.py). A tile of tokens reads memory in order, with constant
strides between tokens.

A few features of a language model are outliers: far larger than the rest, they would set the scale of their group
(LLM.int8(), Dettmers et al. 2022). So the four largest elements of a row, among its first 65536 (whose groups' maxima
fit on the stack), are left out of xq and stored in outliers (T, 4, 2) float32 as (column, x), in the order of columns:
each adds one column of W times x in float32.
"""

from typing import Any, NamedTuple

import numpy as np

GROUP = 32
INT4, INT5, INT8 = 0, 1, 2
LINES = (4, 5, 8)  # lines of codes in one block, by kind
LINE = 64  # bytes of one line: 16 rows x 4 columns
SCALE_BYTES = 32  # bytes of the 16 scales of a block, or of its 16 mins
ZERO4, ZERO5, ZERO8 = np.float32(8), np.float32(16), np.float32(0)  # zero points: the code of 0 in symmetric weights
OFFSETS = 4  # offsets of a token's group
NO_ZERO = 3  # index of the offset that is always 0
OUTLIERS = 4  # outliers of a row
BLOCK_TOKENS = 12  # tokens of a block of activations: two tiles of 6


class Rounded(NamedTuple):
    """Activations rounded to 8 bits, and their outliers, as described above."""

    xq: Any
    xs: Any
    offsets: Any
    totals: Any
    outliers: Any


def block_bytes(kind: int, has_mins: bool) -> int:
    """Bytes of one group of 16 rows."""
    return LINES[kind] * LINE + (2 if has_mins else 1) * SCALE_BYTES


def token_blocks(tokens: int) -> tuple[int, int]:
    """How many blocks so many tokens take, and the tokens of a block; the last block may not be full."""
    block_tokens = max(1, min(tokens, BLOCK_TOKENS))
    return (tokens + block_tokens - 1) // block_tokens, block_tokens
