"""PassCosts and Acceptance: what a longer pass costs, what a guess is worth, and so how many tokens to guess.

They are read and updated at every token, so they hold plain Python numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

_FORGET = 0.97  # factor of a measurement's weight with each later one
_SHARE = 0.1  # weight of the last pass of one token in their running mean
_USUAL_START, _USUAL_SLOPE = 1.0, 0.1  # a and b before any measurement, in passes of one token
_FEW = 4  # passes of one token after which one that takes far longer is no longer believed
_FAR = 2.0
_PRIOR_WEIGHT = 2.0  # the first expectation counts as so many guesses
_LEVELS = 12
_LAST_GUESSES = 0.97  # factor of a guess's weight with each later one of its level
_LAST_TOKENS = 0.998  # the same with each later pass
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
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # sums of 1, n, n^2, seconds and n seconds over passes of n > 1 tokens
        self._line: tuple[float, float] | None = (_USUAL_START, _USUAL_SLOPE)  # None: it must be fitted again

    def measured(self, n: int, seconds: float) -> None:
        """Take a pass of n tokens into account."""
        if self._ones >= (_FEW if n == 1 else 1):  # it may have recorded a tape, or waited for another process
            seconds = min(seconds, _FAR * self.of(n))
        if n == 1:
            self._ones += 1
            self._one += max(1 / self._ones, _SHARE) * (seconds - self._one)
        else:
            self._several += 1
            terms = (1.0, n, n * n, seconds, n * seconds)
            self._sums = tuple(_FORGET * x + y for x, y in zip(self._sums, terms, strict=True))  # type: ignore[assignment]
            if not self._ones:
                self._one = seconds / (_USUAL_START + _USUAL_SLOPE * n)
        self._line = None

    def of(self, n: int) -> float:
        """Seconds of a pass of n tokens; before any was measured, in passes of one token."""
        if n == 1:
            return self._one
        start, slope = self._line = self._line or self._fitted()
        return start + slope * n

    def _fitted(self) -> tuple[float, float]:
        """The least-squares line through what was measured and two passes as expected."""
        one, n1, n2, seconds, n_seconds = self._sums
        for n in (2, 10):
            expected = self._one * (_USUAL_START + _USUAL_SLOPE * n)
            one, n1, n2, seconds, n_seconds = one + 1, n1 + n, n2 + n * n, seconds + expected, n_seconds + n * expected
        slope = max((one * n_seconds - n1 * seconds) / (one * n2 - n1 * n1), 0.0)
        return max((seconds - slope * n1) / one, 0.0), slope


class Acceptance:
    """How often guesses are right, by level: what a drafter knows about a guess before it is tried.

    Old guesses weigh less than new ones, because a text may change.

    Args:
        first, last: the chances of the lowest and of the highest level, before any guess.
    """

    def __init__(self, first: float, last: float) -> None:
        self._expected = [first + (last - first) * i / (_LEVELS - 1) for i in range(_LEVELS)]
        self._right = [0.0] * _LEVELS
        self._tried = [0.0] * _LEVELS
        self._when = [0] * _LEVELS  # the pass of the last change
        self._passes = 0

    def of(self, level: int) -> float:
        """The chance that a guess of this level is right, if those before it are."""
        at = self._brought_up_to_date(level)
        right = self._right[at] + _PRIOR_WEIGHT * self._expected[at]
        return right / (self._tried[at] + _PRIOR_WEIGHT)

    def learn(self, levels: Sequence[int], right: int) -> None:
        """Of guesses of these levels the first ``right`` were right, and the one after them was not."""
        for i, level in enumerate(levels[: right + 1]):
            at = self._brought_up_to_date(level)
            self._right[at] = _LAST_GUESSES * self._right[at] + (i < right)
            self._tried[at] = _LAST_GUESSES * self._tried[at] + 1

    def fade(self) -> None:
        """A pass is over. So a level whose guesses were wrong is tried again after a few hundred tokens."""
        self._passes += 1

    def _brought_up_to_date(self, level: int) -> int:
        at = min(level, _LEVELS - 1)
        factor = _LAST_TOKENS ** (self._passes - self._when[at])
        self._right[at] *= factor
        self._tried[at] *= factor
        self._when[at] = self._passes
        return at


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
