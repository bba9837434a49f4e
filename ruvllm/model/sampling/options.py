"""Sampling: the options of how the next token is chosen. Their definitions are llama.cpp's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from ruvllm.brief import short
from ruvllm.model.checks import is_integer, is_number, require

Processor = Callable[[np.ndarray, np.ndarray], np.ndarray | None]


@dataclass(frozen=True)
class Dry:
    """DRY: a penalty on tokens that would go on repeating what was said before.

    A token that would prolong a repeated run of n tokens loses multiplier * base^(n - allowed_length), if n is at
    least allowed_length. A run ends at a breaker: it holds no token in which one of these strings ends.

    last_n: only the last n tokens are searched for repetitions (-1: all).

    Raises:
        ValueError: a value outside its range.
    """

    multiplier: float = 0.8
    base: float = 1.75
    allowed_length: int = 2
    last_n: int = -1
    breakers: tuple[str, ...] = ("\n", ":", '"', "*")

    def __post_init__(self) -> None:
        _require_number("dry: multiplier", self.multiplier, 0, math.inf)
        _require_number("dry: base", self.base, 1, math.inf)
        length, last_n, breakers = self.allowed_length, self.last_n, self.breakers
        require("dry: allowed_length", length, is_integer(length) and length >= 1, "an integer >= 1")
        require("dry: last_n", last_n, is_integer(last_n) and last_n >= -1, "an integer >= -1")
        strings = not isinstance(breakers, str) and all(isinstance(text, str) and text for text in breakers)
        require("dry: breakers", breakers, strings, "non-empty strings")
        object.__setattr__(self, "breakers", tuple(breakers))


@dataclass(frozen=True)
class Xtc:
    """Exclude top choices: with ``probability``, drop all tokens likelier than ``threshold`` but the least of them.

    Raises:
        ValueError: a value outside its range.
    """

    probability: float = 0.5
    threshold: float = 0.1

    def __post_init__(self) -> None:
        _require_number("xtc: probability", self.probability, 0, 1)
        _require_number("xtc: threshold", self.threshold, 0, 1)


@dataclass(frozen=True)
class Mirostat:
    """Mirostat: keep the surprise of the text, in bits a token, near ``tau``.

    version: 2 drops tokens of more surprise than mu; 1 chooses among the k likeliest, k following from mu and Zipf's
    law. mu begins at 2 tau and moves by ``eta`` times the error of each token.

    Raises:
        ValueError: a value outside its range.

    Source: Basu et al. 2021, "Mirostat: A Neural Text Decoding Algorithm that Directly Controls Perplexity".
    """

    version: int = 2
    tau: float = 5.0
    eta: float = 0.1

    def __post_init__(self) -> None:
        require("mirostat: version", self.version, is_integer(self.version) and self.version in (1, 2), "1 or 2")
        _require_number("mirostat: tau", self.tau, 0, math.inf)
        _require_number("mirostat: eta", self.eta, 0, math.inf)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    The steps come in this order: ``logits_processors``, ``logit_bias``, the penalties, ``dry``, ``top_k``,
    ``typical_p``, ``top_p``, ``min_p``, ``xtc``, ``temperature``, each over what the one before has left.

    temperature: 0 takes the most likely token; higher is more varied.
    top_k: keep the k most likely tokens (0: all). top_p: keep the smallest set whose probabilities reach p.
    min_p: drop tokens less likely than min_p times the most likely one.
    repetition_penalty: > 1 makes tokens that already occurred less likely (1: off).
    seed: of the random numbers; None draws a fresh one.
    presence_penalty: taken off the logit of each token that occurred; negative makes it likelier.
    frequency_penalty: taken off it once for each time.
    repeat_last_n: the three penalties look at the last n tokens of prompt and answer (-1: all, 0: none).
    typical_p: keep the tokens whose surprise is nearest to the expected one, until their probabilities pass p (1: off).
    dry: a penalty on repeated runs: the multiplier (0.8 is usual), or a ``Dry``.
    xtc: exclude top choices: the probability, (probability, threshold), or an ``Xtc``.
    mirostat: 1, 2 or a ``Mirostat``; in place of top_k, typical_p, top_p, min_p and xtc (0: off).
    logit_bias: {token id: what is added to its logit}; -inf forbids the token.
    logits_processors: functions of (ids (n,) int64: prompt and answer so far; logits (V,) float32), which change the
        logits in place and return None, or return others.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = -1
    typical_p: float = 1.0
    dry: Dry | float | None = None
    xtc: Xtc | float | tuple[float, float] | None = None
    mirostat: Mirostat | int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logits_processors: Sequence[Processor] = ()

    def __post_init__(self) -> None:
        t, penalty, seed, last_n = self.temperature, self.repetition_penalty, self.seed, self.repeat_last_n
        require("temperature", t, is_number(t) and 0 <= t < math.inf, "a finite number >= 0")
        require("top_k", self.top_k, is_integer(self.top_k) and self.top_k >= 0, "an integer >= 0")
        for name in ("top_p", "typical_p"):
            p = getattr(self, name)
            require(name, p, is_number(p) and 0 < p <= 1, "a number above 0 and at most 1")
        require("min_p", self.min_p, is_number(self.min_p) and 0 <= self.min_p <= 1, "a number from 0 to 1")
        ok = is_number(penalty) and 0 < penalty < math.inf
        require("repetition_penalty", penalty, ok, "a finite number above 0")
        require("seed", seed, seed is None or (is_integer(seed) and seed >= 0), "an integer >= 0 or None")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(name, value, is_number(value) and math.isfinite(value), "a finite number")
        require("repeat_last_n", last_n, is_integer(last_n) and last_n >= -1, "an integer >= -1")
        object.__setattr__(self, "dry", _dry(self.dry))
        object.__setattr__(self, "xtc", _xtc(self.xtc))
        object.__setattr__(self, "mirostat", _mirostat(self.mirostat))
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        processors = self.logits_processors
        many = isinstance(processors, Sequence) and all(map(callable, processors))
        require("logits_processors", processors, many, "a list of functions")
        object.__setattr__(self, "logits_processors", tuple(processors))
        if self.mirostat is not None:
            for name in ("top_k", "typical_p", "top_p", "min_p", "xtc"):
                off = getattr(Sampling, name)
                require(name, getattr(self, name), getattr(self, name) == off, f"{off!r}, as mirostat takes its place")

    def __repr__(self) -> str:
        """The options that differ from their defaults."""
        default: dict[str, object] = {f.name: {} if f.name == "logit_bias" else f.default for f in fields(self)}
        given = ((f.name, getattr(self, f.name)) for f in fields(self))
        return f"Sampling({', '.join(f'{name}={short(value)}' for name, value in given if value != default[name])})"


def _require_number(name: str, value: object, low: float, high: float) -> None:
    ok = is_number(value) and low <= value <= high and math.isfinite(value)
    require(name, value, ok, f"a finite number >= {low}" if high == math.inf else f"a number from {low} to {high}")


def _dry(given: Any) -> Dry | None:
    if given is None or isinstance(given, Dry):
        return None if given is not None and given.multiplier == 0 else given
    require("dry", given, is_number(given), "a number (the multiplier), a Dry or None")
    return Dry(given) if given else None


def _xtc(given: Any) -> Xtc | None:
    if given is None or isinstance(given, Xtc):
        return given
    if isinstance(given, tuple | list) and len(given) == 2:
        return Xtc(*given)
    require("xtc", given, is_number(given), "a probability, (probability, threshold), an Xtc or None")
    return Xtc(given) if given else None


def _mirostat(given: Any) -> Mirostat | None:
    if given is None or isinstance(given, Mirostat):
        return given
    require("mirostat", given, is_integer(given) and given in (0, 1, 2), "0, 1, 2 or a Mirostat")
    return Mirostat(given) if given else None


def _bias(given: Any) -> dict[int, float]:
    require("logit_bias", given, isinstance(given, Mapping | None), "a dict of token ids and numbers")
    for i, bias in (given or {}).items():
        require("logit_bias", i, is_integer(i) and i >= 0, "token ids >= 0 as keys")
        require(f"logit_bias[{i}]", bias, is_number(bias) and bias < math.inf, "a number, or -inf")
    return {int(i): float(bias) for i, bias in (given or {}).items()}
