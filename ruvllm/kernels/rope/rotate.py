"""Rotary position embedding (RoPE): the rotation, from tables or with angles computed on the fly.

Pair i of a head is rotated by the angle ``position * inv_freq[i]``. Of a head's D elements the first R are rotated;
usually R = D. Two layouts of the pairs exist: *half-split* (i, i + R/2) as in Hugging Face's LLaMA, and *interleaved*
(2i, 2i + 1) as in the paper and in GGUF files of LLaMA.
"""

from typing import Any

import numpy as np

from ruvllm.kernels import check, reference
from ruvllm.kernels.jit.decorators import inline_kernel, kernel
from ruvllm.kernels.jit.small_calls import may_write, new_output, small_call
from ruvllm.kernels.jit.views import flat
from ruvllm.kernels.rope.frequencies import rope_inv_freq, rope_tables
from ruvllm.kernels.simd.vectors import LANES, evens, f32_load, f32_store, fma, odds, splat, zip_high, zip_low
from ruvllm.kernels.spec import KernelSpec, grid
from ruvllm.kernels.threads.over_rows import over_rows, run_rows
from ruvllm.kernels.threads.pool import PARALLEL_ELEMENTS

_FORWARD, _BACKWARD = np.float32(1), np.float32(-1)
_PI = np.pi
_ONE_OVER_PI = 1 / np.pi


@inline_kernel(independent=True)
def rotate(x, cos, sin, sign, interleaved, out):
    """Rotate the pairs of one head. x, out (D,); cos, sin (R/2,); sign float32: 1, or -1 for the inverse.

    Elements from R on are copied.
    """
    half = cos.size
    for i in range(half):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, half + i)
        a, b = x[first], x[second]
        out[first] = fma(a, cos[i], b * sin[i] * -sign)
        out[second] = fma(b, cos[i], a * sin[i] * sign)
    rest, to = x[2 * half :], out[2 * half :]
    for i in range(rest.size):
        to[i] = rest[i]


@inline_kernel
def rotate_vectors(x, start, cos, sin, sign, interleaved, out):
    """rotate for a head of R elements from x[start] on, R / 2 a multiple of LANES; x, out flat.

    A head is only a few vectors (eight of 16 lanes for D = 128), and the loop that LLVM makes of ``rotate`` spends as
    much time before and after them: in place, this takes 0.7 to 0.9 of its time.
    """
    half = cos.size
    plus, minus = splat(sign), splat(-sign)
    for i in range(0, half, LANES):
        first, second = (start + 2 * i, start + 2 * i + LANES) if interleaved else (start + i, start + half + i)
        a, b, c, s = f32_load(x, first), f32_load(x, second), f32_load(cos, i), f32_load(sin, i)
        if interleaved:
            a, b = evens(a, b), odds(a, b)
        a, b = fma(a, c, b * s * minus), fma(b, c, a * s * plus)
        if interleaved:
            a, b = zip_low(a, b), zip_high(a, b)
        f32_store(out, first, a)
        f32_store(out, second, b)


@inline_kernel
def rotate_rows(x, cos, sin, sign, interleaved, out, lo, hi):
    """Rows lo:hi, row = t H + h, of either layout. x, out (T, H, D).

    cos, sin (n, R/2): token t uses table row t % n, so that a batch of sequences shares one table.
    """
    heads, half = x.shape[1], cos.shape[1]
    vectors = half % LANES == 0 and 2 * half == x.shape[2]  # the whole head is rotated, in whole vectors
    t, h = lo // heads, lo % heads
    line = t % cos.shape[0]  # row of the tables
    for row in range(lo, hi):
        if vectors:
            rotate_vectors(flat(x), 2 * row * half, cos[line], sin[line], sign, interleaved, flat(out))
        else:
            rotate(x[t, h], cos[line], sin[line], sign, interleaved, out[t, h])
        h += 1
        if h == heads:  # without a division for each row
            t, h, line = t + 1, 0, line + 1
            if line == cos.shape[0]:
                line = 0


@kernel(strict=True)
def rope_rows(x, cos, sin, sign, out, lo, hi):
    """rotate_rows for the half-split layout."""
    rotate_rows(x, cos, sin, sign, False, out, lo, hi)


@kernel(strict=True)
def rope_rows_interleaved(x, cos, sin, sign, out, lo, hi):
    """rotate_rows for the interleaved layout."""
    rotate_rows(x, cos, sin, sign, True, out, lo, hi)


rope_parallel = over_rows(rope_rows)
rope_interleaved_parallel = over_rows(rope_rows_interleaved)


@small_call((3, 2, 2, bool, bool, 3))
def rope_small(x, cos, sin, interleaved, inverse, out):
    """apply_rope_tables of fewer elements than PARALLEL_ELEMENTS."""
    tokens, heads, dim = x.shape
    if out.shape != x.shape or cos.shape != sin.shape or cos.shape[0] != tokens or 2 * cos.shape[1] > dim or dim % 2:
        return False
    if not 0 < x.size < PARALLEL_ELEMENTS or not (may_write(out, x) and may_write(out, cos) and may_write(out, sin)):
        return False
    rotate_rows(x, cos, sin, _BACKWARD if inverse else _FORWARD, interleaved, out, 0, tokens * heads)
    return True


def apply_rope_tables(
    x: Any, cos: Any, sin: Any, interleaved: bool = False, inverse: bool = False, out: np.ndarray | None = None
) -> np.ndarray:
    """(a, b) -> (a cos - b sin, b cos + a sin) for every pair of every head, with cos and sin of its token.

    Args:
        x: (..., T, H, D) float32, D even; leading dimensions are sequences that share the tables.
        cos, sin: (T, R/2) float32, from ``rope_tables``; R <= D: elements from R on are not rotated.
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + R/2).
        inverse: rotate back.
        out: (..., T, H, D) float32 to write into; may be ``x`` itself.

    Returns:
        (..., T, H, D) float32.

    Raises:
        TypeError: an argument is not a float32 array.
        ValueError: shapes do not match.

    Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding".
    """
    y: Any = new_output(x.shape) if out is None and type(x) is np.ndarray else out
    if rope_small(x, cos, sin, interleaved, inverse, y):
        return y
    if check.is_half(out):
        return check.rounded(out, apply_rope_tables, x, cos, sin, interleaved, inverse)
    x = check.float32("x", x, min_ndim=3)
    tokens, heads, dim = x.shape[-3:]
    _require_pairs(dim)
    cos = check.float32("cos", cos, shape=(tokens, None))
    sin = check.float32("sin", sin, shape=cos.shape)
    if 2 * cos.shape[1] > dim:
        raise ValueError(f"cos: expected at most {dim // 2} pairs for heads of {dim}, found {cos.shape[1]}")
    out = check.output("out", out, x.shape, x, cos, sin)
    if x.size:
        sequences = x if x.ndim == 3 else x.reshape(-1, heads, dim)
        to = out if x.ndim == 3 else out.reshape(-1, heads, dim)
        sign = _BACKWARD if inverse else _FORWARD
        both = (rope_rows_interleaved, rope_interleaved_parallel) if interleaved else (rope_rows, rope_parallel)
        run_rows(*both, x.size, PARALLEL_ELEMENTS, x.size // dim, sequences, cos, sin, sign, to)
    return out


def _require_pairs(dim: int) -> None:
    if dim < 2 or dim % 2:
        raise ValueError(f"x: expected an even last axis (head_dim) >= 2, found {dim}")


# --- the rotation with angles computed on the fly ----------------------------------------------------------------


@kernel
def rope_angles(positions, inv_freq, cos, sin, lo, hi):
    """Rows lo:hi of rope_tables. positions (T,) int64; inv_freq (R/2,) float64; cos, sin (T, R/2) float32.

    angle = n pi + r with |r| <= pi/2, so sin and cos are (-1)^n times those of r. Their Taylor series up to
    degree 14 are exact to float32's rounding: every step is plain float64 arithmetic that LLVM vectorises.
    """
    for t in range(lo, hi):
        position = np.float64(positions[t])
        for i in range(inv_freq.shape[0]):
            angle = position * inv_freq[i]
            n = np.floor(angle * _ONE_OVER_PI + 0.5)
            r = angle - n * _PI
            sign = 1.0 - 2.0 * (n - 2.0 * np.floor(n * 0.5))
            z = r * r
            s = 1.0 / 6227020800.0
            s = s * z - 1.0 / 39916800.0
            s = s * z + 1.0 / 362880.0
            s = s * z - 1.0 / 5040.0
            s = s * z + 1.0 / 120.0
            s = s * z - 1.0 / 6.0
            c = -1.0 / 87178291200.0
            c = c * z + 1.0 / 479001600.0
            c = c * z - 1.0 / 3628800.0
            c = c * z + 1.0 / 40320.0
            c = c * z - 1.0 / 720.0
            c = c * z + 1.0 / 24.0
            c = c * z - 0.5
            sin[t, i] = np.float32(sign * (r + r * z * s))
            cos[t, i] = np.float32(sign * (1.0 + z * c))


@kernel(strict=True)
def rope_tokens(x, positions, inv_freq, interleaved, tables, out, lo, hi):
    """Tokens lo:hi of apply_rope. x, out (T, H, D); tables (2, T, R/2) float32: scratch, filled with cos and sin."""
    cos, sin = tables[0], tables[1]
    rope_angles(positions, inv_freq, cos, sin, lo, hi)
    if interleaved:
        rope_rows_interleaved(x, cos, sin, _FORWARD, out, lo * x.shape[1], hi * x.shape[1])
    else:
        rope_rows(x, cos, sin, _FORWARD, out, lo * x.shape[1], hi * x.shape[1])


rope_tokens_parallel = over_rows(rope_tokens)


def apply_rope(
    x: Any,
    positions: Any,
    inv_freq: Any = None,
    interleaved: bool = False,
    inverse: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Rotate pair i of every head of token t by the angle positions[t] inv_freq[i], computed on the fly.

    Args:
        x: (..., T, H, D) float32, D even; leading dimensions are sequences at the same positions.
        positions: (T,) integers.
        inv_freq: (R/2,) float64, from ``rope_inv_freq(R)``, R <= D: elements from R on are not rotated ("partial
            rotary"); None for R = D and theta = 10000 without scaling.
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + R/2).
        inverse: rotate back.
        out: (..., T, H, D) float32 to write into; may be ``x`` itself.

    Returns:
        (..., T, H, D) float32. Angles are float64, accurate at any position that a model can reach.

    Raises:
        TypeError: ``x`` is not float32, or positions are not integers.
        ValueError: shapes do not match.

    Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding".
    """
    if check.is_half(out):
        return check.rounded(out, apply_rope, x, positions, inv_freq, interleaved, inverse)
    x = check.float32("x", x, min_ndim=3)
    tokens, dim = x.shape[-3], x.shape[-1]
    _require_pairs(dim)
    positions = check.integers("positions", positions)
    if positions.shape != (tokens,):
        raise ValueError(f"positions: expected {tokens}, one per token, found {positions.size}")
    inv_freq = rope_inv_freq(dim) if inv_freq is None else check.float64("inv_freq", inv_freq)
    if inv_freq.ndim != 1 or inv_freq.size > dim // 2:
        raise ValueError(f"inv_freq: expected at most {dim // 2}, for heads of {dim}, found shape {inv_freq.shape}")
    out = check.output("out", out, x.shape, x)
    tables = np.empty((2, tokens, inv_freq.size), np.float32)
    if x.ndim > 3:
        cos, sin = tables
        rope_angles(positions, inv_freq, cos, sin, 0, tokens)
        return apply_rope_tables(x, cos, sin, interleaved, inverse, out)
    if inverse:
        inv_freq = -inv_freq
    arguments = x, positions, inv_freq, interleaved, tables, out
    run_rows(rope_tokens, rope_tokens_parallel, x.size, PARALLEL_ELEMENTS, tokens, *arguments)
    return out


def _example(rng: np.random.Generator, tokens: int, heads: int, dim: int) -> dict[str, Any]:
    return {
        "x": rng.standard_normal((tokens, heads, dim), np.float32),
        "positions": np.arange(tokens) + int(rng.integers(0, 131072)),
        "inv_freq": rope_inv_freq(dim),
    }


def _example_tables(rng: np.random.Generator, tokens: int, heads: int, dim: int) -> dict[str, Any]:
    cos, sin = rope_tables(np.arange(tokens) + int(rng.integers(0, 131072)), dim)
    return {"x": rng.standard_normal((tokens, heads, dim), np.float32), "cos": cos, "sin": sin}


_SIZES = (
    *grid(tokens=(1, 8, 32, 128), heads=1, dim=(64, 128)),
    *grid(tokens=(1, 64), heads=32, dim=128),
)

SPECS = [
    KernelSpec(
        name="apply_rope",
        function=apply_rope,
        compiled=(rope_tokens, rope_tokens_parallel, rope_angles),
        reference=reference.apply_rope,
        formula="(a, b) -> (a cos - b sin, b cos + a sin), angles position * inv_freq",
        example=_example,
        flops=lambda tokens, heads, dim: 3.0 * tokens * heads * dim,
        bytes=lambda tokens, heads, dim: 8.0 * tokens * heads * dim,
        sizes=_SIZES,
    ),
    KernelSpec(
        name="apply_rope_tables",
        function=apply_rope_tables,
        compiled=(rope_rows, rope_rows_interleaved, rope_parallel, rope_interleaved_parallel),
        reference=reference.apply_rope_tables,
        formula="(a, b) -> (a cos - b sin, b cos + a sin), cos and sin given",
        example=_example_tables,
        flops=lambda tokens, heads, dim: 3.0 * tokens * heads * dim,
        bytes=lambda tokens, heads, dim: 4.0 * (2 * heads + 1) * tokens * dim,
        sizes=_SIZES,
    ),
]
