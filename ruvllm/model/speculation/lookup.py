"""Lookup: guesses that the text continues as it did after an earlier occurrence of the same tokens."""

from __future__ import annotations

import numpy as np

_SHORTEST = 2  # tokens that must be alike
_LONGEST = 13  # tokens compared at the most
_CANDIDATES = 16  # occurrences compared at the most, the latest first


class Lookup:
    """Finds where the last tokens occurred before, and guesses that the same tokens follow.

    The level of a guess is the number of tokens before it that are alike in both, less two.
    """

    guess_seconds = 0.0
    expected = 0.25, 0.9  # chances of guesses of the lowest and the highest level, before any is tried

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}  # where each pair of tokens ends

    def levels(self, ids: np.ndarray, most: int) -> list[int]:
        """The levels of up to ``most`` guesses after ids (n,), which continue those of the last call."""
        self._take(ids)
        self._at, alike = self._occurrence()
        return [alike - _SHORTEST + i for i in range(most)] if alike else []

    def guesses(self, count: int) -> list[int]:
        """The first ``count`` guesses after the ids of the last call of ``levels``."""
        period = len(self._ids) - self._at  # a guess may be needed for one behind it
        return [self._ids[self._at + i % period] for i in range(count)]

    def _take(self, ids: np.ndarray) -> None:
        """Index the new tokens; the last pair is looked for, and indexed only when there is one behind it."""
        known = len(self._ids)
        self._ids += ids[known:].tolist()
        for end in range(max(known, _SHORTEST), len(self._ids)):
            self._ends.setdefault(tuple(self._ids[end - _SHORTEST : end]), []).append(end)

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
