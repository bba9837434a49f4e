"""Samplers against a plain float64 one that sorts everything, and the distribution of what is drawn."""

import numpy as np
import pytest

from ruvllm.kernels import apply_repetition_penalty, argmax, log_softmax, reference, sample, top_k, top_logprobs


def _logits(n: int, seed: int = 0, spread: float = 2.0) -> np.ndarray:
    return (spread * np.random.default_rng(seed).standard_normal(n)).astype(np.float32)


def _kept(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Ids that pass the filters, likeliest first."""
    order = np.argsort(-logits, kind="stable")
    wide = logits.astype(np.float64)
    if top_k:
        order = order[:top_k]
    if top_p < 1:
        reached = np.cumsum(reference.softmax(wide[order])) >= top_p
        order = order[: int(np.argmax(reached)) + 1] if reached.any() else order
    if min_p:
        order = order[wide[order] >= wide[order[0]] + np.log(min_p)]
    return order


def _sample(
    logits: np.ndarray, u: float, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[int, float]:
    """The id at which the running sum passes u, and how near that was to the next id."""
    if temperature == 0:
        return int(np.argmax(logits)), 1.0
    order = _kept(logits, top_k, top_p, min_p)
    if not 0 < top_k < len(logits) and top_p == 1 and not min_p:
        order = np.arange(len(logits))  # nothing to sort for
    sums = np.cumsum(reference.softmax(logits[order].astype(np.float64) / temperature))
    at = min(int(np.searchsorted(sums, u, side="right")), len(order) - 1)
    return int(order[at]), float(np.min(np.abs(sums[max(at - 1, 0) : at + 1] - u)))


@pytest.mark.parametrize("top_k", [0, 1, 5, 40, 1000, 100000])
@pytest.mark.parametrize("top_p", [1.0, 0.999, 0.9, 0.3])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.5, 1.0])
def test_sample_equals_a_plain_sampler(top_k: int, top_p: float, min_p: float) -> None:
    rng = np.random.default_rng(top_k)
    near = 0
    for n in (1, 2, 15, 16, 17, 255, 256, 257, 1000, 3001):
        for spread in (0.1, 2.0, 6.0):
            logits = _logits(n, n, spread)
            u, temperature = float(rng.random()), float(rng.choice([0.0, 0.3, 1.0, 2.5]))
            expected, distance = _sample(logits, u, temperature, top_k, top_p, min_p)
            if distance < 1e-6:  # float32 exponentials may fall on either side
                near += 1
                continue
            assert sample(logits, u, temperature, top_k, top_p, min_p) == expected, (n, spread, u, temperature)
    assert near <= 3


def test_drawn_as_often_as_likely() -> None:
    logits, temperature = _logits(50), 0.8
    p = reference.softmax(logits.astype(np.float64) / temperature)
    us = (np.arange(20000) + 0.5) / 20000  # evenly spread: each id gets its share to within one step
    counts = np.bincount([sample(logits, u, temperature) for u in us], minlength=50)
    np.testing.assert_allclose(counts / 20000, p, atol=1.5 / 20000)


@pytest.mark.parametrize(
    "filters", [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.8, "min_p": 0.1}]
)
def test_every_kept_token_is_drawn_and_no_other(filters: dict) -> None:
    logits = _logits(60)
    kept = _kept(logits, filters.get("top_k", 0), filters.get("top_p", 1.0), filters.get("min_p", 0.0))
    p = reference.softmax(logits[kept].astype(np.float64))
    us = (np.arange(5000) + 0.5) / 5000
    drawn = np.bincount([sample(logits, u, **filters) for u in us], minlength=60)
    assert set(np.flatnonzero(drawn)) == set(kept)
    np.testing.assert_allclose(drawn[kept] / 5000, p, atol=1.5 / 5000)


def test_nucleus_that_does_not_fit_the_first_candidates() -> None:
    """A flat distribution over thousands of tokens: top-p must look at more of them, more than once."""
    logits = _logits(30000, spread=0.01)
    for u in (0.0, 0.1, 0.5, 0.99, 1 - 1e-9):
        expected, distance = _sample(logits, u, top_p=0.9)
        got = sample(logits, u, top_p=0.9)
        rank = np.argsort(np.argsort(-logits, kind="stable"))
        assert abs(int(rank[got]) - int(rank[expected])) <= 1 + 30000 * max(0.0, 1e-6 - distance)


def test_ends_of_u() -> None:
    logits = np.array([-np.inf, 1, -np.inf, 2, -np.inf], np.float32)
    for filters in ({}, {"top_k": 4}, {"top_p": 0.99999}, {"min_p": 1e-6}):
        low, high = ({1, 3}, {1, 3})
        assert sample(logits, 0.0, **filters) in low
        assert sample(logits, np.nextafter(1, 0), **filters) in high
    assert sample(logits, 0.0) == 1  # ids in order where nothing is filtered
    assert sample(logits, np.nextafter(1, 0)) == 3


def test_minus_infinity_is_never_drawn() -> None:
    logits = _logits(100)
    logits[::2] = -np.inf
    for u in np.linspace(0, 0.999999, 500):
        assert sample(logits, u, temperature=5.0) % 2
        assert sample(logits, u, temperature=5.0, top_k=99) % 2


def test_temperatures() -> None:
    logits = np.array([1, 3, 3, 2], np.float32)
    for u in (0.0, 0.5, 0.999):
        assert sample(logits, u, temperature=0.0) == 1  # of equal ones the first
        assert sample(logits, u, temperature=1e-3) in (1, 2)
        assert sample(logits, u, temperature=1e-300) in (1, 2)
        assert sample(logits, u, top_k=1) == 1
    even = [sample(logits, u, temperature=1e30) for u in (0.1, 0.3, 0.6, 0.9)]
    assert even == [0, 1, 2, 3]


def test_logits_are_not_changed_and_the_same_u_draws_the_same() -> None:
    logits = _logits(5000)
    before = logits.copy()
    drawn = {sample(logits, 0.37, 0.9, 50, 0.95, 0.01) for _ in range(10)}
    assert len(drawn) == 1
    np.testing.assert_array_equal(logits, before)


def test_equally_likely_tokens_are_kept_together() -> None:
    """min-p keeps what is as likely as the likeliest; top-k and top-p stop in the middle of equal ones, first come."""
    logits = np.array([1, 3, 3, 3], np.float32)
    us = np.linspace(0, 0.999, 50)
    assert {sample(logits, u, min_p=1.0) for u in us} == {1, 2, 3}
    assert {sample(logits, u, top_k=2) for u in us} == {1, 2}
    assert {sample(logits, u, top_p=0.5) for u in us} == {1, 2}


def test_filters_come_before_the_temperature() -> None:
    """p = 0.6 keeps one token of 0.67, 0.24, 0.09; at temperature 10 (0.37, 0.33, 0.3) it would keep two."""
    logits = np.array([2, 1, 0], np.float32)
    assert {sample(logits, u, temperature=10.0, top_p=0.6) for u in (0.0, 0.5, 0.999)} == {0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"u": 1.0}, r"u: expected a number in \[0, 1\), found 1.0"),
        ({"u": -0.1}, "u: expected"),
        ({"u": float("nan")}, "u: expected"),
        ({"temperature": -1.0}, "temperature: expected a finite number >= 0, found -1.0"),
        ({"temperature": float("inf")}, "temperature: expected"),
        ({"top_k": -1}, "top_k: expected an integer >= 0, found -1"),
        ({"top_p": 0.0}, "top_p: expected a number above 0 and at most 1, found 0.0"),
        ({"top_p": 1.1}, "top_p: expected"),
        ({"min_p": -0.1}, "min_p: expected a number from 0 to 1"),
        ({"min_p": 2.0}, "min_p: expected"),
    ],
)
def test_numbers_outside_their_range(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        sample(_logits(10), **{"u": 0.5, **arguments})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 7, 300, 999])
def test_logits_that_are_no_distribution(bad: float, at: int) -> None:
    logits = _logits(1000)
    logits[at] = bad
    with pytest.raises(ValueError, match="logits: "):
        sample(logits, 0.5)
    if np.isnan(bad):
        for function in (argmax, lambda x: top_k(x, 3), lambda x: top_logprobs(x, 3)):
            with pytest.raises(ValueError, match=f"holds NaN at index {at}"):
                function(logits)


def test_logits_that_are_nothing() -> None:
    with pytest.raises(ValueError, match="logits: the largest must be finite, found -inf"):
        sample(np.full(5, -np.inf, np.float32), 0.5)
    with pytest.raises(ValueError, match="logits: expected at least one element"):
        sample(np.empty(0, np.float32), 0.5)
    with pytest.raises(ValueError, match="logits: expected 1 dimensions"):
        sample(np.zeros((2, 2), np.float32), 0.5)


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 511, 513, 5000])
def test_argmax_and_top_k_with_equal_elements(n: int) -> None:
    x = np.round(_logits(n, n))  # many are equal
    assert argmax(x) == int(np.argmax(x))
    order = np.argsort(-x, kind="stable")
    for k in {1, min(2, n), max(n // 2, 1), max(n - 1, 1), n}:
        values, ids = top_k(x, k)
        np.testing.assert_array_equal(ids, order[:k])
        np.testing.assert_array_equal(values, x[order[:k]])


def test_argmax_of_infinities() -> None:
    assert argmax(np.full(600, -np.inf, np.float32)) == 0
    x = _logits(600)
    x[417] = np.inf
    assert argmax(x) == 417
    x[100] = -np.inf
    assert argmax(x) == 417


@pytest.mark.parametrize("k", [0, -1, 11])
def test_top_k_outside_its_range(k: int) -> None:
    with pytest.raises(ValueError, match=f"k: expected 1 to 10, found {k}"):
        top_k(_logits(10), k)


def test_log_softmax() -> None:
    x = 5 * _logits(3 * 257).reshape(3, 257)
    x[0, 5] = -np.inf
    np.testing.assert_allclose(log_softmax(x), reference.log_softmax(x), rtol=1e-6, atol=1e-6)
    changed = x.copy()
    assert log_softmax(changed, out=changed) is changed
    np.testing.assert_array_equal(changed, log_softmax(x))
    certain = np.array([30, 0, 0], np.float32)
    np.testing.assert_allclose(log_softmax(certain), [0, -30, -30], atol=1e-6)


def test_top_logprobs() -> None:
    logits = _logits(1000)
    logprobs = reference.log_softmax(logits)
    order = np.argsort(-logits, kind="stable")[:7]
    found = top_logprobs(logits, 7)
    assert [i for i, _ in found] == order.tolist()
    np.testing.assert_allclose([p for _, p in found], logprobs[order], atol=1e-6)
    assert top_logprobs(logits, 0) == []
    assert len(top_logprobs(logits[:3], 10)) == 3
    with pytest.raises(ValueError, match="n: expected a number >= 0, found -1"):
        top_logprobs(logits, -1)


def test_repetition_penalty() -> None:
    """Divided where positive, multiplied where negative, once however often a token occurred: as in transformers."""
    logits = np.array([2, -2, 0, 4, -np.inf], np.float32)
    assert apply_repetition_penalty(logits, [3, 1, 3, 3, 4], 2.0) is logits
    np.testing.assert_array_equal(logits, np.array([2, -4, 0, 2, -np.inf], np.float32))
    apply_repetition_penalty(logits, np.empty(0, np.int64), 2.0)
    apply_repetition_penalty(logits, [0, 1], 1.0)
    np.testing.assert_array_equal(logits, np.array([2, -4, 0, 2, -np.inf], np.float32))
    apply_repetition_penalty(logits, np.array([0], np.uint16), 0.5)
    assert logits[0] == 4


def test_repetition_penalty_that_cannot_be() -> None:
    logits = _logits(5)
    for ids in ([5], [-1, 2], [0, 100]):
        with pytest.raises(ValueError, match="ids: expected 0 to 4"):
            apply_repetition_penalty(logits, ids, 1.1)
    for penalty in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="penalty: expected a finite number > 0"):
            apply_repetition_penalty(logits, [1], penalty)
    with pytest.raises(TypeError, match="ids: expected integers"):
        apply_repetition_penalty(logits, [1.5], 1.1)
    with pytest.raises(TypeError, match="logits: expected a float32"):
        apply_repetition_penalty([1.0, 2.0], [1], 1.1)  # type: ignore[arg-type]
    logits.flags.writeable = False
    with pytest.raises(ValueError, match="logits: must be C-contiguous"):
        apply_repetition_penalty(logits, [1], 1.1)
