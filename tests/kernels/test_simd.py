"""The SIMD vectors against their plain NumPy meaning, lane by lane."""

import os
import platform
import subprocess
import sys

import numpy as np
import pytest
from numba import njit

from ruvllm.kernels.simd import vectors as simd
from ruvllm.kernels.simd import vectors_python
from ruvllm.kernels.simd.vectors import f32_load, f32_load_first, f32_store, f32_store_first, lanes_between

LANES = 16


def _f32(values: list[float]) -> np.ndarray:
    return np.array(values, np.float32)


SPECIAL = _f32([0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-40, -1e-40, 0.5, 2.5, -2.5, 1e10, 7])


def _vectors(count: int, seed: int = 0) -> list[np.ndarray]:
    """Random vectors of float32, the first two with special values at different lanes."""
    rng = np.random.default_rng(seed)
    made = [rng.standard_normal(LANES).astype(np.float32) for _ in range(count)]
    return [SPECIAL, np.roll(SPECIAL, 5), *made]


def _unary(op):
    load, store = simd.f32_load, simd.f32_store

    @njit
    def run(a, out):
        store(out, 0, op(load(a, 0)))

    return run


def _binary(op):
    load, store = simd.f32_load, simd.f32_store

    @njit
    def run(a, b, out):
        store(out, 0, op(load(a, 0), load(b, 0)))

    return run


ARITHMETIC = {
    "+": njit(lambda a, b: a + b),
    "-": njit(lambda a, b: a - b),
    "*": njit(lambda a, b: a * b),
    "/": njit(lambda a, b: a / b),
}


@pytest.mark.parametrize("sign", ARITHMETIC)
@np.errstate(all="ignore")
def test_arithmetic(sign: str) -> None:
    run, out = _binary(ARITHMETIC[sign]), np.empty(LANES, np.float32)
    for a in _vectors(3):
        for b in _vectors(3, seed=1):
            run(a, b, out)
            np.testing.assert_array_equal(out, ARITHMETIC[sign].py_func(a, b))


@pytest.mark.parametrize(
    "name", ["fmax", "fmin", "max_or_nan", "max_or_second", "evens", "odds", "zip_low", "zip_high", "low_halves"]
)
def test_two_vectors(name: str) -> None:
    run, out = _binary(getattr(simd, name)), np.empty(LANES, np.float32)
    for a in _vectors(3):
        for b in _vectors(3, seed=1):
            run(a, b, out)
            np.testing.assert_array_equal(out, getattr(vectors_python, name)(a, b))


def test_pairs_are_taken_apart_and_put_together() -> None:
    a, b = np.arange(16, dtype=np.float32), np.arange(16, 32, dtype=np.float32)
    out = np.empty((4, LANES), np.float32)
    for row, name in enumerate(("evens", "odds", "zip_low", "zip_high")):
        _binary(getattr(simd, name))(a, b, out[row])
    np.testing.assert_array_equal(out[0], np.arange(0, 32, 2))
    np.testing.assert_array_equal(out[1], np.arange(1, 32, 2))
    np.testing.assert_array_equal(np.concatenate(out[2:]).reshape(16, 2), np.stack((a, b), 1))


def test_fma_rounds_once() -> None:
    load, store, fma = simd.f32_load, simd.f32_store, simd.fma

    @njit
    def run(a, b, c, out):
        store(out, 0, fma(load(a, 0), load(b, 0), load(c, 0)))

    out = np.empty(LANES, np.float32)
    a = np.float32(1 + 2.0**-12) * np.ones(LANES, np.float32)
    run(a, a, -np.float32(1 + 2.0**-11) * np.ones(LANES, np.float32), out)
    assert (out == np.float32(2.0**-24)).all()  # a * a alone would round this away
    for a, b, c in zip(_vectors(9), _vectors(9, 1), _vectors(9, 2), strict=True):
        run(a, b, c, out)
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(out, (a.astype(np.float64) * b + c).astype(np.float32))


def test_scalar_maximum_takes_the_number_next_to_nan() -> None:
    fmax = simd.fmax

    @njit
    def run(a, b):
        return fmax(a, b)

    values = _f32([1, -2, np.inf, -np.inf, np.nan])
    for a in values:
        for b in values:
            np.testing.assert_equal(run(a, b), np.fmax(a, b))


def test_reductions() -> None:
    load, hsum, hmax = simd.f32_load, simd.hsum, simd.hmax

    @njit
    def run(a):
        v = load(a, 0)
        return hsum(v), hmax(v)

    with np.errstate(all="ignore"):
        for a in _vectors(20):
            total, largest = run(a)
            np.testing.assert_equal(total, vectors_python.hsum(a))
            np.testing.assert_equal(largest, vectors_python.hmax(a))


def test_constants() -> None:
    store, zero, splat, splat_at, to_f32 = (
        simd.f32_store, simd.f32_zero, simd.splat, simd.splat_at, simd.to_f32,
    )  # fmt: skip

    @njit
    def run(a, x, n, i, out):
        store(out, 0, zero())
        store(out, 16, splat(x))
        store(out, 32, splat_at(a, i))
        store(out, 48, to_f32(splat(n)))

    a, out = np.arange(16, dtype=np.float32), np.full(64, np.nan, np.float32)
    for i in range(16):
        run(a, np.float32(2.5), np.int32(-7), i, out)
        np.testing.assert_array_equal(out, np.repeat(_f32([0, 2.5, i, -7]), 16))


def test_a_number_with_a_vector_stands_for_sixteen() -> None:
    fma, max_or_second, load, store = simd.fma, simd.max_or_second, simd.f32_load, simd.f32_store

    @njit
    def run(a, x, out):
        v = load(a, 0)
        store(out, 0, v + x)
        store(out, 16, x - v)
        store(out, 32, fma(x, v, x))
        store(out, 48, max_or_second(x, v))

    out, x = np.empty(64, np.float32), np.float32(1.5)
    with np.errstate(all="ignore"):
        for a in _vectors(3):
            run(a, x, out)
            expected = [a + x, x - a, (np.float64(x) * a + x).astype(np.float32), np.where(x > a, x, a)]
            np.testing.assert_array_equal(out, np.concatenate(expected))


@pytest.mark.parametrize("name", ["fmax", "max_or_nan", "max_or_second", "at_most"])
def test_two_numbers(name: str) -> None:
    function = getattr(simd, name)

    @njit
    def run(x, y, out):
        for i in range(x.size):
            for j in range(y.size):
                out[i, j] = function(x[i], y[j])

    out = np.empty((LANES, LANES), np.float32)
    run(SPECIAL, SPECIAL, out)
    expected = [[getattr(vectors_python, name)(x, y) for y in SPECIAL] for x in SPECIAL]
    np.testing.assert_array_equal(out, np.array(expected, np.float32))


def test_integer_vectors() -> None:
    rounded, to_f32 = simd.round_to_i32, simd.to_f32
    f32_load, f32_store, power = simd.f32_load, simd.f32_store, simd.power_of_two

    @njit
    def arithmetic(a, b, out):
        x, y = rounded(f32_load(a, 0)), rounded(f32_load(b, 0))
        f32_store(out, 0, to_f32(x + y))
        f32_store(out, 16, to_f32(x - y))
        f32_store(out, 32, to_f32(x * y))

    @njit
    def convert(x, out):
        f32_store(out, 0, to_f32(rounded(f32_load(x, 0))))

    @njit
    def powers(n, out):
        f32_store(out, 0, power(f32_load(n, 0)))

    rng = np.random.default_rng(0)
    a, b = (rng.integers(-(2**15), 2**15, 16).astype(np.int32) for _ in range(2))
    out, floats = np.empty(48, np.float32), np.empty(16, np.float32)
    arithmetic(a.astype(np.float32), b.astype(np.float32), out)
    np.testing.assert_array_equal(out, np.concatenate((a + b, a - b, a * b)).astype(np.float32))
    halves = _f32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.49999997, -0.49999997, 8388607.5,
                         0, 1, -1, 3.5, 4.5, 99.9, 9])
    convert(halves, floats)
    np.testing.assert_array_equal(floats, np.rint(halves))
    exponents = np.array([-126, -100, -2, -1, 0, 1, 2, 3, 10, 23, 24, 31, 64, 100, 127, 128], np.int32)
    shifted = np.float32(1.5 * 2**23) + exponents.astype(np.float32)
    powers(shifted, floats)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(floats, np.ldexp(np.float32(1), exponents))
    np.testing.assert_array_equal(vectors_python.power_of_two(shifted), floats)


@pytest.mark.parametrize("name", ["at_most", "zero_below"])
def test_bounds(name: str) -> None:
    f32_load, f32_store, bound, with_y = simd.f32_load, simd.f32_store, getattr(simd, name), name == "zero_below"

    if with_y:

        @njit
        def run(x, limit, y, out):
            f32_store(out, 0, bound(f32_load(x, 0), limit, f32_load(y, 0)))
    else:

        @njit
        def run(x, limit, y, out):
            f32_store(out, 0, bound(f32_load(x, 0), limit))

    out, y = np.empty(LANES, np.float32), np.arange(100, 116, dtype=np.float32)
    for limit in _f32([-1, 0, 1e10]):
        run(SPECIAL, limit, y, out)
        arguments = (SPECIAL, limit, y) if with_y else (SPECIAL, limit)
        np.testing.assert_array_equal(out, getattr(vectors_python, name)(*arguments))


def test_loads_and_stores_at_any_index() -> None:
    load, store = simd.f32_load, simd.f32_store

    @njit
    def run(a, i, out, j):
        store(out, j, load(a, i))

    a = np.arange(40, dtype=np.float32).reshape(4, 10)  # the index is flat, whatever the shape
    for i in range(25):
        out = np.full(48, -1, np.float32)
        run(a, i, out, i + 3)
        expected = np.full(48, -1, np.float32)
        expected[i + 3 : i + 19] = np.arange(i, i + 16)
        np.testing.assert_array_equal(out, expected)


@njit
def _ragged(a, i, n, loaded, stored, masked):
    f32_store(loaded, 0, f32_load_first(a, i, n))
    f32_store_first(stored, i, f32_load(a, i), n)
    f32_store(masked, 0, lanes_between(f32_load(a, i), n - 7, n, np.float32(-3)))


@pytest.mark.parametrize("count", range(-20, 36))
def test_ragged_ends(count: int) -> None:
    """Only the first ``count`` lanes are read or written, for any count."""
    a = np.arange(1, 41, dtype=np.float32)
    loaded, masked = np.empty(16, np.float32), np.empty(16, np.float32)
    inside = min(max(count, 0), 16)
    for i in (0, 5, 24):
        stored = np.full(40, -1, np.float32)
        _ragged(a, i, count, loaded, stored, masked)
        np.testing.assert_array_equal(loaded, np.concatenate((a[i : i + inside], np.zeros(16 - inside))))
        expected = np.full(40, -1, np.float32)
        expected[i : i + inside] = a[i : i + inside]
        np.testing.assert_array_equal(stored, expected)
        lanes = np.arange(16)
        np.testing.assert_array_equal(masked, np.where((lanes >= count - 7) & (lanes < count), a[i : i + 16], -3))


def test_load_past_the_end_reads_nothing() -> None:
    """A ragged load may start where the array ends."""
    load, store = simd.f32_load_first, simd.f32_store

    @njit
    def run(a, n, out):
        store(out, 0, load(a, a.size, n))

    out = np.empty(16, np.float32)
    run(np.ones(5, np.float32), 0, out)
    assert (out == 0).all()


def test_every_half_float_is_widened_and_rounded_exactly() -> None:
    load, store, widen, narrow = simd.load, simd.f32_store, simd.f16_to_f32, simd.f32_to_f16
    store_element = simd.store_element

    @njit
    def widen_all(bits, out):
        for i in range(0, bits.size, 16):
            store(out, i, load(bits, i))

    @njit
    def one_by_one(bits, values, back, stored, copied):
        for i in range(bits.size):
            values[i] = widen(bits[i])
            back[i] = narrow(values[i])
            store_element(stored, i, values[i], values[i])
            store_element(copied, i, values[i], values[i])

    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = bits.view(np.float16).astype(np.float32)
    out = np.empty(1 << 16, np.float32)
    widen_all(bits, out)
    np.testing.assert_array_equal(out, expected)
    widen_all(bits.view(np.int16), out)  # bfloat16
    np.testing.assert_array_equal(out, (bits.astype(np.uint32) << 16).view(np.float32))
    widen_all(expected, out)
    np.testing.assert_array_equal(out, expected)

    values, copied = np.empty((2, 1 << 16), np.float32)
    back, stored = np.empty((2, 1 << 16), np.uint16)
    one_by_one(bits, values, back, stored, copied)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(copied, expected)
    for halves in (back, stored):
        np.testing.assert_array_equal(halves.view(np.float16), bits.view(np.float16))


def test_rounding_to_half_floats_is_to_nearest_even() -> None:
    narrow = simd.f32_to_f16

    @njit
    def run(values, out):
        for i in range(values.size):
            out[i] = narrow(values[i])

    rng = np.random.default_rng(0)
    values = np.ldexp(rng.uniform(-2, 2, 20000), rng.integers(-30, 20, 20000)).astype(np.float32)
    ties = (np.arange(1, 2000, dtype=np.uint16).view(np.float16).astype(np.float64) * (1 + 2.0**-11)).astype(np.float32)
    values = np.concatenate((values, ties, SPECIAL))
    out = np.empty(values.size, np.uint16)
    run(values, out)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(out.view(np.float16), values.astype(np.float16))


def test_the_same_with_older_instructions() -> None:
    """What the host does with AVX-512, say, AVX2 does otherwise: no masked stores, registers of half the width."""
    cpu = "haswell" if platform.machine() in ("x86_64", "AMD64") else "generic"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__, __file__.replace("simd", "math"), "-k", "not older"],
        env={**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


# --- several vectors at once -------------------------------------------------------------------------------------


@njit
def _sums_of_rows(w, x, start, step, out):
    kept = simd.stack_f32(80)
    sums = simd.f32_zeros(5)
    for k in range(w.size // LANES):
        sums = simd.fma_rows(f32_load(w, k * LANES), x, start + k, step, sums)
    simd.store_rows(kept, 0, LANES, sums)
    for i in range(80):
        out[i] = kept[i]


def test_rows_of_sums() -> None:
    rng = np.random.default_rng(0)
    w, x, out = rng.standard_normal((7, LANES), np.float32), rng.standard_normal((5, 9), np.float32), np.empty(80)
    _sums_of_rows(w.reshape(-1), x.reshape(-1), 2, 9, out)
    np.testing.assert_allclose(out.reshape(5, LANES), x[:, 2:].astype(np.float64) @ w, rtol=0, atol=1e-5)
    plain = np.empty(80)
    sums = vectors_python.f32_zeros(5)
    for k in range(7):
        sums = vectors_python.fma_rows(w[k], x, 2 + k, 9, sums)
    vectors_python.store_rows(plain, 0, LANES, sums)
    np.testing.assert_allclose(plain, out, rtol=0, atol=1e-5)


@njit
def _transposed(x, out):
    rows = simd.load_rows(x, 0, 20, 16)
    for _ in range(4):
        rows = simd.zip_rows(rows)
    simd.store_rows(out, 0, 16, rows)


def test_rows_merged_four_times_are_transposed() -> None:
    x, out = np.arange(320, dtype=np.float32).reshape(16, 20), np.empty((16, 16), np.float32)
    _transposed(x, out)
    np.testing.assert_array_equal(out, x[:, :16].T)
    rows = vectors_python.load_rows(x, 0, 20, 16)
    for _ in range(4):
        rows = vectors_python.zip_rows(rows)
    np.testing.assert_array_equal(np.stack(rows), x[:, :16].T)


@pytest.mark.parametrize(
    ("triple", "cpu", "expected"),
    [
        ("arm64-apple-darwin24", "apple-m1", True), ("arm64-apple-darwin24", "apple-m4", True),
        ("arm64-apple-darwin24", "generic", False), ("aarch64-unknown-linux-gnu", "generic", False),
        ("aarch64-unknown-linux-gnu", "cortex-a72", False),  # Raspberry Pi 4
        ("aarch64-unknown-linux-gnu", "cortex-a76", True),  # Raspberry Pi 5
        ("aarch64-unknown-linux-gnu", "neoverse-n1", True),  # Ampere, Graviton 2
        ("aarch64-unknown-linux-gnu", "neoverse-v1", True),  # Graviton 3
    ],
)  # fmt: skip
def test_arm_processors_with_an_integer_dot_product_are_known(triple: str, cpu: str, expected: bool) -> None:
    from ruvllm.kernels.simd.dot_llvm import has_sdot

    assert has_sdot(triple, cpu, "") is expected
    assert cpu != "generic" or has_sdot(triple, cpu, "+dotprod")
