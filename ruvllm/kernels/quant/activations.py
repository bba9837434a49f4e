"""Activations rounded to 8 bits in groups of 32, all but their outliers (see quant/layout.py)."""

from typing import Any, NamedTuple

import numpy as np
from numba import prange

from ruvllm.kernels.jit.decorators import inline_kernel, kernel, parallel_kernel
from ruvllm.kernels.jit.views import flat
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.quant.layout import GROUP, NO_ZERO, OFFSETS, OUTLIERS, Rounded
from ruvllm.kernels.simd.vectors import (
    f32_load,
    f32_load_first,
    f32_store,
    f32_zero,
    find_magnitude,
    i8_store,
    i32_hsum,
    largest_magnitude,
    max_or_second,
    round_to_i32,
    splat,
    stack_f32,
    without_lane,
    zero_below,
)
from ruvllm.kernels.threads.over_rows import run_rows
from ruvllm.kernels.threads.pool import PARALLEL_ELEMENTS

_SEARCHED = 2048  # groups at a time, whose maxima are on the stack; outliers are sought in a row's first 2048 groups
_ROWS = 8  # rows at a time: finding an outlier is a long dependency chain, which those of other rows overlap
_STEPS = np.float32(127)
_SMALLEST = np.float32(2.0**-120)  # the smallest max|x|: 127 / max|x| stays finite


class _Row(NamedTuple):
    """``size`` elements of a flat array, from ``start`` on."""

    elements: Any
    start: Any
    size: Any


@inline_kernel
def _load_group(flat_x, at, left):
    """A group as two vectors; elements past the end of the row, ``left`` elements away, are 0."""
    if left >= GROUP:
        return f32_load(flat_x, at), f32_load(flat_x, at + LANES)
    b = f32_load_first(flat_x, at + LANES, left - LANES) if left > LANES else f32_zero()
    return f32_load_first(flat_x, at, left), b


@inline_kernel
def _without(a, b, k):
    """The group with element ``k`` set to 0, if it is one of its 32."""
    return without_lane(a, k), without_lane(b, k - LANES)


@inline_kernel
def _find(a, b, magnitude):
    """The first of the group's elements with this magnitude; branch-free, as the branch would be unpredictable."""
    k, later = find_magnitude(a, magnitude), find_magnitude(b, magnitude)
    return k + later if k == LANES else k


@inline_kernel
def _largest(magnitudes):
    """The largest magnitude of a row, of one for each group, and the first group that has it; 0 if all are 0.

    32 groups in a row of which one is NaN are skipped.
    """
    largest, found = np.float32(0), 0
    for g in range(0, magnitudes.size, GROUP):
        a, b = _load_group(magnitudes.elements, magnitudes.start + g, magnitudes.size - g)
        here = largest_magnitude(a, b)  # NaN, for which no comparison holds, if there is one
        if here > largest:
            largest, found = here, g + _find(a, b, here)
    return largest, found


@inline_kernel
def _in_order(outliers, t, at):
    """Swap outlier ``at`` of row t with the one before, if its column is smaller."""
    k, x, later, y = outliers[t, at - 1, 0], outliers[t, at - 1, 1], outliers[t, at, 0], outliers[t, at, 1]
    wrong = later < k
    outliers[t, at - 1, 0], outliers[t, at - 1, 1] = (later if wrong else k), (y if wrong else x)
    outliers[t, at, 0], outliers[t, at, 1] = (k if wrong else later), (x if wrong else y)


@inline_kernel
def _take_outlier(x, largest, outliers, t, i):
    """Take the largest element that is left of row x out of its group. largest: what is left, one for each group."""
    magnitude, g = _largest(largest)
    column, value = 0, np.float32(0)
    if magnitude > _SMALLEST:
        first = g * GROUP
        a, b = _load_group(x.elements, x.start + first, x.size - first)
        for j in range(i):  # one group may have several
            a, b = _without(a, b, np.int64(outliers[t, j, 0]) - first)
        k = _find(a, b, magnitude)
        column, value = first + k, x.elements[x.start + first + k]
        a, b = _without(a, b, k)
        largest.elements[largest.start + g] = largest_magnitude(a, b)
    outliers[t, i, 0], outliers[t, i, 1] = np.float32(column), value
    for j in range(i, 0, -1):
        _in_order(outliers, t, j)


@kernel(strict=True)
def quantize_activations(x, to, shift, lo, hi):
    """Round rows lo:hi of x (T, K) to int8 in groups of 32: xs = max|x| / 127, xq = round(x / xs).

    The four largest elements of a row are taken out before, as outliers. Row t is written as row t + shift.

    to: a ``Rounded``: xq (B, G, S, 32); xs, totals (B, G, S); offsets (B, G, S, 4), with token_blocks(T) = (B, S);
    outliers (T, 4, 2). ``totals`` includes outliers. A NaN or infinity makes its group's scale NaN, so that it reaches
    the result. Groups of elements below 2^-120 become zeros. Columns beyond 65536 have no outliers.
    """
    columns = x.shape[1]
    groups, block_tokens = to.xs.shape[1], to.xs.shape[2]
    outliers = to.outliers
    largest, inverse = stack_f32(_SEARCHED), stack_f32(_SEARCHED)  # one element for each group
    stride = min((groups + LANES - 1) // LANES * LANES, _SEARCHED)  # from one row's groups to the next's
    most = min(_SEARCHED // stride, _ROWS)
    xf, lines = flat(x), Rounded(flat(to.xq), flat(to.xs), flat(to.offsets), flat(to.totals), flat(outliers))
    for start in range(lo, hi, most):
        end = min(start + most, hi)
        for base in range(0, groups, _SEARCHED):
            count = min(groups - base, _SEARCHED)
            for source in range(start, end):
                row, at = source * columns, (source - start) * stride
                f32_store(largest, at + stride - LANES, f32_zero())  # the rest of the last vector
                for g in range(count):
                    first = (base + g) * GROUP
                    a, b = _load_group(xf, row + first, columns - first)
                    magnitude = largest_magnitude(a, b)
                    largest[at + g] = magnitude + (magnitude - magnitude)  # NaN for infinity too
            if base == 0:
                for i in range(OUTLIERS):
                    for source in range(start, end):
                        left = _Row(largest, (source - start) * stride, count)
                        _take_outlier(_Row(xf, source * columns, columns), left, outliers, source + shift, i)
            for at in range(0, (end - start) * stride, LANES):
                magnitudes = f32_load(largest, at)
                inverses = splat(_STEPS) / max_or_second(splat(_SMALLEST), magnitudes)
                f32_store(inverse, at, zero_below(magnitudes, _SMALLEST, inverses))
                f32_store(largest, at, magnitudes / splat(_STEPS))  # from here on, the scales
            for source in range(start, end):
                row, at, t = source * columns, (source - start) * stride, source + shift
                first_group = t // block_tokens * groups * block_tokens + t % block_tokens
                taken = 0  # outliers already passed
                for g in range(count):
                    first = (base + g) * GROUP
                    a, b = _load_group(xf, row + first, columns - first)
                    while taken < OUTLIERS and np.int64(outliers[t, taken, 0]) // GROUP == base + g:
                        if outliers[t, taken, 1] != np.float32(0):
                            a, b = _without(a, b, np.int64(outliers[t, taken, 0]) - first)
                        taken += 1
                    _round_group(a, b, inverse[at + g], largest[at + g], lines, first_group + (base + g) * block_tokens)
                if base == 0:
                    for i in range(OUTLIERS):
                        group = np.int64(outliers[t, i, 0]) // GROUP
                        lines.totals[first_group + group * block_tokens] += outliers[t, i, 1]


@inline_kernel
def _round_group(a, b, inverse, scale, to, at):
    """Write the codes, scale, offsets and total of the vectors a and b as the group of index ``at``."""
    qa, qb = round_to_i32(a * splat(inverse)), round_to_i32(b * splat(inverse))
    i8_store(to.xq, at * GROUP, qa)
    i8_store(to.xq, at * GROUP + LANES, qb)
    total, offsets = i32_hsum(qa + qb), to.offsets
    to.xs[at] = scale
    to.totals[at] = scale * np.float32(total)
    offsets[at * OFFSETS], offsets[at * OFFSETS + 1], offsets[at * OFFSETS + 2] = -8 * total, -16 * total, -128 * total
    offsets[at * OFFSETS + NO_ZERO] = 0


@parallel_kernel
def quantize_activations_parallel(threads, rows, x, to, shift):
    """quantize_activations with the rows split over threads."""
    for t in prange(threads):
        quantize_activations(x, to, shift, rows * t // threads, rows * (t + 1) // threads)


def round_activations(x: np.ndarray, to: Rounded) -> None:
    """quantize_activations for callers that own their buffers (``model.Activations``) and guarantee their sizes."""
    run_rows(quantize_activations, quantize_activations_parallel, x.size, PARALLEL_ELEMENTS, len(x), x, to, 0)
