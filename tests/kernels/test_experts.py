"""Mixture of experts: routing, the weighted sum of experts' rows and the gate of a shared expert, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from ruvllm.kernels.experts import MAX_EXPERTS, PADDED, combine_rows, require_routing, route, sigmoid_scale_rows
from ruvllm.kernels.quant.layout import BLOCK_TOKENS

SIZES = [
    (1, 1, 1), (1, 8, 2), (2, 3, 3), (7, 5, 1), (40, 4, 4), (40, 60, 7), (3, MAX_EXPERTS, 8),
    (2, MAX_EXPERTS, MAX_EXPERTS),
]  # fmt: skip


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(("T", "X", "k"), SIZES)
def test_route(T: int, X: int, k: int, normalised: bool) -> None:
    scores = np.random.default_rng(X).integers(-9, 9, (T, X)).astype(np.float32) / 2  # many are equal
    found = route(scores, k, normalised)
    experts = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    rows = sorted((int(experts[t, j]), t, j) for t in range(T) for j in range(k))  # by expert, then by token
    assert found.tokens.tolist() == [t for _, t, _ in rows]
    for row, (_, t, j) in enumerate(rows):
        assert found.slots[t, j] == row
    exact = scores.astype(np.float64)
    shares = np.take_along_axis(softmax(exact), experts, 1)
    np.testing.assert_allclose(found.weights, shares / (shares.sum(1, keepdims=True) if normalised else 1), rtol=1e-6)
    used, counts = np.unique(experts, return_counts=True)
    starts = np.cumsum(counts) - counts
    assert found.parts == [(int(x), slice(int(a), int(a + n))) for x, a, n in zip(used, starts, counts, strict=True)]
    place = 0  # of rows in 8 bits: an expert's fill up its blocks
    for run, n in zip(found.runs, counts, strict=True):
        assert run[3] == place
        place += n if n <= BLOCK_TOKENS else -(-n // BLOCK_TOKENS) * BLOCK_TOKENS
    assert place <= PADDED * T * k


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_not_lost(bad: float) -> None:
    """Whatever the scores, experts exist and a token has each once; other tokens do not notice."""
    scores = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    expected = route(scores, 2, True)
    for column in range(6):
        broken = scores.copy()
        broken[1] = bad
        broken[1, column] = 1
        found = route(broken, 2, True)
        experts = np.repeat(found.runs[:, 0], found.runs[:, 2])[found.slots]
        assert experts.min() >= 0 and experts.max() < 6 and (experts[:, 0] != experts[:, 1]).all()
        assert np.isfinite(found.weights[1]).all() == (bad == -np.inf)
        np.testing.assert_array_equal(found.weights[[0, 2]], expected.weights[[0, 2]])


def test_what_cannot_be_routed() -> None:
    for k, experts in ((0, 4), (5, 4), (1, MAX_EXPERTS + 1)):
        with pytest.raises(ValueError, match=rf"route: expected 1 <= k <= experts <= {MAX_EXPERTS}, found k = {k}"):
            require_routing(k, experts)


@pytest.mark.parametrize(("T", "X", "k"), SIZES[:-2])
def test_combine(T: int, X: int, k: int) -> None:
    rng = np.random.default_rng(1)
    routing = route(rng.standard_normal((T, X)).astype(np.float32), k, True)
    for columns in (1, 17, 64):
        y = rng.standard_normal((T * k, columns)).astype(np.float32)
        out = np.full((T, columns), np.nan, np.float32)
        for t in range(T):
            combine_rows(y, routing.slots, routing.weights, out, t, t + 1)
            assert np.isnan(out[t + 1 :]).all()
        exact = np.einsum("tj,tje->te", routing.weights.astype(np.float64), y.astype(np.float64)[routing.slots])
        np.testing.assert_allclose(out, exact, atol=1e-6)


def test_sigmoid_scale() -> None:
    rng = np.random.default_rng(2)
    x, gate = rng.standard_normal((5, 37)).astype(np.float32), np.array([[-200], [-3], [0], [4], [800]], np.float32)
    out = np.full_like(x, np.nan)
    sigmoid_scale_rows(x, gate, out, 1, 5)
    assert np.isnan(out[0]).all()
    sigmoid_scale_rows(x, gate, out, 0, 1)
    exact = x.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64)))
    np.testing.assert_allclose(out, exact, rtol=1e-6, atol=1e-30)
