"""Quantised operands for the tests of integer matmul, and the results in int64 and float64.

Run as a program, it checks every case in a process of its own, with another CPU or without the compiler:
``python -m tests.kernels.quant_cases``; it prints the instructions in use and a hash of all integers.
"""

import hashlib
import sys
from typing import Any, NamedTuple

import numpy as np

from ruvllm.kernels.jit.decorators import DISABLE_JIT, kernel
from ruvllm.kernels.quant.activations import quantize_activations
from ruvllm.kernels.quant.layout import INT4, INT5, INT8, OUTLIERS, Rounded, token_blocks
from ruvllm.kernels.quant.matmul import quant_matmul
from ruvllm.kernels.quant.panels import Panels, empty_panels, pack_groups
from ruvllm.kernels.quant.weights import quantize_int4, quantize_int8
from ruvllm.kernels.simd.vectors import f16_to_f32, f32_store, f32_to_f16, load, store_element

TOKENS = (*range(1, 14), 17, 64, 125)
SHAPES = ((1, 1), (15, 31), (16, 32), (17, 33), (33, 95), (48, 256), (129, 577))  # N, K
ZEROS = {INT4: 8, INT5: 16, INT8: 0}
CODES = {INT4: 16, INT5: 32, INT8: 256}  # codes are below
KINDS = tuple((kind, mins) for kind in (INT4, INT5, INT8) for mins in (False, True))
ONE = np.float16(1).view(np.uint16)  # the bits of a scale of 1


class Weights(NamedTuple):
    """Row-major operands, and their panels."""

    codes: np.ndarray  # (N, 32 G) int64: signed values of 8-bit weights, else from 0 on
    scales: np.ndarray  # (N, G) float64
    mins: np.ndarray  # (N, G) float64: -zero scale for symmetric weights
    panels: Panels

    def matrix(self) -> np.ndarray:
        """W (N, 32 G) in float64."""
        return np.repeat(self.scales, 32, 1) * self.codes + np.repeat(self.mins, 32, 1)


def by_token(blocks: np.ndarray, tokens: int) -> np.ndarray:
    """Blocks of tokens, (B, G, S, ..), as (T, G, ..)."""
    rows = np.moveaxis(blocks, 2, 1)
    return rows.reshape(-1, *rows.shape[2:])[:tokens]


def in_blocks(rows: np.ndarray, fill: int = 99) -> np.ndarray:
    """Rows (T, G, ..) as blocks of tokens, (B, G, S, ..)."""
    blocks, side = token_blocks(len(rows))
    whole = np.full((blocks * side, *rows.shape[1:]), fill, rows.dtype)
    whole[: len(rows)] = rows
    return np.ascontiguousarray(np.moveaxis(whole.reshape(blocks, side, *rows.shape[1:]), 1, 2))


class Rows(NamedTuple):
    """Activations by token: xq (T, 32 G), xs and totals (T, G), offsets (T, G, 4), outliers (T, 4, 2)."""

    xq: np.ndarray
    xs: np.ndarray
    offsets: np.ndarray
    totals: np.ndarray
    outliers: np.ndarray

    @property
    def sums(self) -> np.ndarray:
        """sum(xq) of each group, (T, G) int64."""
        return self.xq.reshape(len(self.xq), -1, 32).sum(2, dtype=np.int64)


class Activations(NamedTuple):
    """The result of quantize_activations for x (T, K)."""

    xq: np.ndarray
    xs: np.ndarray
    offsets: np.ndarray
    totals: np.ndarray
    outliers: np.ndarray

    def rows(self) -> Rows:
        tokens = len(self.outliers)
        xq, xs, offsets, totals = (by_token(array, tokens) for array in self[:4])
        return Rows(xq.reshape(tokens, -1), xs, offsets, totals, self.outliers)

    def matrix(self) -> np.ndarray:
        """x (T, 32 G) in float64, as rounded."""
        rows = self.rows()
        x = np.repeat(rows.xs.astype(np.float64), 32, 1) * rows.xq
        for t, kept in enumerate(self.outliers):
            np.add.at(x[t], kept[:, 0].astype(np.int64), kept[:, 1])
        return x


def of_rows(rows: Rows) -> Activations:
    """Activations given by token."""
    xq, xs, offsets, totals = (in_blocks(a) for a in (rows.xq.reshape(*rows.xs.shape, 32), *rows[1:4]))
    return Activations(xq, xs, offsets, totals, rows.outliers)


def weights(kind: int, codes: np.ndarray, scales: np.ndarray, mins: np.ndarray | None) -> Weights:
    """From codes (uint8), scales and mins (bits of half floats)."""
    n, groups = scales.shape
    panels = empty_panels(kind, n, groups * 32, mins is not None)
    panels.blocks[...] = 77  # whatever was in memory
    pack_groups(codes, scales, mins, panels)
    values = codes.view(np.int8).astype(np.int64) if kind == INT8 else codes.astype(np.int64)
    scale = scales.view(np.float16).astype(np.float64)
    low = -ZEROS[kind] * scale if mins is None else mins.view(np.float16).astype(np.float64)
    return Weights(values, scale, low, panels)


def random_weights(rng: np.random.Generator, kind: int, with_mins: bool, n: int, k: int) -> Weights:
    groups = -(-k // 32)
    codes = rng.integers(0, CODES[kind], (n, groups * 32), np.uint8)
    scales, mins = rng.standard_normal((2, n, groups)).astype(np.float16).view(np.uint16)
    return weights(kind, codes, scales, mins if with_mins else None)


def unit_weights(kind: int, codes: np.ndarray, with_mins: bool) -> Weights:
    """Scales of 1, mins of 2: every result is an integer."""
    scales = np.full((len(codes), codes.shape[1] // 32), ONE)
    return weights(kind, codes, scales, np.full_like(scales, np.float16(2).view(np.uint16)) if with_mins else None)


def rounded_weights(rng: np.random.Generator, kind: int, with_mins: bool, n: int, k: int) -> tuple[np.ndarray, Weights]:
    """Normally distributed weights (n, k), and their quantised form."""
    w = rng.standard_normal((n, k), np.float32)
    if kind == INT4:
        return w, weights(kind, *quantize_int4(w, symmetric=not with_mins))
    codes, scales = quantize_int8(w)
    if kind == INT5:  # steps eight times as large
        wide, low = ((scales.view(np.float16) * np.float16(factor)).view(np.uint16) for factor in (8, -128))
        fives = ((codes.astype(np.int16) + 132) >> 3).clip(0, 31).astype(np.uint8)
        return w, weights(kind, fives, wide, low if with_mins else None)
    return w, weights(kind, codes.view(np.uint8), scales, np.zeros_like(scales) if with_mins else None)


def activations(x: np.ndarray) -> Activations:
    tokens, groups = len(x), -(-x.shape[1] // 32)
    blocks, side = token_blocks(tokens)
    xq = np.full((blocks, groups, side, 32), 99, np.int8)
    xs, totals = np.full((2, blocks, groups, side), np.float32(99))
    offsets = np.full((blocks, groups, side, 4), 99, np.int32)
    outliers = np.full((tokens, OUTLIERS, 2), np.float32(99))
    quantize_activations(x, Rounded(xq, xs, offsets, totals, outliers), 0, 0, tokens)
    return Activations(xq, xs, offsets, totals, outliers)


def unit_activations(xq: np.ndarray) -> Activations:
    """Scales of 1, no outliers, of xq (T, 32 G)."""
    sums = xq.reshape(len(xq), -1, 32).sum(2, dtype=np.int32)
    offsets = sums[:, :, None] * np.array([-8, -16, -128, 0], np.int32)
    none = np.zeros((len(xq), OUTLIERS, 2), np.float32)
    return of_rows(Rows(xq, np.ones(sums.shape, np.float32), offsets, sums.astype(np.float32), none))


def multiply(w: Weights, x: Activations) -> np.ndarray:
    """y (T, N), with quant_matmul."""
    out = np.full((len(x.outliers), len(w.codes)), np.nan, np.float32)
    quant_matmul(w.panels, Rounded(*x), out, 0, len(w.panels.blocks))
    return out


def integers(w: Weights, x: Activations) -> np.ndarray:
    """The exact result of unit weights and activations, in int64."""
    low = w.mins.astype(np.int64) @ x.rows().sums.T
    return (w.codes @ x.rows().xq.T.astype(np.int64) + low).T


def integer_cases(tokens: tuple[int, ...] = TOKENS) -> dict[str, tuple[Weights, Activations]]:
    """Random and extreme codes of every kind; sums stay below 2^24, where float32 represents every integer."""
    rng = np.random.default_rng(5)
    cases = {}
    for kind, mins in KINDS:
        smallest, largest = (128, 127) if kind == INT8 else (0, CODES[kind] - 1)  # int8 as uint8: -128, 127
        for t in tokens:
            for n, k in ((17, 32), (33, 224)):
                codes = rng.integers(0, CODES[kind], (n, k), np.uint8)
                xq = rng.integers(-127, 128, (t, k)).astype(np.int8)
                cases[f"random {kind} {mins} {t} {n} {k}"] = unit_weights(kind, codes, mins), unit_activations(xq)
            for name, codes in {
                "smallest": np.full((17, 64), smallest, np.uint8),
                "largest": np.full((17, 64), largest, np.uint8),
                "both": np.where(rng.random((17, 64)) < 0.5, smallest, largest).astype(np.uint8),
            }.items():
                for value in (-127, 127, 0):
                    xq = np.full((t, 64), value, np.int8)
                    if value == 0:
                        xq = np.where(rng.random(xq.shape) < 0.5, -127, 127).astype(np.int8)
                    case = unit_weights(kind, codes, mins), unit_activations(xq)
                    cases[f"{name} {kind} {mins} {t} {value}"] = case
    return cases


def check_integers(tokens: tuple[int, ...] = TOKENS) -> str:
    """Assert every integer case; a hash of all the results."""
    state = hashlib.sha256()
    for name, (w, x) in integer_cases(tokens).items():
        y = multiply(w, x)
        np.testing.assert_array_equal(y, integers(w, x), err_msg=name)
        state.update(y.astype(np.int64).tobytes())
    return state.hexdigest()


def check_rounding() -> str:
    """Rounded activations and quantised weights: the same codes and scales on every CPU."""
    rng = np.random.default_rng(6)
    state = hashlib.sha256()
    with np.errstate(over="raise", invalid="raise"):  # seen without a compiler
        assert not activations(np.full((1, 33), 1e-45, np.float32)).xq.any()
    for k in (1, 31, 32, 47, 95):
        x = rng.standard_normal((3, k), np.float32)
        for array in (*activations(x), *quantize_int8(x), *quantize_int4(x)[:2], *quantize_int4(x, symmetric=False)):
            state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()


@kernel(strict=True)
def convert_halves(halves: Any, one: Any, sixteen: Any) -> None:
    for i in range(halves.shape[0]):
        one[i] = f16_to_f32(halves[i])
    for i in range(0, halves.shape[0], 16):
        f32_store(sixteen, i, load(halves, i))


@kernel(strict=True)
def convert_numbers(numbers: Any, one: Any, stored: Any) -> None:
    for i in range(numbers.shape[0]):
        one[i] = f32_to_f16(numbers[i])
        store_element(stored, i, numbers[i], numbers[i])


def check_halves(step: int = 1) -> None:
    """Assert that half floats are converted as NumPy does: every one (or every step-th), and numbers around them."""
    halves = np.arange(0, 1 << 16, step, dtype=np.uint16)[: (1 << 16) // step // 16 * 16]
    exact = halves.view(np.float16).astype(np.float32)
    around = exact.view(np.uint32)[:, None] + np.array([0, 1, -1, 4095, 4096, 4097])
    numbers = np.concatenate((around.reshape(-1), np.random.default_rng(0).integers(0, 1 << 32, len(halves))))
    numbers = numbers.astype(np.uint32).view(np.float32)
    one, sixteen = np.empty((2, len(halves)), np.float32)
    convert_halves(halves, one, sixteen)
    narrow = np.empty((2, len(numbers)), np.uint16)
    with np.errstate(over="ignore", invalid="ignore"):
        convert_numbers(numbers, narrow[0], narrow[1])
        rounded = numbers.astype(np.float16)
    for found in (one, sixteen):
        assert ((found.view(np.uint32) == exact.view(np.uint32)) | (np.isnan(found) & np.isnan(exact))).all()
    assert ((narrow == rounded.view(np.uint16)) | (np.isnan(narrow.view(np.float16)) & np.isnan(rounded))).all()


if __name__ == "__main__":
    if DISABLE_JIT:
        kind = "python"
    else:
        from ruvllm.kernels.simd.dot_llvm import target_kind

        kind = target_kind()
    check_halves(97 if DISABLE_JIT else 1)
    few = tuple(int(t) for t in sys.argv[1:]) or TOKENS
    print(kind, check_integers(few), check_rounding())
