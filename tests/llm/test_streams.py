"""LLM.stream: pieces of whole characters, stop strings, and caches that something else uses meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ruvllm.llm import LLM
from tests import llm_cases as cases


@pytest.mark.parametrize("draft", [None, "lookup"])
@pytest.mark.parametrize("change", ["before", "generate", "logits", "truncate", "clear", "stream"])
def test_a_stream_ends_where_something_else_uses_its_cache(llm: LLM, change: str, draft: Any) -> None:
    """It would continue another text. A fork continues this one."""
    expected = llm.generate("once", max_tokens=12).ids
    cache = llm.new_cache(60)
    stream = llm.stream("once", cache=cache, max_tokens=12, draft=draft)
    if change != "before":
        next(stream)
    fork = cache.fork()
    other: dict[str, Callable[[], Any]] = {
        "before": lambda: llm.generate("two", cache=cache, max_tokens=1),
        "generate": lambda: llm.generate("two", cache=cache, max_tokens=1),
        "logits": lambda: llm.logits([1], cache),
        "truncate": lambda: cache.truncate(1),
        "clear": cache.clear,
        "stream": lambda: next(llm.stream("onto", cache=cache)),
    }
    other[change]()
    with pytest.raises(RuntimeError, match="^cache: something else has used it since this stream's last token"):
        list(stream)
    assert llm.generate("once", cache=fork, max_tokens=12).ids == expected


def test_streams_of_forks_are_read_by_turns(llm: LLM) -> None:
    cache = llm.new_cache(60)
    llm.logits(llm.tokenizer.encode("once upon"), cache)
    prompts = "once upon a", "once upon the"
    pairs = zip(*(llm.stream(text, cache=cache.fork(), max_tokens=9) for text in prompts), strict=False)
    first, second = zip(*pairs, strict=True)
    for text, pieces in zip(prompts, (first, second), strict=True):
        whole = llm.generate(text, max_tokens=9).text
        assert whole.startswith("".join(pieces)) and pieces


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("END", "one two "),
        (["two", "one"], ""),
        (["wo ", "two "], "one "),
        (["zzz", "o E"], "one tw"),
        (["D tE", "ND t"], "one two E"),
        (["éx", "é"], "one two END thr"),
        ([], "one two END thrée"),
        (["eX", "e!"], "one two END thrée"),
    ],
)
def test_stop_strings(saying: Any, stop: Any, expected: str) -> None:
    """The text ends before the first of them, however it was cut into tokens, and no piece ever shows a part of one."""
    llm = saying("one two END thrée")
    answer = llm.generate("x", stop=stop, max_tokens=100)
    assert answer.text == expected
    assert answer.finish_reason == ("length" if expected.endswith("ée") else "stop")
    shown = ""
    for piece in llm.stream("x", stop=stop, max_tokens=100):
        assert piece
        shown += piece
        assert expected.startswith(shown)
    assert shown == expected


def test_a_stream_is_the_answer_in_whole_characters(saying: Any) -> None:
    text = "naïve 日本 👩‍👩‍👧 e\u0301"
    llm = saying(text)
    pieces = list(llm.stream("x", max_tokens=100))
    assert "".join(pieces) == text == llm.generate("x", max_tokens=100).text
    assert pieces == list(text)  # a character comes when its last byte has come, not before and not in part
    cut = saying("a日".encode()[:3])
    assert list(cut.stream("x")) == ["a", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize(
    ("ids", "stop", "text", "reason"),
    [
        ([*b"a", 0xE6, 0x97, cases.END], (), "a\N{REPLACEMENT CHARACTER}", "stop"),
        ([0xF0, cases.END], (), "\N{REPLACEMENT CHARACTER}", "stop"),
        ([*b"ab", 0xF0, 0x9F, cases.END], "abc", "ab\N{REPLACEMENT CHARACTER}", "stop"),  # "ab" was held back
        ([*b"a", 0xC3], "\N{REPLACEMENT CHARACTER}", "a", "stop"),
        ([*b"a|b", 0xF0, cases.END], "|", "a", "stop"),
    ],
)
def test_bytes_of_a_character_that_is_not_finished_are_shown_as_by_decode(
    saying: Any, ids: list[int], stop: Any, text: str, reason: str
) -> None:
    llm = saying(ids)
    answer = llm.generate("x", stop=stop)
    assert (answer.text, answer.finish_reason) == (text, reason)
    assert "".join(llm.stream("x", stop=stop)) == text
    if not stop:
        assert text == llm.tokenizer.decode(answer.ids)


def test_stop_strings_that_the_files_of_a_model_name(saying: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = saying("one two END three")
    monkeypatch.setattr(llm.tokenizer, "stop_strings", ("END",))
    assert llm.generate("x").text == "one two "
    assert llm.generate("x", stop="two").text == "one "


def test_a_stream_of_noise_is_the_answer_too(llm: LLM) -> None:
    """Random bytes are mostly no UTF-8; every piece is text all the same."""
    for seed in range(4):
        options: dict[str, Any] = {"max_tokens": 60, "temperature": 3.0, "seed": seed}
        stream = llm.stream("noise", **options)
        assert next(stream) != ""
        shown = stream.result.text + "".join(stream)
        whole = llm.generate("noise", **options)
        assert shown == whole.text == stream.result.text == llm.tokenizer.decode(whole.ids)
        assert whole.text.encode("utf-8").decode("utf-8") == whole.text


def test_an_answer_that_is_left_alone_midway(llm: LLM) -> None:
    cache = llm.new_cache(50)
    stream = llm.stream("left", cache=cache, max_tokens=20)
    next(stream)
    del stream
    assert llm.generate("left", cache=cache, max_tokens=9).ids == llm.generate("left", max_tokens=9).ids
