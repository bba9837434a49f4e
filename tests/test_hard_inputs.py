"""Odd arguments of a whole model: each is refused by its name, and the cache in use goes on being used."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ruvllm.errors import ContextFullError
from ruvllm.llm import LLM
from ruvllm.model import KVCache, Llama
from tests import llm_cases
from tests.llm_cases import CONFIG

IDS: list[Any] = [
    [], [[1]], [1.5], ["a"], "abc", [True], None, 5, [1 << 70], [-1], [CONFIG.vocab_size], np.array([2**63], np.uint64),
    {1, 2}, b"ab", [None], np.zeros(0, np.int64), np.array(["2020"], "M8[D]"), [[1], [1, 2]],
]  # fmt: skip
OPTIONS: dict[str, tuple[Any, ...]] = {
    "max_tokens": (0, -1, 1.5, "3"), "temperature": ("x", None, -1, math.nan, math.inf, 10**400),
    "top_k": (-1, 1.5, None, "x"), "top_p": (0, 1.1, None, math.nan), "min_p": (-1, 2, None, math.nan),
    "repetition_penalty": (0, -1, math.inf, None), "seed": (-1, 1.5, "x"), "stop": (5, [None], [""], [5], b"x"),
    "logprobs": (-1, 1.5, None, CONFIG.vocab_size + 1), "cache": (5, "x", CONFIG), "kv": ("f64", None, ["f32"]),
    "presence_penalty": ("x", None, math.inf), "frequency_penalty": (math.nan, None), "repeat_last_n": (-2, 1.5, None),
    "typical_p": (0, 1.1, None), "dry": (-1, "x", math.nan), "xtc": (2, "x", (1, 2, 3)), "mirostat": (3, "x", 1.5),
    "logit_bias": ([1], {"a": 1}, {CONFIG.vocab_size: 1}, {1: None}), "logits_processors": (5, [5], "x", None),
}  # fmt: skip


def named(*names: str) -> str:
    return rf"^({'|'.join(names)})(\[\d+\])?(\['\w+'\])?: "


@pytest.mark.parametrize("ids", IDS, ids=repr)
def test_ids_and_options_of_a_model(llm: LLM, ids: Any) -> None:
    cache = llm.new_cache(20)
    before = llm.logits([1, 2, 3], cache)
    with pytest.raises((TypeError, ValueError), match=named("ids")):
        llm.logits(ids, cache)
    with pytest.raises((TypeError, ValueError), match=named("ids")):
        llm.logits(ids)
    if not isinstance(ids, str):  # text, which is a prompt
        with pytest.raises((TypeError, ValueError), match=named("prompt")):
            llm.generate(ids, max_tokens=1)
    assert len(cache) == 3
    cache.truncate(0)
    np.testing.assert_array_equal(llm.logits([1, 2, 3], cache), before)


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_generate(llm: LLM, option: str) -> None:
    for value in OPTIONS[option]:
        with pytest.raises((TypeError, ValueError), match=named(option, "penalty")):
            llm.generate("ab", **{"max_tokens": 2, option: value})
    with pytest.raises(TypeError, match="unexpected keyword"):
        llm.generate("ab", no_such_option=1)


@pytest.mark.parametrize("fused", [True, False])
def test_a_full_cache_goes_on(llm: LLM, fused: bool) -> None:
    model = Llama(CONFIG, threads=1, seed=3)
    model.fused = fused
    cache = model.new_cache(10)
    ids = list(range(10, 20))
    model.forward(ids[:8], cache)
    held = [array for layer in range(CONFIG.num_hidden_layers) for array in cache.layer(layer)]
    for _ in range(2):
        with pytest.raises(ContextFullError, match="^context full: 3 more tokens do not fit, 8 of 10 are taken$"):
            model.forward([1, 2, 3], cache)
    after = [array for layer in range(CONFIG.num_hidden_layers) for array in cache.layer(layer)]
    for array, before in zip(after, held, strict=True):
        np.testing.assert_array_equal(array, before)
    last = model.forward(ids[8:], cache)
    np.testing.assert_array_equal(last, model.forward(ids, model.new_cache(10))[8:])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("change", [{"num_hidden_layers": 1}, {"num_key_value_heads": 1}, {"head_dim": 8}], ids=str)
def test_a_cache_of_a_model_of_other_sizes(llm: LLM, change: dict[str, Any], fused: bool) -> None:
    """Its buffers are of other sizes: what was written there would be other memory."""
    model = Llama(CONFIG, threads=1, seed=3)
    model.fused = fused
    cache = KVCache(dataclasses.replace(CONFIG, **change), 64)
    with pytest.raises(ValueError, match=rf"^cache: it was made for a model with {next(iter(change))} = "):
        model.forward([1, 2, 3], cache)
    with pytest.raises(ValueError, match="^cache: "):
        llm.generate("abc", cache=cache)
    assert len(cache) == 0


def test_a_cache_of_another_model_of_the_same_sizes() -> None:
    """What it holds means nothing there, and the working memory beside it knows the other model's weights."""
    first, second = (Llama(CONFIG, threads=1, seed=seed) for seed in (3, 4))
    wide = Llama(dataclasses.replace(CONFIG, hidden_size=96, intermediate_size=200), threads=1, seed=5)
    cache = first.new_cache(16)
    expected = {model: model.forward([1, 2, 3], model.new_cache(16)) for model in (first, second, wide)}
    for model in (first, second, wide, first):
        if len(cache):
            with pytest.raises(ValueError, match="^cache: it holds tokens of another model"):
                model.forward([1, 2, 3], cache)
        cache.clear()
        np.testing.assert_array_equal(model.forward([1, 2, 3], cache), expected[model])
        cache.truncate(2)
        np.testing.assert_array_equal(model.forward([3], cache), expected[model][2:])


def test_nan_logits_are_said(tmp_path: Path) -> None:
    broken = llm_cases.byte_llm(tmp_path, threads=1)
    broken.model.decoder.norm[:] = np.nan
    for options in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}, {"logprobs": 2}):
        with pytest.raises(ValueError, match="^(logits|x): .*NaN"):
            broken.generate("ab", max_tokens=2, **options)


def test_more_threads_than_there_are() -> None:
    model = Llama(CONFIG, threads=1 << 40, seed=3)
    expected = Llama(CONFIG, threads=1, seed=3).forward([1, 2, 3], KVCache(CONFIG, 8))
    np.testing.assert_array_equal(model.forward([1, 2, 3], model.new_cache(8)), expected)


WRONG_CALLS: tuple[Callable[[LLM], object], ...] = (
    lambda llm: llm.new_cache(0), lambda llm: llm.new_cache(1.5), lambda llm: llm.new_cache(8, kv="f99"),  # type: ignore[arg-type]
    lambda llm: llm.new_cache(8).truncate(1), lambda llm: llm.new_cache(8).truncate("x"),  # type: ignore[arg-type]
    lambda llm: llm.perplexity("hello " * 20, context=0), lambda llm: llm.perplexity([10**6] * 99, context=16),
    lambda llm: llm.perplexity(None), lambda llm: llm.tokenizer.decode([CONFIG.vocab_size]),  # type: ignore[arg-type]
    lambda llm: llm.model.forward([1], llm.new_cache(2), out=np.empty((1, 3), np.float32)),
    lambda llm: Llama(CONFIG, threads=0), lambda llm: Llama(CONFIG, layout="f8"),
)  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG_CALLS)))
def test_other_calls(llm: LLM, number: int) -> None:
    pattern = named("max_tokens", "kv", "length", "context", "ids", "token id", "out", "threads", "weights", "text")
    with pytest.raises((TypeError, ValueError), match=pattern):
        WRONG_CALLS[number](llm)
