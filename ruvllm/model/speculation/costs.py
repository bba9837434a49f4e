"""PassCosts and Acceptance: what a longer pass costs, what a guess is worth, and so how many tokens to guess."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_FORGET = 0.97  # weight of a measurement after one more
_SHARE = 0.1  # of the last pass of one token in their mean
_USUAL_LINE = np.array([1.0, 0.2])  # seconds of a pass of n tokens, in passes of one token, until some are measured
_FEW = 4  # measurements after which one that takes far longer is no longer believed
_FAR = 2.0
_PRIOR_WEIGHT = 2.0  # guesses that the first expectation counts for
_LEVELS = 12
_LAST_GUESSES = 0.97  # weight of a guess after one more of its level
_LAST_TOKENS = 0.998  # after one more pass
_GAIN = 1.05  # expected tokens per second, over those without guesses, that make a guess worthwhile


class PassCosts:
    """Seconds of a pass: of one token, which has kernels of its own, and of n > 1, as a + b n.

    Both follow the passes that are measured, recent ones weighing more. The line begins with an expectation of its
    ratio to one token, which each measurement corrects. One model has one PassCosts, over all answers.
    """

    def __init__(self) -> None:
        self._one = 1.0
        self._ones = 0
        self._several = 0
        self._normal = np.zeros((2, 2))  # sums of [1, n] [1, n]^T
        self._right = np.zeros(2)  # sums of [1, n] seconds
        self._line = _USUAL_LINE.copy()

    def measured(self, n: int, seconds: float) -> None:
        """Take a pass of n tokens into account."""
        if (self._ones if n == 1 else self._several) >= _FEW:  # else the system may have had something else to do
            seconds = min(seconds, _FAR * self.of(n))
        if n == 1:
            self._ones += 1
            self._one += max(1 / self._ones, _SHARE) * (seconds - self._one)
        else:
            self._several += 1
            row = np.array([1.0, n])
            self._normal = _FORGET * self._normal + np.outer(row, row)
            self._right = _FORGET * self._right + row * seconds
            if not self._ones:
                self._one = seconds / float(row @ _USUAL_LINE)
        normal, right = self._normal.copy(), self._right.copy()
        for expected in (2, 10):  # two passes as expected
            row = np.array([1.0, expected])
            normal += np.outer(row, row)
            right += row * self._one * float(row @ _USUAL_LINE)
        self._line = np.maximum(np.linalg.solve(normal, right), 0.0)

    def of(self, n: int) -> float:
        """Seconds of a pass of n tokens; before any was measured, in passes of one token."""
        return self._one if n == 1 else float(self._line[0] + self._line[1] * n)


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
