"""Text to token ids and back: one Tokenizer for BPE and SentencePiece vocabularies, from GGUF or Hugging Face files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

from ruvllm.checkpoint.tokenizer.gguf import vocabulary_from_metadata
from ruvllm.checkpoint.tokenizer.hf import vocabulary_from_directory
from ruvllm.checkpoint.tokenizer.rows import with_rows
from ruvllm.checkpoint.tokenizer.text import StreamDecoder, Tokenizer
from ruvllm.checkpoint.tokenizer.vocabulary import Kind, Vocabulary

__all__ = ["Kind", "StreamDecoder", "Tokenizer", "Vocabulary", "load_tokenizer"]


class MetadataFile(Protocol):
    """The part of a GGUF file that is used: its path and its metadata."""

    @property
    def path(self) -> str: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...


def load_tokenizer(source: MetadataFile | str | os.PathLike[str], vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a model: an open GGUF file, or the directory of a Hugging Face checkpoint.

    vocab_size: rows of the model's embedding, if known. Ids that the tokenizer has no token for (many embeddings are
    padded to a round number of rows) have no text. Added tokens without a row (a ``<pad>``, put in without resizing the
    embedding) are left out, with a warning.

    A model without a tokenizer gets one that raises an error when used for text.

    Raises:
        ModelFormatError: the vocabulary is damaged, or of a kind that is not supported (which is named), or has more
            tokens than ``vocab_size``.
    """
    path: str = os.fspath(source) if isinstance(source, str | os.PathLike) else source.path
    vocabulary = _vocabulary(source)
    if vocab_size is not None:
        vocabulary = with_rows(vocabulary, vocab_size, path)
    return Tokenizer(vocabulary, path)


def _vocabulary(source: MetadataFile | str | os.PathLike[str]) -> Vocabulary:
    if isinstance(source, str | os.PathLike):
        return vocabulary_from_directory(source)
    return vocabulary_from_metadata(source.path, source.metadata)
