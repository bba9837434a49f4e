"""Generation: greedy is the argmax loop; seeds, penalties and log-probabilities are those of the model's logits."""

import math

import numpy as np
import pytest

from ruvllm.errors import ContextFullError
from ruvllm.kernels import reference
from ruvllm.model import Llama
from ruvllm.model.generate import Token, generate
from ruvllm.model.sampling.options import Sampling
from tests.model.model_cases import small_model, text

PROMPT = text(9, seed=5)


@pytest.fixture(scope="module")
def model() -> Llama:
    return small_model("f32")


def tokens(model: Llama, sampling: Sampling | None = None, count: int = 12, logprobs: int = 0) -> list[Token]:
    cache = model.new_cache(64)
    return list(generate(model, cache, PROMPT, sampling or Sampling(), count, logprobs))


def ids_of(generated: list[Token]) -> list[int]:
    return [token.id for token in generated]


def replayed(model: Llama, generated: list[Token]) -> np.ndarray:
    """The logits from which each token was chosen, computed on their own, as float64."""
    cache = model.new_cache(64)
    rows = [model.forward(PROMPT, cache, last_only=True)]
    rows += [model.forward([token.id], cache, last_only=True) for token in generated[:-1]]
    return np.array(rows, np.float64)


def test_greedy_takes_the_most_likely_token(model: Llama) -> None:
    generated = tokens(model)
    assert len(generated) == 12
    assert ids_of(generated) == replayed(model, generated).argmax(axis=1).tolist()
    assert all(token.logprob is None and token.top_logprobs == () for token in generated)


def test_a_seed_decides_everything(model: Llama) -> None:
    hot = [ids_of(tokens(model, Sampling(temperature=1.5, seed=seed), 20)) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    fresh = [ids_of(tokens(model, Sampling(temperature=5.0, seed=None), 20)) for _ in range(2)]
    assert fresh[0] != fresh[1]


def test_filters_that_leave_one_token_are_greedy(model: Llama) -> None:
    greedy = ids_of(tokens(model))
    for filters in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert ids_of(tokens(model, Sampling(temperature=1.0, **filters))) == greedy, filters


def test_top_k_samples_among_the_k_most_likely(model: Llama) -> None:
    generated = tokens(model, Sampling(temperature=10.0, top_k=3), 40)
    ranks = [int((row > row[token.id]).sum()) for row, token in zip(replayed(model, generated), generated, strict=True)]
    assert set(ranks) == {0, 1, 2}


def test_repetition_penalty(model: Llama) -> None:
    """Logits of tokens that occurred, in the prompt or since, are divided by it, or times it where negative."""
    generated = tokens(model, Sampling(repetition_penalty=1.7), 20)
    seen = list(PROMPT)
    for row, token in zip(replayed(model, generated), generated, strict=True):
        occurred = np.unique(seen)
        row[occurred] = np.where(row[occurred] > 0, row[occurred] / 1.7, row[occurred] * 1.7)
        assert token.id == row.argmax()
        seen.append(token.id)
    assert ids_of(generated) != ids_of(tokens(model, count=20))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.5, top_k=2, repetition_penalty=1.3)])
def test_log_probabilities_are_the_models_own(model: Llama, sampling: Sampling) -> None:
    """Before the penalty, the temperature and the filters."""
    generated = tokens(model, sampling, logprobs=4)
    for row, token in zip(reference.log_softmax(replayed(model, generated)), generated, strict=True):
        assert token.logprob == pytest.approx(row[token.id], abs=1e-5)
        best = np.argsort(-row)[:4]
        assert [id for id, _ in token.top_logprobs] == best.tolist()
        np.testing.assert_allclose([logprob for _, logprob in token.top_logprobs], row[best], atol=1e-5)
    assert ids_of(generated) == ids_of(tokens(model, sampling))


def test_a_token_is_computed_when_the_next_is_asked_for(model: Llama) -> None:
    cache = model.new_cache(64)
    running = generate(model, cache, PROMPT, Sampling(), 5)
    assert cache.length == 0
    for made in range(5):
        next(running)
        assert cache.length == len(PROMPT) + made
    with pytest.raises(StopIteration):
        next(running)
    assert cache.length == len(PROMPT) + 4


def test_a_full_context_ends_it(model: Llama) -> None:
    cache = model.new_cache(len(PROMPT) + 3)
    running = generate(model, cache, PROMPT, Sampling(), 10)
    taken = [next(running).id for _ in range(4)]
    with pytest.raises(ContextFullError, match="1 more tokens do not fit, 12 of 12"):
        next(running)
    assert taken == ids_of(tokens(model, count=4))
    with pytest.raises(ContextFullError):
        next(generate(model, model.new_cache(3), PROMPT, Sampling(), 10))


def test_logits_that_are_no_numbers_are_refused() -> None:
    broken = small_model("f32")
    broken.decoder.norm[0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        tokens(broken)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (-0.1, math.nan, math.inf, "hot", None, True)),
        ("top_k", (-1, 1.5, "3", None, True)),
        ("top_p", (0.0, -1.0, 1.01, math.nan, "1", None)),
        ("min_p", (-0.01, 1.01, math.nan, "0", None)),
        ("repetition_penalty", (0.0, -1.0, math.inf, math.nan, "1", None)),
        ("seed", (-1, 1.5, "0")),
    ],
)
def test_options_are_refused_by_name(name: str, values: tuple[object, ...]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"^{name}: expected .*, found {value!r}$"):
            Sampling(**{name: value})  # type: ignore[arg-type]
