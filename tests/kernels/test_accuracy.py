"""Long sums: the error against float64 is at most twice that of NumPy in float32, which adds in pairs or blocks."""

from collections.abc import Callable

import numpy as np
import pytest

from ruvllm.kernels import (
    gemm,
    gemm_nt,
    gemv,
    layer_norm,
    lora_accumulate_grad,
    lora_forward,
    reference,
    rms_norm,
    softmax,
)

Error = tuple[float, float]  # ours, NumPy's


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def _errors(ours: np.ndarray, numpys: np.ndarray, exact: np.ndarray) -> Error:
    size = np.sum(exact**2)
    return float(np.sum((ours - exact) ** 2) / size), float(np.sum((numpys - exact) ** 2) / size)


def assert_as_accurate(errors: Callable[[np.random.Generator], Error]) -> None:
    """Over several inputs, for one sum's error is a matter of luck."""
    ours, numpys = np.sum([errors(np.random.default_rng(seed)) for seed in range(6)], axis=0)
    assert ours <= 2 * numpys, f"{ours / numpys:.2f} times NumPy's"


@pytest.mark.parametrize("n", [768, 4096, 8192])
def test_softmax(n: int) -> None:
    def errors(rng: np.random.Generator) -> Error:
        x = 4 * normal(rng, 64, n)
        e = np.exp(x - x.max(-1, keepdims=True))
        return _errors(softmax(x), e / e.sum(-1, keepdims=True), reference.softmax(x))

    assert_as_accurate(errors)


@pytest.mark.parametrize("n", [768, 4096])
def test_norms(n: int) -> None:
    small = np.float32(1e-5)

    def rms_errors(rng: np.random.Generator) -> Error:
        x, weight = normal(rng, 64, n), normal(rng, n)
        numpys = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + small) * weight
        return _errors(rms_norm(x, weight), numpys, reference.rms_norm(x, weight, 1e-5))

    def layer_errors(rng: np.random.Generator) -> Error:
        x, weight, bias = normal(rng, 64, n), normal(rng, n), normal(rng, n)
        d = x - x.mean(-1, keepdims=True)
        numpys = d / np.sqrt(np.mean(d * d, -1, keepdims=True) + small) * weight + bias
        return _errors(layer_norm(x, weight, bias), numpys, reference.layer_norm(x, weight, bias, 1e-5))

    assert_as_accurate(rms_errors)
    assert_as_accurate(layer_errors)


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("rank", [2, 8, 24, 64])
@pytest.mark.parametrize("dim", [768, 4096])
def test_adapters(rows: int, rank: int, dim: int) -> None:
    two = np.float32(2)

    def forward(rng: np.random.Generator) -> Error:
        x, a, b = normal(rng, rows, dim), normal(rng, dim, rank), normal(rng, rank, 256)
        return _errors(lora_forward(x, a, b, 2.0), (x @ a * two) @ b, reference.lora_forward(x, a, b, 2.0))

    def gradient_of_b(rng: np.random.Generator) -> Error:
        x, a, b, dy = normal(rng, rows, dim), normal(rng, dim, rank), normal(rng, rank, 256), normal(rng, rows, 256)
        zeros = np.zeros_like(a), np.zeros_like(b)
        _, exact = reference.lora_accumulate_grad(x, dy, a, b, 2.0, *zeros)
        _, ours = lora_accumulate_grad(x, dy, a, b, 2.0, *zeros)
        return _errors(ours, (x @ a * two).T @ dy, exact)

    assert_as_accurate(forward)
    assert_as_accurate(gradient_of_b)


@pytest.mark.parametrize("n", [256, 512, 1024])
def test_products(n: int) -> None:
    def square(rng: np.random.Generator) -> Error:
        a, b = normal(rng, 64, n), normal(rng, n, n)
        return _errors(gemm(a, b, backend="numba"), a @ b, a.astype(np.float64) @ b)

    def transposed(rng: np.random.Generator) -> Error:
        a, b = normal(rng, 64, n), normal(rng, n, n)
        return _errors(gemm_nt(a, b, backend="numba"), a @ b.T, a.astype(np.float64) @ b.T)

    def vector(rng: np.random.Generator) -> Error:
        a, x = normal(rng, n, n), normal(rng, n)
        return _errors(gemv(a, x), a @ x, a.astype(np.float64) @ x)

    for errors in (square, transposed, vector):
        assert_as_accurate(errors)
