"""Perplexity of one text under both engines, with one protocol and the same token ids."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import ruvllm
from benchmarks._files import FETCHED, smollm2
from ruvllm.measure.engines import LlamaCpp

CONTEXT = 512
STANDARD_TEXT = "pydoc"
STANDARD_CHARACTERS = 20_000


@dataclass(frozen=True)
class Comparison:
    """Perplexity of one model file; ``difference`` is relative to llama.cpp's, None where that is missing."""

    model: str
    ruvllm: float
    error: float  # one standard error of it, over the tokens
    llama: float | None
    tokens: int  # scored

    @property
    def difference(self) -> float | None:
        """ruvllm / llama.cpp - 1."""
        return None if self.llama is None else self.ruvllm / self.llama - 1


def read(source: str) -> str:
    """The text of a file; "pydoc": the help topics of this Python, its first 20 000 characters."""
    if source != STANDARD_TEXT:
        return Path(source).read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))[:STANDARD_CHARACTERS]


def sha256(text: str) -> str:
    """Hash of its UTF-8 bytes: two figures are comparable if it is equal."""
    return hashlib.sha256(text.encode()).hexdigest()


def compare(text: str, kinds: list[str], threads: int, llama: LlamaCpp | None) -> Iterator[Comparison]:
    """Windows of 512 tokens, the second half of each scored (see ``ruvllm.model.perplexity``).

    F32: our float32 weights, read from the Q4_1 file, and llama.cpp on that file dequantised, with a float32 KV
    cache. The others: both engines quantised, on the same file, as they run by default.
    """
    for kind in kinds:
        float32 = kind == "F32"
        path, peer = smollm2(FETCHED if float32 else kind, llama), smollm2(kind, llama)
        if path is None:
            continue  # llama.cpp, which converts it, is not installed
        llm = ruvllm.load(path, weights="f32" if float32 else "auto", threads=threads)
        ids = llm.tokenizer.encode(text, add_special=False, parse_special=False)
        own = llm.perplexity(ids, context=CONTEXT)
        other = None
        if llama is not None and peer is not None:
            windows = [ids[lo : lo + CONTEXT] for lo in range(0, len(ids) - CONTEXT + 1, CONTEXT)]
            bos = llm.tokenizer.bos_id if llm.tokenizer.add_bos else None
            losses = llama.call(
                "losses", path=str(peer), threads=threads, windows=windows, first=CONTEXT // 2, bos=bos,
                f32=float32,
            )  # fmt: skip
            other = math.exp(np.mean(losses))
        yield Comparison(kind, own.value, own.error, other, own.tokens)
