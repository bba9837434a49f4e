"""SentencePiece BPE from pieces and their scores, for the `tokenizers` library.

SentencePiece repeatedly merges the two neighbours whose concatenation is the piece of the highest score; of equal
scores the leftmost pair. `tokenizers` merges the pair of the lowest rank, of equal pairs the leftmost. The two agree
when every way to cut a piece into two pieces becomes a pair, ranked by the score of the whole, and when no two pairs of
the same score can compete for one symbol: then the vocabulary becomes a list of merges. Where they can (Baichuan's), no
list says who wins: `ScoredPieces` merges them by the definition, and the library gets the finished pieces. Source:
`bpe_model.cc` of SentencePiece, `merge_all` of tokenizers.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping
from functools import lru_cache
from itertools import groupby
from typing import Any

from ruvllm.errors import ModelFormatError

Pair = tuple[str, str]

_MOST_CUT = 1 << 27  # characters of all pieces cut everywhere; the largest vocabularies come to 2^24
_CACHED_LENGTH = 48  # of a stretch of text whose pieces are cached


def merges_from_scores(path: str, scored: Mapping[str, float]) -> list[Pair] | None:
    """The pairs that SentencePiece would merge, highest score first; None if no ranking gives its results.

    That is where two pieces of equal score compete for the same symbols. One such case does have a ranking and is real
    (LLaMA-2, Mistral): runs of one character. Or where a piece would be joined from a character that is no piece, which
    `tokenizers` has no symbol for.

    Args:
        path: the model file, for error messages.
        scored: the pieces that text may become (no control, unknown or byte pieces) with their scores.

    Raises:
        ModelFormatError: the pieces are so long that cutting them would take minutes.
    """
    cost = sum(len(piece) ** 2 for piece in scored)
    if cost > _MOST_CUT:
        longest = max(map(len, scored))
        raise ModelFormatError(
            path, field="tokenizer.ggml.tokens", found=f"pieces of up to {longest} characters",
            expected=f"a sum of squared lengths up to {_MOST_CUT}",
        )  # fmt: skip
    if _lacks_characters(scored):
        return None
    cuts = {piece: _cuts(piece, scored) for piece in scored if len(piece) > 1}
    ordered = sorted((piece for piece in cuts if cuts[piece]), key=scored.__getitem__, reverse=True)
    merges: list[Pair] = []
    for _, tied in groupby(ordered, scored.__getitem__):
        group = list(tied)
        if len(group) > 1:
            if _are_runs(group, scored):
                group.sort(key=len, reverse=True)
            elif _compete(group, cuts):
                return None
        for piece in group:
            merges += cuts[piece]
    return merges


def _cuts(piece: str, known: Mapping[str, float]) -> list[Pair]:
    """All ways to cut a piece into two known ones.

    Two of them could compete only for neighbours x, y, z with x + y == y + z == piece. Joining from the left does not
    lead there: random vocabularies (see the tests) give the same pieces whatever the order of these cuts.
    """
    return [(piece[:n], piece[n:]) for n in range(1, len(piece)) if piece[:n] in known and piece[n:] in known]


def _are_runs(group: list[str], known: Mapping[str, float]) -> bool:
    """Whether the pieces are "xx" and longer runs of one character x, which is itself a piece.

    Before the first of them is made the text holds that character only one by one. From then on the leftmost run grows
    whenever it can, and the only pair that competes with its growth lies to its right and makes something shorter.
    """
    character = group[0][0]
    return character in known and 2 * character in group and all(piece == character * len(piece) for piece in group)


def _compete(group: list[str], cuts: Mapping[str, list[Pair]]) -> bool:
    """Whether one symbol may be the right part of one of these pieces and the left part of another."""
    right_parts = {right for piece in group for _, right in cuts[piece]}
    return any(left in right_parts for piece in group for left, _ in cuts[piece])


def _lacks_characters(known: Mapping[str, float]) -> bool:
    """Whether a piece can be joined from a character that is no piece."""
    characters = {piece for piece in known if len(piece) == 1}
    return any(
        all(part in known or len(part) == 1 for part in (piece[:n], piece[n:]))
        for piece in known
        if not characters.issuperset(piece)
        for n in range(1, len(piece))
    )


class ScoredPieces:
    """A pre-tokenizer of the `tokenizers` library whose words are the pieces that SentencePiece makes of a text.

    Args:
        scored: the pieces that text may become, with their scores.
        vocabulary: all tokens; the library takes a word that is spelt like one of them for it.
    """

    def __init__(self, scored: Mapping[str, float], vocabulary: Collection[str]) -> None:
        self._scores = dict(scored)
        self._vocabulary = vocabulary
        # Only characters that are neighbours in some piece can be merged: text is cut everywhere else beforehand.
        self._neighbours = {piece[n : n + 2] for piece in scored for n in range(len(piece) - 1)}
        self._kept = lru_cache(maxsize=1 << 16)(self._joined)

    def pre_tokenize(self, text: Any) -> None:
        """Called by the library."""
        from tokenizers import NormalizedString

        text.split(lambda _, part: [NormalizedString(word) for word in self.words(str(part))])

    def words(self, text: str) -> list[str]:
        """The pieces of a text. A run of characters that are none is one word, for one unknown token."""
        words: list[str] = []
        unknown = ""
        start = 0
        for end in range(1, len(text) + 1):
            if end < len(text) and text[end - 1 : end + 1] in self._neighbours:
                continue
            stretch = text[start:end]
            start = end
            for piece in self._kept(stretch) if len(stretch) <= _CACHED_LENGTH else self._joined(stretch):
                if piece not in self._scores:
                    unknown += piece
                    continue
                words += self._run(unknown)
                unknown = ""
                words.append(piece)
        return words + self._run(unknown)

    def _run(self, unknown: str) -> list[str]:
        if unknown in self._vocabulary:  # such as a control token, which text must not become
            return list(unknown)
        return [unknown] if unknown else []

    def _joined(self, text: str) -> tuple[str, ...]:
        """The highest score first, of equal ones the leftmost."""
        parts = list(text)
        after = [*range(1, len(parts)), -1]
        before = [*range(-1, len(parts) - 1)]
        queue: list[tuple[float, int, str]] = []

        def offer(left: int) -> None:
            if left >= 0 and after[left] >= 0:
                piece = parts[left] + parts[after[left]]
                if piece in self._scores:
                    heapq.heappush(queue, (-self._scores[piece], left, piece))

        for left in range(len(parts)):
            offer(left)
        while queue:
            _, left, piece = heapq.heappop(queue)
            right = after[left]
            if not parts[left] or right < 0 or parts[left] + parts[right] != piece:  # joined with others since
                continue
            parts[left], parts[right] = piece, ""
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
            offer(before[left])
            offer(left)
        return tuple(part for part in parts if part)
