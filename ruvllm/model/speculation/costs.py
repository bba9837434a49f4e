"""PassCosts and Acceptance: what a longer pass costs, what a guess is worth, and so how many tokens to guess."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_FORGET = 0.97  # weight of a measurement after one more
_USUAL_SLOPE = 0.2  # of a pass of one token, for each token more: until passes are measured
_FEW = 4  # measurements after which one that takes far longer is no longer believed
_FAR = 2.0
_PRIOR_WEIGHT = 2.0  # guesses that the first expectation counts for
_LEVELS = 12
_LAST_GUESSES = 0.97  # weight of a guess after one more of its level
_LAST_TOKENS = 0.998  # after one more pass
_GAIN = 1.03  # expected tokens per second, over those without guesses, that make a guess worthwhile


class PassCosts:
    """Seconds of a pass of n tokens, as a + b n: a fit to the passes that were measured, recent ones weighing more.

    It begins with an expectation of their ratio, which each measurement corrects. One model has one, over all answers.
    """

    def __init__(self) -> None:
        self._normal = np.zeros((2, 2))  # sums of [1, n] [1, n]^T
        self._right = np.zeros(2)  # sums of [1, n] seconds
        self._scale = 0.0  # seconds of one token, if the expected ratio were right
        self._count = 0
        self._fit = np.array([1 - _USUAL_SLOPE, _USUAL_SLOPE])

    def measured(self, n: int, seconds: float) -> None:
        """Take a pass of n tokens into account."""
        if self._count >= _FEW:  # the system had something else to do
            seconds = min(seconds, _FAR * self.of(n))
        self._count += 1
        row = np.array([1.0, n])
        self._normal = _FORGET * self._normal + np.outer(row, row)
        self._right = _FORGET * self._right + row * seconds
        expected = np.array([1 - _USUAL_SLOPE, _USUAL_SLOPE])
        share = max(1 / self._count, 1 - _FORGET)
        self._scale += share * (seconds / float(row @ expected) - self._scale)
        normal, right = self._normal.copy(), self._right.copy()
        for n_expected in (1, 9):  # two passes as expected
            at = np.array([1.0, n_expected])
            normal += np.outer(at, at)
            right += at * self._scale * float(at @ expected)
        self._fit = np.maximum(np.linalg.solve(normal, right), 0.0)

    def of(self, n: int) -> float:
        """Seconds of a pass of n tokens; before any was measured, in passes of one token."""
        return float(self._fit[0] + self._fit[1] * n)


class Acceptance:
    """How often guesses are right, by level: what a drafter knows about a guess before it is tried.

    Old guesses weigh less than new ones, so that a text that changes its ways is followed.
    """

    def __init__(self, first: float, last: float) -> None:
        self._expected = np.linspace(first, last, _LEVELS)
        self._right = np.zeros(_LEVELS)
        self._tried = np.zeros(_LEVELS)

    def of(self, level: int) -> float:
        """The chance that a guess of this level is right, if those before it are."""
        at = min(level, _LEVELS - 1)
        right = self._right[at] + _PRIOR_WEIGHT * self._expected[at]
        return float(right / (self._tried[at] + _PRIOR_WEIGHT))

    def learn(self, levels: Sequence[int], right: int) -> None:
        """Of guesses of these levels the first ``right`` were right, and the one after them was not."""
        for i, level in enumerate(levels[: right + 1]):
            at = min(level, _LEVELS - 1)
            self._right[at] = _LAST_GUESSES * self._right[at] + (i < right)
            self._tried[at] = _LAST_GUESSES * self._tried[at] + 1

    def fade(self) -> None:
        """Forget a little: a level whose guesses were wrong is tried again after some hundred tokens."""
        self._right *= _LAST_TOKENS
        self._tried *= _LAST_TOKENS


def best_length(levels: Sequence[int], acceptance: Acceptance, costs: PassCosts, guess_seconds: float = 0.0) -> int:
    """How many of the guesses to try: the number of most expected tokens per second, 0 if none is worth it."""
    best, best_rate = 0, _GAIN / costs.of(1)
    expected, chance = 1.0, 1.0
    for k, level in enumerate(levels, start=1):
        chance *= acceptance.of(level)
        expected += chance
        rate = expected / (costs.of(k + 1) + k * guess_seconds)
        if rate > best_rate:
            best, best_rate = k, rate
    return best
