"""Rotary position embedding (RoPE): the rotation, from tables or with angles computed on the way.

Pair i of a head is rotated by the angle ``position * inv_freq[i]``. Two layouts of the pairs exist: *half-split*
(i, i + D/2) as in Hugging Face's LLaMA, and *interleaved* (2i, 2i + 1) as in the paper and in GGUF files of LLaMA.
"""

from typing import Any

import numpy as np
from numba import prange

from ruvllm.kernels import _check, reference
from ruvllm.kernels._jit import inline_kernel, kernel, parallel_kernel
from ruvllm.kernels._simd import (
    LANES,
    evens,
    f32_load,
    f32_load_first,
    f32_store,
    f32_store_first,
    fma,
    odds,
    splat,
    zip_high,
    zip_low,
)
from ruvllm.kernels._small import may_write, room, small_call
from ruvllm.kernels._spec import KernelSpec
from ruvllm.kernels._threads import PARALLEL_ELEMENTS, launch, threads_for
from ruvllm.kernels.rope_frequencies import rope_inv_freq, rope_tables

_FORWARD, _BACKWARD = np.float32(1), np.float32(-1)
_PI = np.pi
_ONE_OVER_PI = 1 / np.pi


@inline_kernel
def rotate_half_split(x: Any, start: Any, cos: Any, sin: Any, angle: Any, half: Any, sign: Any, out: Any) -> None:
    """One head from the flat index ``start``, by the table row that starts at the flat index ``angle``."""
    plus = splat(sign)
    minus = splat(-sign)
    whole = half - half % LANES
    for i in range(0, whole, LANES):
        c = f32_load(cos, angle + i)
        s = f32_load(sin, angle + i)
        first = f32_load(x, start + i)
        second = f32_load(x, start + half + i)
        f32_store(out, start + i, fma(first, c, second * s * minus))
        f32_store(out, start + half + i, fma(second, c, first * s * plus))
    if whole < half:
        count = half - whole
        c = f32_load_first(cos, angle + whole, count)
        s = f32_load_first(sin, angle + whole, count)
        first = f32_load_first(x, start + whole, count)
        second = f32_load_first(x, start + half + whole, count)
        f32_store_first(out, start + whole, fma(first, c, second * s * minus), count)
        f32_store_first(out, start + half + whole, fma(second, c, first * s * plus), count)


@inline_kernel
def rotate_interleaved(x: Any, start: Any, cos: Any, sin: Any, angle: Any, half: Any, sign: Any, out: Any) -> None:
    """rotate_half_split for pairs (2i, 2i + 1): two vectors are sorted into firsts and seconds, and merged again."""
    plus = splat(sign)
    minus = splat(-sign)
    whole = half - half % LANES
    for i in range(0, whole, LANES):
        c = f32_load(cos, angle + i)
        s = f32_load(sin, angle + i)
        at = start + 2 * i
        low = f32_load(x, at)
        high = f32_load(x, at + LANES)
        first = evens(low, high)
        second = odds(low, high)
        y = fma(first, c, second * s * minus)
        z = fma(second, c, first * s * plus)
        f32_store(out, at, zip_low(y, z))
        f32_store(out, at + LANES, zip_high(y, z))
    if whole < half:
        count = half - whole
        c = f32_load_first(cos, angle + whole, count)
        s = f32_load_first(sin, angle + whole, count)
        at = start + 2 * whole
        low = f32_load_first(x, at, 2 * count)
        high = f32_load_first(x, at + LANES, 2 * count - LANES)
        first = evens(low, high)
        second = odds(low, high)
        y = fma(first, c, second * s * minus)
        z = fma(second, c, first * s * plus)
        f32_store_first(out, at, zip_low(y, z), 2 * count)
        f32_store_first(out, at + LANES, zip_high(y, z), 2 * count - LANES)


@inline_kernel
def rotate_rows(x: Any, cos: Any, sin: Any, sign: Any, interleaved: Any, out: Any, lo: Any, hi: Any) -> None:
    """Rows lo:hi of either layout; the table row advances with the token, without a division per row."""
    heads, dim = x.shape[1], x.shape[2]
    half = dim // 2
    end = cos.shape[0] * half
    token = lo // heads
    head = lo - token * heads
    angle = token % cos.shape[0] * half
    for row in range(lo, hi):
        if interleaved:
            rotate_interleaved(x, row * dim, cos, sin, angle, half, sign, out)
        else:
            rotate_half_split(x, row * dim, cos, sin, angle, half, sign, out)
        head += 1
        if head == heads:
            head = 0
            angle = angle + half if angle + half < end else 0


@kernel(strict=True)
def rope_rows(x: Any, cos: Any, sin: Any, sign: Any, out: Any, lo: Any, hi: Any) -> None:
    """Rows lo:hi, row = t H + h, of the half-split rotation. x, out (T, H, D); sign float32: 1, or -1 for the inverse.

    cos, sin (n, D/2): token t uses table row t % n, so that a batch of sequences shares one table.
    """
    rotate_rows(x, cos, sin, sign, False, out, lo, hi)


@kernel(strict=True)
def rope_rows_interleaved(x: Any, cos: Any, sin: Any, sign: Any, out: Any, lo: Any, hi: Any) -> None:
    """rope_rows for pairs (2i, 2i + 1)."""
    rotate_rows(x, cos, sin, sign, True, out, lo, hi)


@parallel_kernel
def rope_parallel(x: Any, cos: Any, sin: Any, sign: Any, interleaved: Any, out: Any, threads: Any) -> None:
    """rope_rows or rope_rows_interleaved with the rows split over threads."""
    rows = x.shape[0] * x.shape[1]
    for t in prange(threads):
        lo, hi = rows * t // threads, rows * (t + 1) // threads
        if interleaved:
            rope_rows_interleaved(x, cos, sin, sign, out, lo, hi)
        else:
            rope_rows(x, cos, sin, sign, out, lo, hi)


@small_call((3, 2, 2, bool, bool, 3))
def rope_small(x: Any, cos: Any, sin: Any, interleaved: Any, inverse: Any, out: Any) -> bool:
    """apply_rope_tables of fewer elements than PARALLEL_ELEMENTS."""
    tokens, heads, dim = x.shape
    if out.shape != x.shape or cos.shape != sin.shape or cos.shape[0] != tokens or 2 * cos.shape[1] != dim:
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
        cos, sin: (T, D/2) float32, from ``rope_tables``.
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + D/2).
        inverse: rotate back.
        out: (..., T, H, D) float32 to write into; may be ``x`` itself.

    Returns:
        (..., T, H, D) float32.

    Raises:
        TypeError: an argument is not a float32 array.
        ValueError: shapes do not match.

    Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding".
    """
    y: Any = room(x.shape) if out is None and type(x) is np.ndarray else out
    if rope_small(x, cos, sin, interleaved, inverse, y):
        return y
    x = _check.float32("x", x, min_ndim=3)
    tokens, heads, dim = x.shape[-3:]
    _require_pairs(dim)
    cos = _check.float32("cos", cos, shape=(tokens, dim // 2))
    sin = _check.float32("sin", sin, shape=(tokens, dim // 2))
    out = _check.output("out", out, x.shape, x, cos, sin)
    if x.size:
        sequences = x if x.ndim == 3 else x.reshape(-1, heads, dim)
        to = out if x.ndim == 3 else out.reshape(-1, heads, dim)
        sign = _BACKWARD if inverse else _FORWARD
        count = x.size // dim
        threads = threads_for(x.size, PARALLEL_ELEMENTS, count)
        if threads > 1:
            launch(rope_parallel, sequences, cos, sin, sign, interleaved, to, threads)
        elif interleaved:
            rope_rows_interleaved(sequences, cos, sin, sign, to, 0, count)
        else:
            rope_rows(sequences, cos, sin, sign, to, 0, count)
    return out


def _require_pairs(dim: int) -> None:
    if dim < 2 or dim % 2:
        raise ValueError(f"x: expected an even last axis (head_dim) >= 2, found {dim}")


# --- the rotation with angles computed on the way ----------------------------------------------------------------


@kernel
def rope_angles(positions: Any, inv_freq: Any, cos: Any, sin: Any, lo: Any, hi: Any) -> None:
    """Rows lo:hi of rope_tables. positions (T,) int64; inv_freq (D/2,) float64; cos, sin (T, D/2) float32.

    angle = n pi + r with |r| <= pi/2, so sin and cos are (-1)^n times those of r, whose Taylor series end below
    float32's rounding at degree 14: every step is plain float64 arithmetic that LLVM vectorises.
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
def rope_tokens(
    x: Any, positions: Any, inv_freq: Any, sign: Any, interleaved: Any, tables: Any, out: Any, lo: Any, hi: Any
) -> None:
    """Tokens lo:hi of apply_rope. x, out (T, H, D); tables (2, T, D/2) float32 of scratch, left holding cos and sin."""
    cos, sin = tables[0], tables[1]
    rope_angles(positions, inv_freq, cos, sin, lo, hi)
    if interleaved:
        rope_rows_interleaved(x, cos, sin, sign, out, lo * x.shape[1], hi * x.shape[1])
    else:
        rope_rows(x, cos, sin, sign, out, lo * x.shape[1], hi * x.shape[1])


@parallel_kernel
def rope_tokens_parallel(
    x: Any, positions: Any, inv_freq: Any, sign: Any, interleaved: Any, tables: Any, out: Any, threads: Any
) -> None:
    """rope_tokens with the tokens split over threads."""
    tokens = x.shape[0]
    for t in prange(threads):
        lo, hi = tokens * t // threads, tokens * (t + 1) // threads
        rope_tokens(x, positions, inv_freq, sign, interleaved, tables, out, lo, hi)


def apply_rope(
    x: Any,
    positions: Any,
    inv_freq: Any = None,
    interleaved: bool = False,
    inverse: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Rotate pair i of every head of token t by the angle positions[t] inv_freq[i], computed on the way.

    Args:
        x: (..., T, H, D) float32, D even; leading dimensions are sequences at the same positions.
        positions: (T,) integers.
        inv_freq: (D/2,) float64, from ``rope_inv_freq``; None for theta = 10000 without scaling.
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + D/2).
        inverse: rotate back.
        out: (..., T, H, D) float32 to write into; may be ``x`` itself.

    Returns:
        (..., T, H, D) float32. Angles are float64 and right at any position that a model can reach.

    Raises:
        TypeError: ``x`` is not float32, or positions are not integers.
        ValueError: shapes do not match.

    Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding".
    """
    x = _check.float32("x", x, min_ndim=3)
    tokens, dim = x.shape[-3], x.shape[-1]
    _require_pairs(dim)
    positions = _check.integers("positions", positions)
    if positions.shape != (tokens,):
        raise ValueError(f"positions: expected {tokens}, one per token, found {positions.size}")
    inv_freq = rope_inv_freq(dim) if inv_freq is None else _check.float64("inv_freq", inv_freq)
    if inv_freq.shape != (dim // 2,):
        raise ValueError(f"inv_freq: expected shape ({dim // 2},), found {inv_freq.shape}")
    out = _check.output("out", out, x.shape, x)
    tables = np.empty((2, tokens, dim // 2), np.float32)
    if x.ndim > 3:
        cos, sin = tables
        rope_angles(positions, inv_freq, cos, sin, 0, tokens)
        return apply_rope_tables(x, cos, sin, interleaved, inverse, out)
    sign = _BACKWARD if inverse else _FORWARD
    threads = threads_for(x.size, PARALLEL_ELEMENTS, tokens)
    if threads == 1:
        rope_tokens(x, positions, inv_freq, sign, interleaved, tables, out, 0, tokens)
    else:
        launch(rope_tokens_parallel, x, positions, inv_freq, sign, interleaved, tables, out, threads)
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
        sizes=tuple({"tokens": t, "heads": 1, "dim": d} for d in (64, 128) for t in (1, 8, 32, 128)),
    ),
    KernelSpec(
        name="apply_rope_tables",
        function=apply_rope_tables,
        compiled=(rope_rows, rope_rows_interleaved, rope_parallel),
        reference=reference.apply_rope_tables,
        formula="(a, b) -> (a cos - b sin, b cos + a sin), cos and sin given",
        example=_example_tables,
        flops=lambda tokens, heads, dim: 3.0 * tokens * heads * dim,
        bytes=lambda tokens, heads, dim: 4.0 * (2 * heads + 1) * tokens * dim,
        sizes=(
            {"tokens": 1, "heads": 1, "dim": 64},
            {"tokens": 8, "heads": 1, "dim": 128},
            {"tokens": 32, "heads": 1, "dim": 128},
            {"tokens": 64, "heads": 32, "dim": 128},
        ),
    ),
]
