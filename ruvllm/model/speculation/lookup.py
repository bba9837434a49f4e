"""Lookup: guesses that the text continues as it did after an earlier occurrence of the same tokens.

An edited text is a copy with changes. So the place that is being copied is followed through them: after a token that
differs, the copy goes on right after the token that it replaced, or where one of the next tokens is met. A token that
was replaced once, such as a name, is expected to be replaced by the same one again.
"""

from __future__ import annotations

import numpy as np

_SHORTEST = 2  # tokens that must be alike
_LONGEST = 13  # the most tokens compared
_CANDIDATES = 16  # the most occurrences compared, the latest first
_TRUST = 2  # as many more tokens must be alike elsewhere to leave the place that is being copied
_NEAR = 8  # tokens of that place among which the copy is looked for after a change
_MOST_CHANGED = 6  # tokens after which the copy is given up


class Lookup:
    """Finds where the last tokens occurred before, and guesses that the same tokens follow.

    The level of a guess is the number of tokens before it that are alike in both, since the last change: 0 right after
    one.
    """

    guess_seconds = 0.0
    expected = 0.25, 0.9  # chances of guesses of the lowest and the highest level, before any is tried

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}  # where each pair of tokens ends
        self._at = 0  # the index of the next token of the place that is being copied; 0: there is none
        self._alike = 0  # tokens copied since the last change
        self._changed = 0  # tokens that differ, up to the last one
        self._replaced = (0, 0)  # by that change, if it is of one token: this token by that one
        self._changes: dict[int, int] = {}  # tokens and what has replaced them

    def levels(self, ids: np.ndarray, most: int) -> list[int]:
        """The levels of up to ``most`` guesses after ids (n,), which continue those of the last call."""
        self._take(ids)
        at, alike = self._occurrence()
        if at and not (self._at and self._alike + _TRUST >= alike):
            self._at, self._alike, self._changed = at, alike, 0
        return [self._alike + i for i in range(most)] if self._at else []

    def guesses(self, count: int) -> list[int]:
        """The first ``count`` guesses after the ids of the last call of ``levels``."""
        period = len(self._ids) - self._at  # a guess may be needed for one behind it
        copied = [self._ids[self._at + i % period] for i in range(count)]
        return [self._changes.get(token, token) for token in copied]

    def _take(self, ids: np.ndarray) -> None:
        """Follow and index the new tokens; the last pair is indexed only when there is one behind it."""
        known = len(self._ids)
        for token in ids[known:].tolist():
            if known and self._at:
                self._follow(token)
            self._ids.append(token)
        for end in range(max(known, _SHORTEST), len(self._ids)):
            self._ends.setdefault(tuple(self._ids[end - _SHORTEST : end]), []).append(end)

    def _follow(self, token: int) -> None:
        """Move on by the next token of the text."""
        text, at = self._ids, self._at
        copied = text[at]
        if token in (copied, self._changes.get(copied)):
            if self._changed == 1:
                self._changes[self._replaced[0]] = self._replaced[1]
            elif not self._changed and token == copied:
                self._changes.pop(copied, None)
            self._at, self._alike, self._changed = at + 1, self._alike + 1, 0
        elif not self._changed:
            self._at, self._alike, self._changed, self._replaced = at + 1, 0, 1, (copied, token)
        elif token in (near := text[at - 1 : at + _NEAR]):
            self._at, self._alike, self._changed = at + near.index(token), 1, 0
        else:
            self._changed += 1
            if self._changed > _MOST_CHANGED:
                self._at = self._changed = 0

    def _occurrence(self) -> tuple[int, int]:
        """The index after the tokens that are most like the last ones, and how many they are; (0, 0): none."""
        text = self._ids
        n = len(text)
        best, longest = 0, 0
        for end in self._ends.get(tuple(text[n - _SHORTEST :]), ())[: -_CANDIDATES - 1 : -1]:
            alike = _SHORTEST
            while alike < min(_LONGEST, end) and text[end - 1 - alike] == text[n - 1 - alike]:
                alike += 1
            if alike > longest:
                best, longest = end, alike
            if alike == _LONGEST:
                break
        return best, longest
