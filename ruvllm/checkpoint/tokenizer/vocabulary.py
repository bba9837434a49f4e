"""A vocabulary as a file describes it: its tokens and their kinds, and which ids begin and end a text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

import numpy as np

from ruvllm.brief import brief
from ruvllm.errors import ModelFormatError


class Kind(IntEnum):
    """The kind of a token; the values are those of GGUF's `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def ids_of_kind(kinds: bytes | bytearray, *wanted: Kind) -> list[int]:
    """The ids of all tokens of these kinds, in order."""
    return np.flatnonzero(np.isin(np.frombuffer(kinds, np.uint8), wanted)).tolist()


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary as its file describes it, and the engine that was built from it.

    Attributes:
        engine: a `tokenizers.Tokenizer` whose added tokens are the control and the user-defined ones.
        pieces: the spelling of each id (None where there is no token).
        kinds: the `Kind` of each id.
        byte_level: pieces are spelt in GPT-2's alphabet of 256 letters; otherwise as SentencePiece does.
        space_prefix: where encoding puts a space before text: nowhere, at the start, or also after each token that was
            cut out of the text.
        prefix, suffix: ids put around a text.
        names: spelling of the tokens that templates know by name (`bos_token`, `eos_token`, ...).
        stop_strings: texts that end a generation.
        chat_template: the one for every chat; None if there is none, or only ``named_templates``.
        named_templates: others, for tools or retrieval, by name.
        missing: why text cannot become ids (``engine`` is then None); None if it can.
    """

    engine: Any
    pieces: Sequence[str | None]
    kinds: bytes
    byte_level: bool
    space_prefix: Literal["never", "first", "each"] = "never"
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    stop_strings: tuple[str, ...] = ()
    chat_template: str | None = None
    named_templates: Mapping[str, str] = field(default_factory=dict)
    missing: str | None = None

    __repr__ = brief


@contextmanager
def errors_of_the_library(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what `tokenizers` raises for damaged files into ModelFormatError: Exceptions, and panics, which are none."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelFormatError(path, field="tokenizer", found=error, expected="a tokenizer that works") from None
