"""Check that a function of the laboratory was given a loaded model."""

from __future__ import annotations

import os

from ruvllm.llm import LLM


def require_loaded(llm: LLM) -> None:
    """Raise TypeError unless this is a loaded model, naming what loads one where it is a path or a name."""
    if isinstance(llm, LLM):
        return
    if isinstance(llm, str | os.PathLike):
        raise TypeError(f"llm: expected a loaded model, found {os.fspath(llm)!r:.200}: load it first: ruvllm.load(...)")
    raise TypeError(f"llm: expected a loaded model, as ruvllm.load returns, found {type(llm).__name__}")
