"""A stream that is given up; and what a cache that is given with it may be."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from ruvllm.llm import LLM
from ruvllm.model.kv_cache import KVCache


@pytest.mark.parametrize("draft", [None, "lookup"])
def test_a_stream_that_is_closed_keeps_its_text_and_frees_its_cache(
    llm: LLM, draft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[weakref.ref[KVCache]] = []

    def noted(*given: Any) -> KVCache:
        cache = LLM.new_cache(llm, *given)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(llm, "new_cache", noted)
    whole = llm.generate("the text of", max_tokens=30, draft=draft)
    stream = llm.stream("the text of", max_tokens=30, draft=draft)
    pieces = [next(stream), next(stream)]
    assert caches[-1]() is not None
    stream.close()
    gc.collect()
    assert caches[-1]() is None
    assert not list(stream) and not list(stream.parts())
    result = stream.result
    assert result.finish_reason == "cancelled" and result.text.startswith("".join(pieces))
    assert result.ids == whole.ids[: len(result.ids)] and 2 <= len(result.ids) < 30
    stream.close()
    assert stream.result.finish_reason == "cancelled"


def test_the_end_of_a_block_closes_a_stream(llm: LLM) -> None:
    cache = llm.new_cache(60)
    with llm.stream("once", cache=cache, max_tokens=20) as stream:
        for _ in stream:
            break
    assert stream.result.finish_reason == "cancelled" and len(cache) < 10
    with llm.stream("once", cache=cache, max_tokens=20) as stream:
        text = "".join(stream)
    assert (stream.result.text, stream.result.finish_reason) == (text, "length")
    with llm.stream("once", max_tokens=20) as stream:  # not begun
        pass
    assert (stream.result.text, stream.result.ids, stream.result.finish_reason) == ("", [], "cancelled")
    with pytest.raises(KeyError), llm.stream("once", max_tokens=20) as stream:
        raise KeyError("of the program")
    assert stream.result.finish_reason == "cancelled"


def test_what_a_closed_stream_still_held_is_shown_once(llm: LLM) -> None:
    """Text that might have begun a stop string."""
    alone = llm.generate("once", max_tokens=20)
    stop = alone.text[4:6] + "\0"  # never comes, but begins
    assert alone.text[4:6] not in alone.text[:4]
    with llm.stream("once", max_tokens=20, stop=stop) as stream:
        while len(stream.result.text) < 4:
            next(stream)
    assert alone.text.startswith(stream.result.text)
    stream.close()
    assert alone.text.startswith(stream.result.text)


def test_a_precision_that_the_given_cache_lacks_is_refused(llm: LLM) -> None:
    cache = llm.new_cache(60, "int8")
    wrong: Any
    for wrong in ("f32", "f8", None):
        with pytest.raises(ValueError, match=f"^kv: expected 'auto', or 'int8' as the given .*, found {wrong!r}$"):
            llm.generate("once", cache=cache, kv=wrong)
    assert len(cache) == 0
    expected = llm.generate("once", max_tokens=5, kv="int8").ids
    for kv in ("int8", "auto"):
        assert llm.generate("once", max_tokens=5, cache=cache, kv=kv).ids == expected
    for wrong in ("f8", None):
        for call in (llm.new_cache, llm.answering):
            with pytest.raises(ValueError, match=f"^kv: expected one of auto, f32, f16, int8, found {wrong!r}$"):
                call(kv=wrong)


def test_wrong_paths_and_lengths_of_caches_are_named(llm: LLM, tmp_path: Path) -> None:
    wrong: Any = None
    with pytest.raises(TypeError, match="^path: expected that of a file, found None$"):
        llm.load_cache(wrong)
    cache = llm.new_cache(20)
    with pytest.raises(ValueError, match="^cache: it is empty, there is nothing to save$"):
        cache.save(tmp_path / "a.kv")
    llm.logits([1, 2, 3, 4], cache)
    with pytest.raises(TypeError, match="^path: expected that of a file, found None$"):
        cache.save(wrong)
    for wrong in (True, None, 1.0):
        with pytest.raises(ValueError, match=f"^length: expected 0 to 4, found {wrong}$"):
            cache.truncate(wrong)
    wrong = "3"
    with pytest.raises(ValueError, match="^length: expected 0 to 4, found '3'$"):
        cache.truncate(wrong)
    cache.save(tmp_path / "a.kv")
    with pytest.raises(ValueError, match="^max_tokens: expected an integer or None, found '3'$"):
        llm.load_cache(tmp_path / "a.kv", wrong)
    cache.clear()
    with pytest.raises(ValueError, match="^cache: it is empty, there is nothing to save$"):
        cache.save(tmp_path / "a.kv")
    assert len(llm.load_cache(tmp_path / "a.kv")) == 4
