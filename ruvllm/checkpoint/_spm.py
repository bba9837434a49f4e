"""SentencePiece vocabularies as merge lists: pieces and their scores become ranked pairs for the `tokenizers` library.

SentencePiece BPE joins, again and again, the two neighbours whose concatenation is the piece of the highest score; of
equal scores the leftmost pair. `tokenizers` joins the pair of the lowest rank, of equal pairs the leftmost. The two
agree when every way to cut a piece into two pieces becomes a pair, ranked by the score of the whole, and when no two
pairs of the same score can compete for one symbol. Source: `bpe_model.cc` of SentencePiece, `merge_all` of tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from ruvllm.errors import ModelFormatError

Pair = tuple[str, str]


def merges_from_scores(path: str, scored: Iterable[tuple[str, float]]) -> list[Pair]:
    """The pairs that SentencePiece would join, most urgent first.

    Args:
        path: the model file, for error messages.
        scored: the pieces that text may become (no control, unknown or byte pieces) with their scores, each piece once.

    Raises:
        ModelFormatError: two pieces of equal score compete for the same symbols, so that no ranking says who wins.
            One such case does have a ranking and is real (LLaMA-2, Mistral): runs of one character. Or a piece would
            be joined from a character that is no piece, which `tokenizers` has no symbol for.
    """
    known = dict(scored)
    _require_characters(path, known)
    cuts = {piece: _cuts(piece, known) for piece in known if len(piece) > 1}
    ordered = sorted((piece for piece in cuts if cuts[piece]), key=known.__getitem__, reverse=True)
    merges: list[Pair] = []
    for score, tied in groupby(ordered, known.__getitem__):
        group = list(tied)
        if len(group) > 1:
            if _are_runs(group, known):
                group.sort(key=len, reverse=True)
            else:
                _refuse_competition(path, group, cuts, score)
        for piece in group:
            merges += cuts[piece]
    return merges


def _cuts(piece: str, known: dict[str, float]) -> list[Pair]:
    """All ways to cut a piece into two known ones.

    Two of them could compete only for neighbours x, y, z with x + y == y + z == piece. Joining from the left does not
    lead there: random vocabularies (see the tests) give the same pieces whatever the order of these cuts.
    """
    return [(piece[:n], piece[n:]) for n in range(1, len(piece)) if piece[:n] in known and piece[n:] in known]


def _are_runs(group: list[str], known: dict[str, float]) -> bool:
    """Whether the pieces are "xx" and longer runs of one character x, which is itself a piece.

    Before the first of them is made the text holds that character only one by one. From then on the leftmost run grows
    whenever it can, and the only pair that competes with its growth lies to its right and makes something shorter.
    """
    character = group[0][0]
    return character in known and 2 * character in group and all(piece == character * len(piece) for piece in group)


def _refuse_competition(path: str, group: list[str], cuts: dict[str, list[Pair]], score: float) -> None:
    right_parts = {right: piece for piece in group for _, right in cuts[piece]}
    for piece in group:
        for left, _ in cuts[piece]:
            if left in right_parts:
                raise ModelFormatError(
                    path,
                    field="tokenizer.ggml.scores",
                    found=f"{score} for both {right_parts[left]!r} and {piece!r}",
                    expected="different scores for pieces that overlap",
                )


def _require_characters(path: str, known: dict[str, float]) -> None:
    for piece in known:
        if len(piece) > 1 and not all(character in known for character in piece):
            for n in range(1, len(piece)):
                parts = piece[:n], piece[n:]
                if all(part in known or len(part) == 1 for part in parts):
                    missing = next(part for part in parts if part not in known)
                    raise ModelFormatError(
                        path,
                        field="tokenizer.ggml.tokens",
                        found=f"{piece!r} without {missing!r}",
                        expected="each character of a piece as a piece",
                    )
