"""Low-rank adapters: forward, accumulation, and gradients checked by finite differences."""

import numpy as np
import pytest

from ruvllm.kernels import lora_accumulate_grad, lora_forward, lora_forward_add, reference

RANKS = (1, 2, 3, 4, 8, 15, 16, 17, 33, 64, 65, 130)


def _adapter(rank: int, rows: int = 3, e_in: int = 37, e_out: int = 70) -> tuple[np.ndarray, ...]:
    """x, a, b, dy."""
    rng = np.random.default_rng(rank)
    shapes = (rows, e_in), (e_in, rank), (rank, e_out), (rows, e_out)
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


@pytest.mark.parametrize("rank", RANKS)
def test_forward_is_two_products(rank: int) -> None:
    for rows, e_in, e_out in ((1, 1, 1), (1, 31, 64), (2, 64, 65), (5, 33, 129), (7, 100, 17)):
        x, a, b, _ = _adapter(rank, rows, e_in, e_out)
        expected = reference.lora_forward(x, a, b, 0.5)
        scale = np.abs(x) @ np.abs(a) @ np.abs(b)
        np.testing.assert_array_less(np.abs(lora_forward(x, a, b, 0.5) - expected), 1e-6 * scale + 1e-30)


@pytest.mark.parametrize("rank", RANKS)
def test_forward_add_adds_to_what_is_there(rank: int) -> None:
    x, a, b, dy = _adapter(rank)
    out = dy.copy()
    assert lora_forward_add(x, a, b, 2.0, out) is out
    np.testing.assert_allclose(out, dy + reference.lora_forward(x, a, b, 2.0), rtol=1e-4, atol=1e-4)


def test_zero_b_changes_nothing() -> None:
    x, a, b, dy = _adapter(4)
    assert (lora_forward(x, a, 0 * b) == 0).all()
    np.testing.assert_array_equal(lora_forward_add(x, a, 0 * b, 3.0, dy.copy()), dy)


def test_merged_equals_applied() -> None:
    x, a, b, _ = _adapter(8)
    weight = np.random.default_rng(0).standard_normal((37, 70)).astype(np.float32)
    applied = lora_forward_add(x, a, b, 0.25, x @ weight)
    np.testing.assert_allclose(applied, x @ (weight + 0.25 * a @ b), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", RANKS)
def test_gradients(rank: int) -> None:
    for rows, e_in, e_out in ((1, 1, 1), (1, 31, 64), (4, 64, 65), (5, 33, 129)):
        x, a, b, dy = _adapter(rank, rows, e_in, e_out)
        grad_a, grad_b = np.ones_like(a), np.full_like(b, -2)
        expected = reference.lora_accumulate_grad(x, dy, a, b, 0.5, grad_a, grad_b)
        found = lora_accumulate_grad(x, dy, a, b, 0.5, grad_a, grad_b)
        assert found[0] is grad_a
        assert found[1] is grad_b
        for got, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_gradients_are_slopes() -> None:
    """Against finite differences of the loss sum(y * dy), in float64."""
    x, a, b, dy = (array.astype(np.float64) for array in _adapter(3, rows=4, e_in=6, e_out=5))
    grad_a, grad_b = np.zeros((6, 3), np.float32), np.zeros((3, 5), np.float32)
    x32, dy32, a32, b32 = (array.astype(np.float32) for array in (x, dy, a, b))
    lora_accumulate_grad(x32, dy32, a32, b32, 0.7, grad_a, grad_b)

    def loss() -> float:
        return float(np.sum(reference.lora_forward(x, a, b, 0.7) * dy))

    for parameter, gradient in ((a, grad_a), (b, grad_b)):
        for index in np.ndindex(parameter.shape):
            before = parameter[index]
            parameter[index] = before + 1e-6
            above = loss()
            parameter[index] = before - 1e-6
            below = loss()
            parameter[index] = before
            np.testing.assert_allclose(gradient[index], (above - below) / 2e-6, rtol=1e-4, atol=1e-4)


def test_gradients_of_two_batches_add_up() -> None:
    x, a, b, dy = _adapter(2, rows=6)
    together = lora_accumulate_grad(x, dy, a, b, 1.0, 0 * a, 0 * b)
    parts = (0 * a, 0 * b)
    for rows in (slice(0, 2), slice(2, 6)):
        lora_accumulate_grad(x[rows], dy[rows], a, b, 1.0, *parts)
    for one, other in zip(together, parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_leading_dimensions() -> None:
    x, a, b, dy = _adapter(3, rows=6)
    shaped = x.reshape(2, 3, 37)
    np.testing.assert_array_equal(lora_forward(shaped, a, b), lora_forward(x, a, b).reshape(2, 3, 70))
    np.testing.assert_array_equal(lora_forward(x[0], a, b), lora_forward(x, a, b)[0])
    one = lora_accumulate_grad(shaped, dy.reshape(2, 3, 70), a, b, 1.0, 0 * a, 0 * b)
    other = lora_accumulate_grad(x, dy, a, b, 1.0, 0 * a, 0 * b)
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left, right)


def test_no_rows_and_no_columns() -> None:
    _, a, b, _ = _adapter(3)
    assert lora_forward(np.empty((0, 37), np.float32), a, b).shape == (0, 70)
    empty_in = lora_forward(np.empty((2, 0), np.float32), np.empty((0, 3), np.float32), b)
    np.testing.assert_array_equal(empty_in, np.zeros((2, 70)))
    grad_a, grad_b = np.ones_like(a), np.ones_like(b)
    lora_accumulate_grad(np.empty((0, 37), np.float32), np.empty((0, 70), np.float32), a, b, 1.0, grad_a, grad_b)
    assert (grad_a == 1).all()
    assert (grad_b == 1).all()


def test_shapes_that_do_not_fit() -> None:
    x, a, b, dy = _adapter(3)
    with pytest.raises(ValueError, match=r"a: expected shape \(37, R\) with R >= 1, found \(36, 3\)"):
        lora_forward(x, a[1:], b)
    with pytest.raises(ValueError, match=r"a: expected shape \(37, R\) with R >= 1, found \(37, 0\)"):
        lora_forward(x, a[:, :0], b[:0])
    with pytest.raises(ValueError, match=r"b: expected shape \(3, E_out\), found \(2, 70\)"):
        lora_forward(x, a, b[:2])
    with pytest.raises(ValueError, match=r"dy: expected shape \(3, 70\), found \(2, 70\)"):
        lora_accumulate_grad(x, dy[:2], a, b, 1.0, a.copy(), b.copy())
    with pytest.raises(ValueError, match=r"grad_a: expected shape \(37, 3\)"):
        lora_accumulate_grad(x, dy, a, b, 1.0, b.copy(), b.copy())
    with pytest.raises(ValueError, match=r"grad_b: expected shape \(3, 70\)"):
        lora_accumulate_grad(x, dy, a, b, 1.0, a.copy(), a.copy())
    with pytest.raises(TypeError, match="out: expected a float32 NumPy array"):
        lora_forward_add(x, a, b, 1.0, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="grad_a: expected a float32 NumPy array"):
        lora_accumulate_grad(x, dy, a, b, 1.0, None, b)  # type: ignore[arg-type]
