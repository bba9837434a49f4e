"""Speculative decoding: the same text as without, from any guesses; how many guesses are made; what is left behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ruvllm.errors import ContextFullError
from ruvllm.kernels import reference
from ruvllm.model import Llama
from ruvllm.model.generate import Token, generate
from ruvllm.model.kv_cache import KVCache
from ruvllm.model.sampling.options import Sampling
from ruvllm.model.sampling.sampler import Sampler
from ruvllm.model.speculation.costs import Acceptance, PassCosts, best_length
from ruvllm.model.speculation.draft_model import DraftModel
from ruvllm.model.speculation.lookup import Lookup
from ruvllm.model.speculation.speculate import MOST, Drafter, Speculation, speculate
from tests.model.model_cases import SMALL, WINDOWED, small_model, text

SAMPLINGS = [
    Sampling(), Sampling(0.8, top_p=0.9, repetition_penalty=1.2, seed=5), Sampling(1.0, mirostat=2, seed=6),
    Sampling(1.0, xtc=0.5, frequency_penalty=0.3, seed=7),
]  # fmt: skip


class Script:
    """Guesses what a text says, of which some tokens are changed; always as many as are asked for."""

    expected = 1.0, 1.0
    guess_seconds = 0.0

    def __init__(self, ids: list[int], wrong: set[int] = frozenset(), vocabulary: int = SMALL.vocab_size) -> None:  # type: ignore[assignment]
        self.ids = [(i + 1) % vocabulary if n in wrong else i for n, i in enumerate(ids)]
        self.at = 0

    def levels(self, ids: np.ndarray, most: int) -> list[int]:
        self.at = len(ids)
        return list(range(min(most, len(self.ids) - len(ids))))

    def guesses(self, count: int) -> list[int]:
        return self.ids[self.at : self.at + count]


def free() -> PassCosts:
    """Costs of passes that are the same for any number of tokens."""
    costs = PassCosts()
    costs.of = lambda n: 1.0  # type: ignore[method-assign]
    return costs


def counts() -> Any:
    return SimpleNamespace(drafted=0, accepted=0)


def plain(
    model: Llama, prompt: np.ndarray, sampling: Sampling, count: int, kv: str = "f32"
) -> tuple[list[Token], KVCache]:
    cache = model.new_cache(len(prompt) + count, kv)
    return list(generate(model, cache, prompt, Sampler(sampling), count, 3)), cache


def guessed(
    model: Llama, prompt: np.ndarray, sampling: Sampling, count: int, drafter: Drafter, kv: str = "f32"
) -> tuple[list[Token], KVCache, Any]:
    cache, counted = model.new_cache(len(prompt) + count, kv), counts()
    speculation = Speculation(drafter, free(), counted)
    return list(speculate(model, cache, prompt, Sampler(sampling), count, 3, speculation)), cache, counted


DRAFTERS: dict[str, Callable[[Llama, list[int]], Drafter]] = {
    "lookup": lambda model, ids: Lookup(),
    "all right": lambda model, ids: Script(ids),
    "all wrong": lambda model, ids: Script(ids, set(range(1000))),
    "some wrong": lambda model, ids: Script(ids, set(range(0, 1000, 7)) | {31, 32}),
    "itself": lambda model, ids: DraftModel(model, SMALL.vocab_size, 1000),
    "another": lambda model, ids: DraftModel(Llama(SMALL, layout="f32", seed=9), SMALL.vocab_size, 1000),
}


@pytest.mark.parametrize(
    ("name", "sampling"),
    [*((name, SAMPLINGS[0]) for name in DRAFTERS), *(("some wrong", sampling) for sampling in SAMPLINGS[1:])],
    ids=[*DRAFTERS, "top-p", "mirostat", "xtc"],
)
def test_the_text_is_the_same_with_any_guesses(name: str, sampling: Sampling) -> None:
    """Ids, log-probabilities and alternatives, to the last bit; and the cache goes on alike."""
    model, prompt, count = small_model("f32"), text(11), 60
    expected, cache = plain(model, prompt, sampling, count)
    ids = [*prompt.tolist(), *[token.id for token in expected]]
    found, other, counted = guessed(model, prompt, sampling, count, DRAFTERS[name](model, ids))
    assert found == expected
    assert counted.accepted <= counted.drafted
    if name == "itself":
        assert 0 < counted.accepted == counted.drafted
    if name == "all right":
        assert count - counted.accepted == 1 + -(-(count - 1) // (MOST + 1))  # passes: of the prompt, then of 16 tokens
    if name == "all wrong":
        assert counted.accepted == 0 < counted.drafted
    assert other.length == cache.length
    np.testing.assert_array_equal(other.ids[: cache.length], cache.ids[: cache.length])
    cache.truncate(cache.length - 1)
    other.truncate(other.length - 1)
    np.testing.assert_array_equal(model.forward([3], other), model.forward([3], cache))


@pytest.mark.parametrize(("layout", "kv"), [("int4", "f32"), ("int8", "int8"), ("f32", "f16")])
def test_the_text_is_the_same_on_quantised_weights_and_caches(layout: str, kv: str) -> None:
    model, prompt = small_model(layout, 2), text(20)
    for sampling in SAMPLINGS[:2]:
        expected, _ = plain(model, prompt, sampling, 80, kv)
        ids = [*prompt.tolist(), *[token.id for token in expected]]
        for wrong in (set(), set(range(0, 200, 5))):
            found, _, counted = guessed(model, prompt, sampling, 80, Script(ids, wrong), kv)
            assert found == expected and counted.accepted > 40


def test_a_ring_rolls_back() -> None:
    """Layers with a window, long after their ring began to turn: rejected guesses took no place that was needed."""
    model, prompt = small_model("f32", config=WINDOWED), text(30)
    expected, cache = plain(model, prompt, Sampling(), 500)
    assert cache.capacities[0] < 530 and cache.oldest > 0
    ids = [*prompt.tolist(), *[token.id for token in expected]]
    found, other, counted = guessed(model, prompt, Sampling(), 500, Script(ids, set(range(0, 600, 9))))
    assert found == expected and 0 < counted.accepted < counted.drafted
    np.testing.assert_array_equal(model.forward([3], other), model.forward([3], cache))


def test_sampled_text_has_the_exact_distribution() -> None:
    """Chi-square of two tokens, of which lookup guesses the second, against the product of the model's own softmax."""
    config = dataclasses.replace(SMALL, vocab_size=4, eos_token_ids=())
    model = Llama(config, layout="f32", threads=1, seed=1)
    prompt, temperature, times = np.array([0, 1, 2, 0, 1, 3, 0, 1]), 1.5, 1500
    cache = model.new_cache(16)
    model.forward(prompt, cache)
    seen, guesses = np.zeros((4, 4)), counts()
    for seed in range(times):
        cache.keep_common_prefix(prompt)
        speculation = Speculation(Script([*prompt.tolist(), 9, 2, 1, 0], vocabulary=4), free(), guesses)
        sampler = Sampler(Sampling(temperature, seed=seed))
        _, first, second = (t.id for t in speculate(model, cache, prompt[-1:], sampler, 3, 0, speculation))
        seen[first, second] += 1
    expected = np.zeros((4, 4))
    for start, p in enumerate(softmax_after(model, [*prompt], temperature)):
        for first, q in enumerate(softmax_after(model, [*prompt, start], temperature)):
            expected[first] += p * q * softmax_after(model, [*prompt, start, first], temperature)
    assert 0 < guesses.accepted < guesses.drafted
    chi_square = np.sum(np.square(seen - times * expected) / (times * expected))
    assert chi_square < 37.7  # 15 degrees of freedom: exceeded once in a thousand times


def softmax_after(model: Llama, ids: list[int], temperature: float) -> np.ndarray:
    logits = model.forward(ids, model.new_cache(len(ids)), last_only=True)
    return reference.softmax(logits.astype(np.float64) / temperature)


def test_a_text_that_is_left_in_the_middle_of_a_pass() -> None:
    """A yielded token is not yet in the cache, and no guess behind it."""
    model, prompt = small_model("f32"), text(9)
    expected, _ = plain(model, prompt, Sampling(), 30)
    ids = [*prompt.tolist(), *[token.id for token in expected]]
    cache = model.new_cache(60)
    running = speculate(model, cache, prompt, Sampler(Sampling()), 30, 0, Speculation(Script(ids), free(), counts()))
    for made in range(1, 10):
        assert next(running).id == ids[8 + made]
        assert cache.length == 8 + made
    del running
    np.testing.assert_array_equal(cache.ids[: cache.length], ids[:17])
    fresh = model.forward(cache.ids[: cache.length], model.new_cache(30), last_only=True)
    cache.truncate(16)
    np.testing.assert_array_equal(model.forward(ids[16:17], cache, last_only=True), fresh)


def test_the_end_of_the_context() -> None:
    model, prompt = small_model("f32"), text(9)
    expected, _ = plain(model, prompt, Sampling(), 21)
    ids = [*prompt.tolist(), *[token.id for token in expected]]
    cache = model.new_cache(29)
    speculation = Speculation(Script([*ids, 1, 2, 3]), free(), counts())
    running = speculate(model, cache, prompt, Sampler(Sampling()), 100, 0, speculation)
    assert [next(running).id for _ in range(21)] == ids[9:]
    with pytest.raises(ContextFullError):
        next(running)
    assert cache.length == 29


def test_positions_are_taken_back_only_where_they_were() -> None:
    model = small_model("f32")
    cache = model.new_cache(20)
    model.forward(text(10), cache)
    cache.truncate(4)
    for length in (3, 11):
        with pytest.raises(ValueError, match=f"^length: expected 4 to 10, found {length}$"):
            cache.restore(length)
    cache.restore(9)
    np.testing.assert_array_equal(
        model.forward([1], cache), model.forward([*text(10)[:9], 1], model.new_cache(20))[-1:]
    )


# --- how many guesses --------------------------------------------------------------------------------------------


def test_lookup_goes_on_as_the_most_alike_place() -> None:
    lookup = Lookup()
    text = np.array([1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3])
    assert lookup.levels(text, 4) == [3, 4, 5, 6]  # three tokens are alike at the first place, two at the second
    assert lookup.guesses(4) == [7, 9, 2, 3]
    text = np.append(text, [7, 9])
    assert lookup.levels(text, 2) == [5, 6] and lookup.guesses(2) == [2, 3]
    text = np.append(text, [50, 51, 52, 53, 54, 55])
    assert lookup.levels(text, 2) == [0, 1]  # six tokens differ
    text = np.append(text, [56])
    assert lookup.levels(text, 4) == []
    repeated = np.append(text, [50, 4, 5, 4, 5, 4])
    assert lookup.levels(repeated, 6) and lookup.guesses(6) == [5, 4, 5, 4, 5, 4]
    assert Lookup().levels(np.array([1]), 4) == Lookup().levels(np.array([1, 1]), 4) == []


def looked_up(source: list[int], copy: list[int], count: int) -> tuple[list[int], list[int]]:
    """Levels and guesses after a source and the beginning of a copy, which came token by token."""
    lookup = Lookup()
    for end in range(len(source), len(source) + len(copy) + 1):
        levels = lookup.levels(np.array([*source, *copy][:end]), count)
    return levels, lookup.guesses(count) if levels else []


def test_lookup_follows_a_copy_through_changes() -> None:
    source = list(range(10, 60))
    assert looked_up(source, [20, 21, 22], 3) == ([3, 4, 5], [23, 24, 25])
    assert looked_up(source, [20, 21, 22, 99], 3) == ([0, 1, 2], [24, 25, 26])  # one token is replaced
    assert looked_up(source, [20, 21, 22, 99, 24], 3) == ([1, 2, 3], [25, 26, 27])
    assert looked_up(source, [20, 21, 22, 99, 98, 25], 3) == ([1, 2, 3], [26, 27, 28])  # two tokens
    assert looked_up(source, [20, 21, 22, 99, 23], 3) == ([1, 2, 3], [24, 25, 26])  # one is put in
    assert looked_up(source, [20, 21, 22, 27, 28], 3)[1] == [29, 30, 31]  # four are left out
    assert looked_up(source, [20, 21, 22, 99, 40, 41, 42, 43], 3) == ([4, 5, 6], [44, 45, 46])  # it goes on elsewhere


def test_lookup_expects_a_change_again() -> None:
    source = [5, 1, 7, 8, 2, 7, 9, 3, 7, 6, 4, 7, 0]
    assert looked_up(source, [5, 1, 99, 8, 2], 3)[1] == [99, 9, 3]  # 99 has replaced 7
    assert looked_up(source, [5, 1, 99, 8, 2, 99, 9, 3], 3)[1] == [99, 6, 4]
    assert looked_up(source, [5, 1, 99, 8, 2, 7, 9, 3], 3)[1] == [7, 6, 4]  # but not always
    assert looked_up(source, [5, 1, 99, 98, 8, 2], 3)[1] == [7, 9, 3]  # two tokens replaced it


def test_costs_of_passes_are_learned() -> None:
    for a, b in ((0.01, 0.001), (0.002, 0.01), (1.0, 0.0)):
        costs = PassCosts()
        for n in [1, 5, 1, 9, 2, 16] * 30:
            costs.measured(n, a + b * n)
        for n in (1, 4, 16):
            assert costs.of(n) == pytest.approx(a + b * n, rel=0.25)
    for n in [1, 5, 9] * 30:
        costs.measured(n, 1.0 if n < 9 else 1.1)
    before = costs.of(9)
    costs.measured(9, 100.0)  # the process was stopped
    assert costs.of(9) < 1.3 * before


def test_as_many_guesses_as_pay() -> None:
    levels, sure, unsure = list(range(15)), Acceptance(1.0, 1.0), Acceptance(0.2, 0.2)
    cheap, dear = PassCosts(), PassCosts()
    for n in [1, 2, 16] * 50:
        cheap.measured(n, 1.0 + 0.01 * n)
        dear.measured(n, float(n))
    assert best_length(levels, sure, cheap) == 15
    assert best_length(levels, sure, dear) == 0  # two tokens in one pass cost what they cost in two
    assert best_length(levels, unsure, cheap) > 0
    assert best_length(levels, unsure, PassCosts()) == 0
    assert best_length(levels, sure, cheap, guess_seconds=2.0) == 0
    assert best_length([], sure, cheap) == 0


def test_wrong_guesses_are_given_up_and_right_ones_go_on() -> None:
    acceptance, costs, levels = Acceptance(0.5, 0.9), PassCosts(), list(range(8))
    first = best_length(levels, acceptance, costs)
    assert first > 0
    for _ in range(20):
        acceptance.learn(levels[:3], 0)
    assert best_length(levels, acceptance, costs) == 0
    assert best_length([6, 7, 8], acceptance, costs) == 3  # longer matches were not tried
    for _ in range(3000):
        acceptance.fade()
    assert best_length(levels, acceptance, costs) == first
    for _ in range(20):
        acceptance.learn(levels, 8)
    assert best_length(levels, acceptance, costs) == 8
