"""A model with a vocabulary of bytes, which may be told what to say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ruvllm.llm import LLM
from ruvllm.model.generate import Token


@pytest.fixture
def saying(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Any:
    """saying(text): the model now says the bytes of this text, or these ids, one token each, whatever it is asked."""

    def say(what: str | bytes | list[int]) -> LLM:
        ids = list(what.encode() if isinstance(what, str) else what)

        def scripted(model: Any, cache: Any, prompt: Any, sampling: Any, count: int, logprobs: int) -> Iterator[Token]:
            yield from map(Token, ids[:count])

        monkeypatch.setattr("ruvllm.llm.generate", scripted)
        return llm

    return say
