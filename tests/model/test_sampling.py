"""Penalties, filters and Mirostat against float64 loops that follow their definitions, and llama.cpp's figures.

The figures are those of its tests (tests/test-sampling.cpp): probabilities before and after one sampler.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from ruvllm.kernels import reference
from ruvllm.model.sampling import filters
from ruvllm.model.sampling.options import Dry, Mirostat, Sampling, Xtc
from ruvllm.model.sampling.penalties import penalise_repeats, penalise_tokens
from ruvllm.model.sampling.sampler import Sampler

NO_IDS = np.empty(0, np.int64)


def logits_of(*probabilities: float) -> np.ndarray:
    return np.log(np.array(probabilities, np.float64)).astype(np.float32)


def some_logits(n: int, seed: int = 0) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal(n)).astype(np.float32)


def drawn(sampling: Sampling, logits: np.ndarray, times: int) -> Counter[int]:
    sampler = Sampler(sampling, lambda _: b"")
    return Counter(sampler.choose(logits.copy(), NO_IDS) for _ in range(times))


# --- penalties ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "repeat", "other", "expected"),
    [
        ([0], 50.0, 0.0, [0, 0.25, 0.25, 0.25, 0.25]),
        ([0, 1, 2, 0, 0], 50.0, 0.0, [0, 0, 0, 0.5, 0.5]),
        ([0], 1.0, 5.0, [0.000011, 0.249997, 0.249997, 0.249997, 0.249997]),
        ([0, 1, 2, 0, 0], 1.0, 5.0, [0, 0.000023, 0.000023, 0.499977, 0.499977]),
    ],
)
def test_penalties_give_llama_cpps_figures(ids: list[int], repeat: float, other: float, expected: list[float]) -> None:
    logits = logits_of(*[0.2] * 5)
    sampling = Sampling(repetition_penalty=repeat, presence_penalty=other, frequency_penalty=other)
    penalise_tokens(logits, np.array(ids), sampling)
    np.testing.assert_allclose(reference.softmax(logits.astype(np.float64)), expected, atol=1e-5)


@pytest.mark.parametrize("last_n", [-1, 0, 1, 7, 200])
def test_penalties_of_the_last_tokens(last_n: int) -> None:
    logits, ids = some_logits(50), np.random.default_rng(1).integers(0, 20, 40)
    expected = logits.astype(np.float64)
    for token, count in Counter(ids.tolist() if last_n < 0 else ids.tolist()[max(0, 40 - last_n) :]).items():
        expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
        expected[token] -= 0.7 + 0.25 * count
    sampling = Sampling(repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=0.25, repeat_last_n=last_n)
    penalise_tokens(logits, ids, sampling)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


# --- DRY ---------------------------------------------------------------------------------------------------------


def spell(token: int) -> bytes:
    return f"<{token}>".encode()


@pytest.mark.parametrize(
    ("ids", "dry", "expected"),
    [
        ([0, 1], Dry(1.0, 1.1, 2, 4, ()), [0.25] * 4),
        ([0, 1, 2, 0, 1], Dry(1.0, 1.1, 2, 5, ()), [0.296923, 0.296923, 0.109232, 0.296923]),
        ([0, 1, 3, 4, 0, 1], Dry(1.0, 1.1, 2, 6, ("3",)), [0.2] * 5),
        ([0, 1, 2, 0, 1], Dry(2.0, 1.1, 2, 5, ()), [0.241818, 0.241818, 0.032727, 0.241818, 0.241818]),
        ([0, 1, 2, 3, 4, 0, 1], Dry(1.0, 1.1, 4, 7, ()), [0.2] * 5),
    ],
)
def test_dry_gives_llama_cpps_figures(ids: list[int], dry: Dry, expected: list[float]) -> None:
    logits = logits_of(*[1 / len(expected)] * len(expected))
    penalise_repeats(logits, np.array(ids), dry, spell)
    np.testing.assert_allclose(reference.softmax(logits.astype(np.float64)), expected, atol=1e-5)


def dry_penalties(ids: list[int], dry: Dry, vocabulary: int) -> np.ndarray:
    """By the definition: compare every earlier place with the end of the text, token by token."""
    window = ids if dry.last_n < 0 else ids[max(0, len(ids) - dry.last_n) :]
    text = b"".join(map(spell, window))
    starts = np.cumsum([0, *[len(spell(i)) for i in window]])
    last = max((text.rfind(b.encode()) + len(b) for b in dry.breakers if b.encode() in text), default=0)
    unbroken = sum(start >= last for start in starts[:-1].tolist()) if last else len(window)
    off = np.zeros(vocabulary)
    for place in range(1, len(window)):
        length = 0
        while length < min(place, unbroken) and window[place - 1 - length] == window[-1 - length]:
            length += 1
        token = window[place]
        if length >= dry.allowed_length and not any(b.encode() in spell(token) for b in dry.breakers):
            exponent = min(length - dry.allowed_length, int(88.7228391 / math.log(dry.base)))
            off[token] = max(off[token], dry.multiplier * dry.base**exponent)
    return off


@pytest.mark.parametrize("breakers", [(), ("3",), ("4><3", "2")])
@pytest.mark.parametrize(("last_n", "allowed"), [(-1, 2), (9, 1), (30, 3)])
def test_dry_equals_its_definition(breakers: tuple[str, ...], last_n: int, allowed: int) -> None:
    rng = np.random.default_rng(allowed)
    penalised = 0
    for n in (1, 2, 5, 20, 60):
        for symbols in (2, 3, 5):
            ids = rng.integers(0, symbols, n)
            dry = Dry(0.8, 1.75, allowed, last_n, breakers)
            logits = np.zeros(6, np.float32)
            penalise_repeats(logits, ids, dry, spell)
            expected = dry_penalties(ids.tolist(), dry, 6)
            np.testing.assert_allclose(-logits, expected, rtol=1e-5)
            penalised += int(expected.any())
    assert penalised


def test_dry_of_a_long_repetition_is_finite() -> None:
    logits = np.zeros(3, np.float32)
    penalise_repeats(logits, np.zeros(4000, np.int64), Dry(), lambda _: b"a")
    assert np.isfinite(logits).all() and logits[0] < -1e30 and not logits[1:].any()


# --- filters -----------------------------------------------------------------------------------------------------


def typical_ids(logits: np.ndarray, p: float) -> set[int]:
    probabilities = reference.softmax(logits.astype(np.float64))
    entropy = -sum(q * math.log(q) for q in probabilities if q > 0)
    order = sorted(range(len(logits)), key=lambda i: abs(-math.log(probabilities[i]) - entropy))
    kept, total = set(), 0.0
    for i in order:
        kept.add(i)
        total += probabilities[i]
        if total > p:
            break
    return kept


@pytest.mark.parametrize("n", [1, 2, 5, 63, 1000, 5000])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.9999])
def test_typical_keeps_what_is_near_the_entropy(n: int, p: float) -> None:
    logits = some_logits(n, n)
    kept = filters.keep_typical(filters.candidates(logits), p)
    assert set(kept.ids.tolist()) == typical_ids(logits, p)
    np.testing.assert_array_equal(kept.logits, logits[kept.ids])


def test_typical_gives_llama_cpps_figures() -> None:
    for given, expected in (((0.97, 0.01, 0.01, 0.01), {0}), ((0.4, 0.2, 0.2, 0.2), {1, 2, 3})):
        kept = filters.keep_typical(filters.candidates(logits_of(*given)), 0.5)
        assert set(kept.ids.tolist()) == expected


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.09, [3]), (0.19, [2, 3]), (0.29, [1, 2, 3]), (0.39, [0, 1, 2, 3]), (0.6, [0, 1, 2, 3])],
)
def test_xtc_drops_all_likely_tokens_but_the_least(threshold: float, expected: list[int]) -> None:
    """llama.cpp's figures; in any order of the tokens."""
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        logits = logits_of(*np.array([0.4, 0.3, 0.2, 0.1])[order])
        kept = filters.drop_top_choices(filters.candidates(logits), threshold)
        assert sorted(order[i] for i in kept.ids) == expected


def test_xtc_acts_as_often_as_it_should() -> None:
    logits = logits_of(0.5, 0.3, 0.2)
    counts = drawn(Sampling(temperature=1.0, xtc=(0.4, 0.25)), logits, 4000)
    # Where it acts, tokens 1 and 2 are left: 0.6 and 0.4 of those times.
    expected = 4000 * (0.6 * np.array([0.5, 0.3, 0.2]) + 0.4 * np.array([0, 0.6, 0.4]))
    assert np.square(np.array([counts[i] for i in range(3)]) - expected).sum() / expected.mean() < 20
    assert drawn(Sampling(temperature=1.0, xtc=Xtc(1.0, 0.25)), logits, 200).keys() == {1, 2}
    assert drawn(Sampling(xtc=Xtc(1.0, 0.25)), logits, 5).keys() == {1}  # the likeliest of those that are left


def test_the_order_of_the_filters() -> None:
    """top_k, typical_p, top_p, min_p, xtc: each renormalises over what the one before has kept."""
    logits = some_logits(300, 5)
    for top_k, typical_p, top_p, min_p in ((0, 0.9, 0.8, 0.0), (40, 0.7, 1.0, 0.2), (7, 0.95, 0.6, 0.1)):
        order = np.argsort(-logits, kind="stable")[: top_k or None]
        order = order[sorted(typical_ids(logits[order], typical_p))]
        order = order[np.argsort(-logits[order], kind="stable")]
        if top_p < 1:
            order = order[: int(np.argmax(np.cumsum(reference.softmax(logits[order].astype(float))) >= top_p)) + 1]
        order = order[logits[order] >= logits[order].max() + (math.log(min_p) if min_p else -np.inf)]
        sampling = Sampling(temperature=50.0, top_k=top_k, typical_p=typical_p, top_p=top_p, min_p=min_p)
        assert drawn(sampling, logits, 60 * len(order)).keys() == set(order.tolist())


# --- Mirostat ----------------------------------------------------------------------------------------------------


def mirostat_candidates(probabilities: np.ndarray, mu: float, version: int, vocabulary: int) -> list[int]:
    """By the paper's algorithm, on tokens in descending order."""
    order = np.argsort(-probabilities, kind="stable").tolist()
    if version == 2:
        return [i for rank, i in enumerate(order) if rank == 0 or -math.log2(probabilities[i]) <= mu]
    top = order[:100]
    ts = [math.log((i + 2) / (i + 1)) for i in range(len(top) - 1)]
    bs = [math.log(probabilities[a] / probabilities[b]) for a, b in itertools.pairwise(top)]
    s = sum(t * b for t, b in zip(ts, bs, strict=True)) / sum(t * t for t in ts)
    epsilon = s - 1
    k = ((epsilon * 2**mu) / (1 - vocabulary**-epsilon)) ** (1 / s)
    return order[: max(int(k), 1)]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_mirostat_follows_its_algorithm(version: int, temperature: float) -> None:
    tau, eta, mu = 3.0, 0.2, 6.0
    sampler = Sampler(Sampling(temperature, mirostat=Mirostat(version, tau, eta), seed=3))
    surprises = []
    for step in range(400):
        logits = some_logits(500, step)
        probabilities = reference.softmax(logits.astype(np.float64) / temperature)
        kept = mirostat_candidates(probabilities, mu, version, 500)
        chosen = sampler.choose(logits, NO_IDS)
        assert chosen in kept
        surprises.append(-math.log2(probabilities[chosen] / probabilities[kept].sum()))
        mu -= eta * (surprises[-1] - tau)
        assert sampler._mu == pytest.approx(mu, abs=1e-3)
        mu = sampler._mu
    if version == 2:
        assert np.mean(surprises[100:]) == pytest.approx(tau, abs=0.1)


def test_mirostat_where_there_is_little_to_choose() -> None:
    for logits in (np.zeros(1, np.float32), np.zeros(7, np.float32), np.array([0, -np.inf, -np.inf], np.float32)):
        for version in (1, 2):
            sampler = Sampler(Sampling(1.0, mirostat=version))
            for _ in range(50):
                assert np.isfinite(logits[sampler.choose(logits.copy(), NO_IDS)])
    greedy = Sampler(Sampling(0.0, mirostat=2))
    assert greedy.choose(logits_of(0.2, 0.5, 0.3), NO_IDS) == 1


# --- the sampler -------------------------------------------------------------------------------------------------


def test_biases_and_processors() -> None:
    logits = logits_of(0.4, 0.3, 0.2, 0.1)
    seen: list[Any] = []

    def forbid(ids: np.ndarray, row: np.ndarray) -> None:
        seen.append(ids.tolist())
        row[0] = -np.inf

    def replace(ids: np.ndarray, row: np.ndarray) -> np.ndarray:
        assert row[0] == -np.inf
        return np.array([-np.inf, -5, -1, -2], np.float64)

    ids = np.array([3, 1])
    assert Sampler(Sampling(logits_processors=[forbid])).choose(logits.copy(), ids) == 1
    assert Sampler(Sampling(logits_processors=[forbid, replace])).choose(logits.copy(), ids) == 2
    assert seen == [[3, 1]] * 2
    assert Sampler(Sampling(logit_bias={3: 5.0})).choose(logits.copy(), ids) == 3
    assert Sampler(Sampling(logit_bias={0: -math.inf, 1: -1.0})).choose(logits.copy(), ids) == 2
    with pytest.raises(ValueError, match=r"^logits_processors: expected float32 \(4,\) or None of <lambda>, found "):
        Sampler(Sampling(logits_processors=[lambda ids, row: row[:2]])).choose(logits.copy(), ids)
    with pytest.raises(ValueError, match="^logits: the largest must be finite"):
        Sampler(Sampling(xtc=1.0, logit_bias=dict.fromkeys(range(4), -math.inf))).choose(logits.copy(), ids)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.9, top_p=0.9, presence_penalty=0.5), Sampling(1.1, mirostat=2), Sampling(0.8, dry=0.8, xtc=0.5),
        Sampling(1.0, typical_p=0.8, frequency_penalty=0.1),
    ],
)  # fmt: skip
def test_each_sequence_has_its_own_state(sampling: Sampling) -> None:
    """Two sequences in turns choose what each chooses alone."""

    def step(sampler: Sampler, ids: list[int], seed: int) -> None:
        ids.append(sampler.choose(some_logits(40, seed + len(ids)), np.array(ids, np.int64)))

    alone: list[list[int]] = []
    for seed in (0, 1000):
        ids: list[int] = [1, 2]
        sampler = Sampler(sampling, spell)
        for _ in range(30):
            step(sampler, ids, seed)
        alone.append(ids)
    together = [[1, 2], [1, 2]]
    samplers = [Sampler(sampling, spell) for _ in together]
    for _ in range(30):
        for seed, sampler, ids in zip((0, 1000), samplers, together, strict=True):
            step(sampler, ids, seed)
    assert together == alone


def test_forms_of_options() -> None:
    assert Sampling(dry=0.7).dry == Dry(0.7) and Sampling(dry=0).dry is None and Sampling(dry=Dry(0.0)).dry is None
    assert Sampling(xtc=0.3).xtc == Xtc(0.3) and Sampling(xtc=(0.3, 0.2)).xtc == Xtc(0.3, 0.2)
    assert Sampling(mirostat=1).mirostat == Mirostat(1) and Sampling(mirostat=0).mirostat is None
    assert repr(Sampling(0.5, dry=0.8)) == "Sampling(temperature=0.5, dry=Dry(...))"
    with pytest.raises(ValueError, match="^dry: breakers are strings"):
        Sampler(Sampling(dry=0.8))
    Sampler(Sampling(dry=Dry(breakers=())))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampling(presence_penalty=math.nan), "presence_penalty: expected a finite number"),
        (lambda: Sampling(frequency_penalty="1"), "frequency_penalty: expected a finite number"),  # type: ignore[arg-type]
        (lambda: Sampling(repeat_last_n=-2), "repeat_last_n: expected an integer >= -1"),
        (lambda: Sampling(typical_p=0.0), "typical_p: expected a number above 0 and at most 1"),
        (lambda: Sampling(dry=-1.0), "dry: multiplier: expected a finite number >= 0, found -1.0"),
        (lambda: Sampling(dry="much"), "dry: expected a number"),  # type: ignore[arg-type]
        (lambda: Dry(base=0.5), "dry: base: expected a finite number >= 1"),
        (lambda: Dry(allowed_length=0), "dry: allowed_length: expected an integer >= 1"),
        (lambda: Dry(breakers="ab"), "dry: breakers: expected non-empty strings"),  # type: ignore[arg-type]
        (lambda: Sampling(xtc=1.5), "xtc: probability: expected a number from 0 to 1, found 1.5"),
        (lambda: Sampling(xtc=(0.5, -1)), "xtc: threshold: expected a number from 0 to 1, found -1"),
        (lambda: Sampling(mirostat=3), "mirostat: expected 0, 1, 2 or a Mirostat, found 3"),
        (lambda: Mirostat(2, tau=-1), "mirostat: tau: expected a finite number >= 0"),
        (lambda: Sampling(mirostat=2, top_k=5), "top_k: expected 0, as mirostat takes its place, found 5"),
        (lambda: Sampling(logit_bias={-1: 1.0}), "logit_bias: expected token ids >= 0 as keys, found -1"),
        (lambda: Sampling(logit_bias={1: math.nan}), r"logit_bias\[1\]: expected a number, or -inf, found nan"),
        (lambda: Sampling(logit_bias=[1]), "logit_bias: expected a dict"),  # type: ignore[arg-type]
        (lambda: Sampling(logits_processors=[3]), "logits_processors: expected a list of functions"),  # type: ignore[list-item]
    ],
)
def test_options_outside_their_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()
