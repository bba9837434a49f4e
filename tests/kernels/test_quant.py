"""Integer matmul: exact integers on every instruction set, small errors after scaling, the same for any threads."""

import platform

import llvmlite.binding as llvm
import numpy as np
import pytest

from ruvllm.kernels.quant.activations import quantize_activations_parallel
from ruvllm.kernels.quant.layout import INT4, INT5, INT8, OUTLIERS, Rounded
from ruvllm.kernels.quant.matmul import quant_matmul, quant_matmul_parallel
from tests.kernels import quant_cases as cases
from tests.processes import python

EVERY_KIND = pytest.mark.parametrize("kind, mins", cases.KINDS)


def nmse(y: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sum((y - expected) ** 2) / np.sum(expected**2))


def test_integers_are_exact() -> None:
    cases.check_integers()


@EVERY_KIND
@pytest.mark.parametrize("n, k", cases.SHAPES)
def test_close_to_float64_of_the_same_operands(kind: int, mins: bool, n: int, k: int) -> None:
    rng = np.random.default_rng(n)
    w = cases.random_weights(rng, kind, mins, n, k)
    for tokens in cases.TOKENS:
        x = cases.activations(rng.standard_normal((tokens, k), np.float32))
        y = cases.multiply(w, x)
        assert nmse(y, x.matrix() @ w.matrix().T) <= 1e-11
        for t in {*range(min(tokens, 13)), tokens - 1}:  # alone, or in a tile of any size: the same bits
            alone = cases.of_rows(cases.Rows(*(a[t : t + 1] for a in x.rows())))
            np.testing.assert_array_equal(cases.multiply(w, alone)[0], y[t])


@EVERY_KIND
def test_close_to_the_unquantised_product(kind: int, mins: bool) -> None:
    """8-bit activations alone cost about 4e-5, 8-bit weights as much again, 4-bit weights what they lose themselves."""
    rng = np.random.default_rng(1)
    for tokens, n, k in ((1, 64, 577), (13, 129, 1024)):
        numbers, w = cases.rounded_weights(rng, kind, mins, n, k)
        x = rng.standard_normal((tokens, k), np.float32)
        y = cases.multiply(w, cases.activations(x))
        exact = numbers.astype(np.float64) if kind == INT8 else w.matrix()[:, :k]
        assert nmse(y, x.astype(np.float64) @ exact.T) <= 5e-4
        at_most = {INT4: 2e-2, INT5: 5e-3, INT8: 5e-4}[kind]
        assert nmse(y, x.astype(np.float64) @ numbers.T.astype(np.float64)) <= at_most


@EVERY_KIND
def test_same_for_one_and_two_threads(kind: int, mins: bool) -> None:
    rng = np.random.default_rng(2)
    for tokens, n, k in ((1, 15, 40), (7, 100, 95), (13, 257, 64)):
        w = cases.random_weights(rng, kind, mins, n, k)
        numbers = rng.standard_normal((tokens, k), np.float32)
        x = cases.activations(numbers)
        expected = cases.multiply(w, x)
        for threads in (1, 2, 3):
            out = np.full_like(expected, np.nan)
            quant_matmul_parallel(w.panels, Rounded(*x), out, threads)
            np.testing.assert_array_equal(out, expected)
            parallel = cases.Activations(*(np.empty_like(array) for array in x))
            quantize_activations_parallel(threads, tokens, numbers, Rounded(*parallel), 0)
            for array, same in zip(parallel.rows(), x.rows(), strict=True):
                np.testing.assert_array_equal(array, same)


@EVERY_KIND
def test_only_its_own_outputs_are_written(kind: int, mins: bool) -> None:
    rng = np.random.default_rng(3)
    for tokens, n in ((1, 1), (7, 17), (13, 31)):
        w = cases.random_weights(rng, kind, mins, n, 64)
        x = cases.activations(rng.standard_normal((tokens, 64), np.float32))
        buffer = np.full(tokens * n + 64, np.float32(-5))
        out = buffer[32 : 32 + tokens * n].reshape(tokens, n)
        quant_matmul_parallel(w.panels, Rounded(*x), out, 2)
        np.testing.assert_array_equal(out, cases.multiply(w, x))
        assert (buffer[:32] == -5).all() and (buffer[-32:] == -5).all()


@EVERY_KIND
def test_an_empty_range_of_panels_writes_nothing(kind: int, mins: bool) -> None:
    """Also after the last, ragged, panel."""
    rng = np.random.default_rng(8)
    w = cases.random_weights(rng, kind, mins, 100, 64)
    x = cases.activations(rng.standard_normal((1, 64), np.float32))
    out = np.full((1, 100), np.float32(-5))
    for p in range(8):
        quant_matmul(w.panels, Rounded(*x), out, p, p)
    assert (out == -5).all()


@EVERY_KIND
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_in_activations_is_not_lost(kind: int, mins: bool, bad: float) -> None:
    rng = np.random.default_rng(4)
    w = cases.random_weights(rng, kind, mins, 20, 70)
    x = rng.standard_normal((8, 70), np.float32)
    expected = cases.multiply(w, cases.activations(x))
    for column in (0, 31, 45, 69):
        broken = x.copy()
        broken[3, column] = bad
        y = cases.multiply(w, cases.activations(broken))
        assert np.isnan(y[3]).all()
        np.testing.assert_array_equal(np.delete(y, 3, 0), np.delete(expected, 3, 0))


def greedy_outliers(x: np.ndarray) -> tuple[list[tuple[int, np.float32]], np.ndarray]:
    """Four times the largest |x| of the row, and what is left of it."""
    left, kept = x.copy(), []
    for _ in range(OUTLIERS):
        k = int(np.abs(left).argmax())
        kept.append((k if left[k] else 0, left[k]))
        left[k] = 0
    return sorted(kept, key=lambda pair: pair[0]), left


def test_activations_are_rounded_to_the_nearest() -> None:
    rng = np.random.default_rng(7)
    for k in (*range(1, 66), 95, 96, 97, 576):
        tokens = 3 + k % 2 * 27
        x = (rng.standard_normal((tokens, k)) * 10.0 ** rng.integers(-30, 30, (tokens, 1))).astype(np.float32)
        found = cases.activations(x).rows()
        rows = [greedy_outliers(row) for row in x]
        left = np.array([row for _, row in rows])
        filled = np.concatenate((left, np.zeros((tokens, -k % 32), np.float32)), 1).reshape(tokens, -1, 32)
        np.testing.assert_array_equal(found.outliers, np.array([kept for kept, _ in rows], np.float32))
        np.testing.assert_array_equal(found.xs, np.abs(filled).max(2) / np.float32(127))
        exact = filled.astype(np.float64) / np.maximum(found.xs, np.float32(1e-45)).astype(np.float64)[:, :, None]
        codes = found.xq.reshape(filled.shape)
        assert np.abs(codes - exact).max() <= 0.5 + 1e-4
        assert (np.abs(codes).max(2)[found.xs > 0] == 127).all()
        np.testing.assert_array_equal(found.offsets, found.sums[:, :, None] * np.array([-8, -16, -128, 0]))
        totals = (found.xs * found.sums).astype(np.float64)
        for row, (kept, _) in zip(totals, rows, strict=True):
            for column, value in kept:
                row[column // 32] += value
        np.testing.assert_allclose(found.totals, totals, rtol=1e-5, atol=1e-5 * np.abs(x).max(1).min())


def test_rows_of_more_columns_than_are_searched_for_outliers() -> None:
    rng = np.random.default_rng(12)
    x = rng.standard_normal((2, 65536 + 77), np.float32)
    x[0, 65535], x[0, 65536], x[1, 65600], x[1, 7] = 30, -40, 50, 60
    found = cases.activations(x)
    assert found.outliers[0, 3].tolist() == [65535, 30] and found.outliers[1, 0].tolist() == [7, 60]
    steps = np.repeat(found.rows().xs, 32, 1)[:, : x.shape[1]]
    assert (np.abs(found.matrix()[:, : x.shape[1]] - x) <= 0.501 * steps).all()


@EVERY_KIND
def test_outliers_are_not_rounded(kind: int, mins: bool) -> None:
    """Numbers of one size are exact in 8 bits: all that is left of an error is that of the outliers."""
    rng = np.random.default_rng(11)
    for tokens, n, k in ((1, 65, 96), (1, 17, 33), (5, 31, 95), (30, 16, 576)):
        w = cases.unit_weights(kind, rng.integers(0, cases.CODES[kind], (n, -(-k // 32) * 32), np.uint8), mins)
        x = rng.choice(np.array([-127, 0, 127], np.float32), (tokens, k))
        for row in x:
            large = rng.uniform(1e3, 1e4, OUTLIERS) * rng.choice((-1, 1), OUTLIERS)
            row[rng.choice(k, OUTLIERS, replace=False)] = large
        filled = np.concatenate((x, np.zeros((tokens, -k % 32), np.float32)), 1).astype(np.float64)
        expected = filled @ w.matrix().T
        found = cases.multiply(w, cases.activations(x))
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6 * np.abs(filled).sum(1).max() * 260)


def test_activations_at_the_ends_of_float32() -> None:
    tiny, huge = np.float32(1e-45), np.finfo(np.float32).max
    x = np.zeros((5, 64), np.float32)
    x[1, 3], x[2, 5], x[3, 0:32:4], x[4, 0] = tiny, np.float32(2.0**-119), huge, -huge
    found = cases.activations(x).rows()
    assert np.isfinite(found.xs).all() and not np.isnan(found.totals).any()
    np.testing.assert_array_equal(found.sums[:, 0], [0, 0, 0, 4 * 127, 0])  # all but four of eight numbers are kept
    np.testing.assert_array_equal(found.xq.sum(1), found.sums[:, 0])
    kept = found.outliers[[0, 1, 2, 4], :, 1].sum(1)
    np.testing.assert_array_equal(kept, [0, 0, np.float32(2.0**-119), -huge])


def run_cases(*tokens: str, **environment: str) -> list[str]:
    """quant_cases.py as a program, in a process where the CPU is forced."""
    variables = {"NUMBA_CPU_NAME": None, "NUMBA_CPU_FEATURES": None, **environment}
    return python("-m", "tests.kernels.quant_cases", *tokens, **variables).split()


def other_cpus() -> dict[str, dict[str, str]]:
    """Instruction sets that this machine can run: name -> environment."""
    cpus = {"generic": {"NUMBA_CPU_NAME": "generic"}}
    host = llvm.get_host_cpu_features()
    if platform.machine() in ("x86_64", "AMD64"):
        avx2 = "+avx2,+fma,+f16c"
        if host.get("avx2") and host.get("fma") and host.get("f16c"):
            cpus["avx2"] = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": avx2}
        if host.get("avxvnni"):
            cpus["vnni256"] = {"NUMBA_CPU_NAME": "alderlake", "NUMBA_CPU_FEATURES": f"{avx2},+avxvnni"}
    return cpus


def test_integers_are_the_same_on_other_cpus_and_without_a_compiler() -> None:
    expected = run_cases("1", "6", "13")
    for kind, environment in other_cpus().items():
        found = run_cases("1", "6", "13", **environment)
        assert found[0] == kind
        assert found[1:] == expected[1:], kind
    found = run_cases("1", "7", NUMBA_DISABLE_JIT="1")
    assert found[0] == "python"
    assert found[1:] == run_cases("1", "7")[1:]


INSPECT = """
from numba import int64, types
from ruvllm.kernels.jit.decorators import kernel
from ruvllm.kernels.quant.layout import INT8, Rounded
from ruvllm.kernels.quant.matmul import quant_matmul_part
from ruvllm.kernels.simd.vectors import stack_i64
from ruvllm.kernels.threads.team import Share, take_chunk

product = quant_matmul_part((INT8,))

@kernel(strict=True)
def one_kind(blocks, x, out, lo, hi):
    counts = stack_i64(1)
    counts[0] = 0
    share = Share(lo, hi, counts, 0, True, 0)
    product(INT8, False, blocks, x, out, share, take_chunk(share))

def array(element, axes):
    return types.Array(element, axes, "C")
x = array(types.float32, 2)
xq, xs, offsets = array(types.int8, 4), array(types.float32, 3), array(types.int32, 4)
rounded = types.NamedTuple((xq, xs, offsets, xs, xs), Rounded)
one_kind.compile((array(types.uint8, 3), rounded, x, int64, int64))
print(*one_kind.inspect_asm().values())
"""


def instruction_sets() -> dict[str, tuple[str, str, str]]:
    """CPU name -> features, and the integer dot product and register that its code must have.

    Haswell and Apple M4 are among those that ``tests/lab/test_codegen.py`` reads, for every kind of weights.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"apple-m1": ("+dotprod,+neon,+fullfp16", "sdot", "v")}
    avx2 = "+avx2,+fma,+f16c"
    vnni512 = f"{avx2},+avx512f,+avx512vl,+avx512bw,+avx512dq,+avx512vnni"
    return {
        "alderlake": (f"{avx2},+avxvnni", "vpdpbusd", "%ymm"),
        "znver4": (vnni512, "vpdpbusd", "%zmm"),
    }


def test_the_instructions_are_there() -> None:
    """Compiled for each instruction set, not run: the integer dot product is one instruction on whole registers.

    Of one kind of weights: all have their dot products from one function, and each takes seconds to compile.
    """
    for name, (features, instruction, register) in instruction_sets().items():
        asm = python("-c", INSPECT, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=features)
        lines = [line for line in asm.splitlines() if instruction in line]
        assert len(lines) >= 16 and all(register in line for line in lines), name
