"""Fit a vocabulary to the rows of a model's embedding: in published models the two often differ.

Many embeddings are padded to a round number of rows; many tokenizers got a `<pad>` without a row in the embedding.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace

from ruvllm.checkpoint.tokenizer.vocabulary import Kind, Vocabulary, errors_of_the_library, ids_of_kind
from ruvllm.errors import ModelFormatError, printable

logger = logging.getLogger(__name__)


def with_rows(vocabulary: Vocabulary, rows: int, path: str) -> Vocabulary:
    """The vocabulary with as many ids as the embedding has rows: more, without text; or fewer, without added tokens.

    Raises: ModelFormatError if tokens without a row are needed.
    """
    missing = rows - len(vocabulary.pieces)
    if missing < 0:
        return _within(vocabulary, rows, path)
    pieces, kinds = [*vocabulary.pieces, *[None] * missing], vocabulary.kinds + bytes([Kind.UNUSED]) * missing
    return replace(vocabulary, pieces=pieces, kinds=kinds)


def _within(vocabulary: Vocabulary, rows: int, path: str) -> Vocabulary:
    """The vocabulary without its added tokens from ``rows`` on. Raises: ModelFormatError if other tokens are there."""
    surplus = {i: piece for i, piece in enumerate(vocabulary.pieces) if i >= rows and piece is not None}
    added = ids_of_kind(vocabulary.kinds, Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)
    ends = tuple(i for i in vocabulary.eos_ids if i < rows)
    needed = {*vocabulary.prefix, *vocabulary.suffix, *(() if ends else vocabulary.eos_ids)}
    if not surplus.keys() <= set(added) - needed:
        expected = f"at most {rows}, the rows of the embedding"
        raise ModelFormatError(path, field="tokenizer", found=f"{len(vocabulary.pieces)} tokens", expected=expected)
    spelt = ", ".join(map(printable, [*surplus.values()][:8]))
    more = ", ..." if len(surplus) > 8 else ""
    logger.warning("%s: no row of the embedding for %s%s: left out", path, spelt, more)
    from tokenizers import Tokenizer as Engine

    state = json.loads(vocabulary.engine.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < rows]
    state["model"]["vocab"] = {piece: i for piece, i in state["model"]["vocab"].items() if i < rows}
    if state["model"]["unk_token"] in surplus.values():
        state["model"]["unk_token"] = None
    with errors_of_the_library(path):
        engine = Engine.from_str(json.dumps(state))
    return replace(
        vocabulary,
        engine=engine,
        pieces=vocabulary.pieces[:rows],
        kinds=vocabulary.kinds[:rows],
        bos_id=None if vocabulary.bos_id in surplus else vocabulary.bos_id,
        eos_ids=ends,
        names={name: piece for name, piece in vocabulary.names.items() if piece not in surplus.values()},
    )
