"""LLM.generate and LLM.stream: their tokens against the argmax loop, where they stop, what options they take."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ruvllm
from ruvllm.llm import LLM
from tests import llm_cases as cases


def test_options_of_sampling_reach_the_tokens(llm: LLM) -> None:
    greedy = llm.generate("ab", max_tokens=12).ids
    banned = llm.generate("ab", max_tokens=12, logit_bias=dict.fromkeys(greedy, -math.inf)).ids
    assert len(greedy) > 3 and not set(greedy) & set(banned)
    seen: list[list[int]] = []
    llm.generate("ab", max_tokens=3, logits_processors=[lambda ids, logits: seen.append(ids.tolist())])
    assert seen == [[97, 98, *greedy[:n]] for n in range(3)]
    options: dict[str, Any] = {"temperature": 2.0, "dry": 2.0, "typical_p": 0.9, "presence_penalty": 0.3}
    expected = llm.generate("ab", max_tokens=12, **options, seed=5).ids
    assert llm.generate("ab", max_tokens=12, sampling=ruvllm.Sampling(**options), seed=5).ids == expected
    assert llm.generate("ab", max_tokens=12, **options, seed=6).ids != expected


def test_options_that_nobody_knows(llm: LLM) -> None:
    with pytest.raises(TypeError, match="^unexpected keyword argument 'temprature': did you mean 'temperature'\\?$"):
        llm.stream("ab", temprature=1.0)
    with pytest.raises(TypeError, match="^unexpected keyword argument 'max_new_tokens': did you mean 'max_tokens'\\?$"):
        llm.stream("ab", max_new_tokens=3)
    with pytest.raises(TypeError, match="^sampling: expected a Sampling, found dict$"):
        llm.stream("ab", sampling={"temperature": 1.0})
    with pytest.raises(ValueError, match="^logit_bias: expected token ids up to 259, found 260$"):
        llm.stream("ab", logit_bias={260: 1.0})


def test_guesses_change_no_text_and_are_counted(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.costs, "of", lambda n: 1.0)  # seconds: guesses are worth it, whatever passes take here
    for options in ({}, {"temperature": 0.7, "seed": 3}):
        expected = llm.generate("abcabcabc", max_tokens=60, **options)
        assert (expected.timings.drafted, expected.timings.passes) == (0, expected.timings.tokens)
        for draft in ("lookup", llm, cases.byte_llm(tmp_path, threads=1)):
            cache = llm.new_cache(100)
            found = llm.generate("abcabcabc", max_tokens=60, draft=draft, cache=cache, **options)
            assert (found.ids, found.text) == (expected.ids, expected.text)
            timings = found.timings
            assert timings.tokens == 60 == timings.passes + timings.accepted and timings.accepted <= timings.drafted
            again = llm.generate([*b"abcabcabc", *found.ids, 65], max_tokens=5, draft=draft, cache=cache)
            assert again.timings.reused_tokens == 9 + 59
    assert llm.generate("abcabcabc", max_tokens=60, draft=llm).timings.drafted > 0


def test_what_cannot_guess(llm: LLM, tmp_path: Path) -> None:
    for draft in ("look", 5, llm.model):
        with pytest.raises(ValueError, match="^draft: expected 'lookup', an LLM or None, found "):
            llm.stream("ab", draft=draft)  # type: ignore[arg-type]
    other = ruvllm.load(cases.write_directory(tmp_path / "tiny"))
    with pytest.raises(ValueError, match="^draft: expected a model of the same vocabulary, found LLM"):
        llm.stream("ab", draft=other)
    with llm.trace() as trace:
        trace.keep("embed")
        with pytest.raises(ValueError, match="^draft: rejected tokens would be recorded too"):
            llm.generate("ab", draft="lookup")
        llm.generate("ab", max_tokens=2)


def greedy(llm: LLM, ids: list[int], count: int) -> list[int]:
    """The argmax loop, each time from the whole text."""
    made: list[int] = []
    while len(made) < count:
        made.append(int(llm.logits([*ids, *made], last_only=True).argmax()))
    return made


def test_greedy_answers_are_the_argmax_loop(llm: LLM) -> None:
    ids = llm.tokenizer.encode("once")
    answer = llm.generate("once", max_tokens=25)
    assert answer.ids == greedy(llm, ids, 25)
    assert answer.text == str(answer) == llm.tokenizer.decode(answer.ids)
    assert answer.finish_reason == "length" and answer.logprobs is None
    times = answer.timings
    assert (times.prompt_tokens, times.reused_tokens, times.tokens) == (4, 0, 25)
    assert times.prompt_seconds > 0 and times.seconds > 0
    assert times.tokens_per_second == pytest.approx(24 / times.seconds)
    assert llm.generate(ids, max_tokens=25).ids == llm.generate(np.array(ids), max_tokens=25).ids == answer.ids


def test_the_end_token_ends_the_answer_and_is_no_part_of_it(saying: Any) -> None:
    answer = saying([*b"so", cases.END, *b"more"]).generate("x")
    assert (answer.text, answer.ids, answer.finish_reason) == ("so", list(b"so"), "stop")
    assert answer.timings.tokens == 3


def test_seeds(llm: LLM) -> None:
    texts = [llm.generate("dice", max_tokens=30, temperature=1.5, seed=seed).ids for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    fresh = [llm.generate("dice", max_tokens=30, temperature=5.0, seed=None).ids for _ in range(2)]
    assert fresh[0] != fresh[1]


def test_log_probabilities(llm: LLM) -> None:
    answer = llm.generate("odds", max_tokens=6, logprobs=3)
    assert answer.logprobs is not None and len(answer.logprobs) == len(answer.ids) == 6
    ids = llm.tokenizer.encode("odds")
    for n, (token, (logprob, top)) in enumerate(zip(answer.ids, answer.logprobs, strict=True)):
        row = llm.logits([*ids, *answer.ids[:n]], last_only=True).astype(np.float64)
        row -= row.max() + math.log(np.exp(row - row.max()).sum())
        assert logprob == pytest.approx(row[token], abs=1e-4)
        assert [i for i, _ in top] == np.argsort(-row)[:3].tolist()
        assert top[0][0] == token and top[0][1] == pytest.approx(logprob, abs=1e-5)


def test_a_cache_is_used_again(llm: LLM) -> None:
    """The second turn computes what is new of it alone, and says what it would have said from nothing."""
    cache = llm.new_cache(100)
    first = llm.generate("turn one", cache=cache, max_tokens=8)
    assert first.timings.reused_tokens == 0
    longer = [*llm.tokenizer.encode("turn one"), *first.ids, *b" and two"]
    second = llm.generate(longer, cache=cache, max_tokens=8)
    assert second.timings.reused_tokens == 8 + 8 - 1  # the last token of an answer was never computed
    assert second.ids == llm.generate(longer, max_tokens=8).ids
    # Another beginning: what differs is forgotten.
    assert llm.generate("turn 2", cache=cache, max_tokens=8).timings.reused_tokens == len("turn ")
    np.testing.assert_array_equal(cache.ids[: len("turn 2")], list(b"turn 2"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: expected a positive integer or None, found 0"),
        ({"max_tokens": 1.5}, "max_tokens: expected a positive integer or None, found 1.5"),
        ({"stop": ""}, "stop: expected non-empty strings"),
        ({"stop": ["a", 3]}, "stop: expected non-empty strings"),
        ({"logprobs": -1}, "logprobs: expected 0 to 260, found -1"),
        ({"logprobs": 261}, "logprobs: expected 0 to 260, found 261"),
        ({"temperature": math.nan}, "temperature: expected a finite number >= 0, found nan"),
        ({"top_p": 0.0}, "top_p: expected a number above 0 and at most 1, found 0.0"),
    ],
)
def test_options_are_refused_by_name(llm: LLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        llm.stream("x", **options)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", ValueError, "prompt: expected at least one token id, found none"),
        ([], ValueError, "prompt: expected at least one token id, found none"),
        ([1, 260], ValueError, "prompt: expected token ids from 0 to 259, found 260"),
        ([-1], ValueError, "prompt: expected token ids from 0 to 259, found -1"),
        ([1.5, 2.0], TypeError, "prompt: expected integers, found float64"),
        (np.ones((2, 2), np.int64), ValueError, "prompt: expected 1 dimensions"),
        (b"bytes", TypeError, "prompt: expected text, token ids or messages, found b'bytes'"),
        (None, TypeError, "prompt: expected text, token ids or messages, found None"),
        (["one", "two"], TypeError, "prompt: expected one text, found several"),
        ("\ud800", ValueError, "text: found the lone surrogate"),
    ],
)
def test_prompts_that_are_none(llm: LLM, prompt: Any, error: type[Exception], message: str) -> None:
    cache = llm.new_cache(20)
    llm.logits([1, 2, 3], cache)
    with pytest.raises(error, match=f"^{message}"):
        llm.stream(prompt, cache=cache)
    assert len(cache) == 3


def test_python_threads_on_one_model_say_what_one_says(llm: LLM) -> None:
    def answers() -> list[list[int]]:
        return [llm.generate(f"number {n}", max_tokens=40, temperature=1.0, seed=n).ids for n in range(3)]

    expected = answers()
    found: list[list[list[int]]] = []
    threads = [threading.Thread(target=lambda: found.append(answers())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected, expected]


def test_numbers_of_numpy_are_taken_and_truth_values_are_not(llm: LLM) -> None:
    answer = llm.generate("Once", max_tokens=np.int64(3), logprobs=np.int64(2), stop=None)
    assert len(answer.ids) == 3 and answer.logprobs is not None and len(answer.logprobs) == 3
    with pytest.raises(ValueError, match="max_tokens: expected a positive integer or None, found True"):
        llm.generate("Once", max_tokens=True)
