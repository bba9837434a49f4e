"""Sampler: chooses the tokens of one sequence, with what must be remembered between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np

import ruvllm.kernels as K
from ruvllm.model.sampling import filters
from ruvllm.model.sampling.options import Dry, Mirostat, Sampling, Xtc
from ruvllm.model.sampling.penalties import penalise_repeats, penalise_tokens


class Constraint(Protocol):
    """A form that an answer must have, followed token by token; it belongs to one sequence."""

    def mask(self, logits: np.ndarray) -> None:
        """Set the logits (V,) of tokens that cannot follow to -inf."""
        ...

    def advance(self, token_id: int) -> None:
        """Take the token that was chosen."""
        ...


class Sampler:
    """Chooses the tokens of one sequence: random numbers, Mirostat's mu and a constraint go on from token to token.

    Args:
        sampling: the options.
        spell: the bytes of a token, which ``dry`` needs for its breakers.
        constraint: the form of the answer.

    Raises:
        ValueError: ``dry`` has breakers, and ``spell`` is None.
    """

    def __init__(
        self, sampling: Sampling, spell: Callable[[int], bytes] | None = None, constraint: Constraint | None = None
    ) -> None:
        self.sampling, self.constraint = sampling, constraint
        if isinstance(sampling.dry, Dry) and sampling.dry.breakers and spell is None:
            raise ValueError("dry: breakers are strings, for which a tokenizer is needed")
        self._spell = spell or (lambda _: b"")
        self._random = np.random.default_rng(sampling.seed)
        self._mu = 2 * sampling.mirostat.tau if isinstance(sampling.mirostat, Mirostat) else 0.0

    def choose(self, logits: np.ndarray, ids: np.ndarray) -> int:
        """The next token after ids (n,) int64: prompt and answer so far. logits (V,) float32 may be changed.

        Raises:
            ValueError: the logits hold NaN or +inf, or leave no token; a processor's result has another shape.
            IndexError: logit_bias has an id outside the vocabulary.
        """
        sampling = self.sampling
        logits = self._processed(logits, ids)
        penalise_tokens(logits, ids, sampling)
        if isinstance(sampling.dry, Dry) and len(ids):
            penalise_repeats(logits, ids, sampling.dry, self._spell)
        if self.constraint is not None:
            self.constraint.mask(logits)
        chosen = self._drawn(logits)
        if self.constraint is not None:
            self.constraint.advance(chosen)
        return chosen

    def _processed(self, logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """The logits after the user's functions and biases."""
        for function in self.sampling.logits_processors:
            returned = function(ids, logits)
            if returned is None:
                continue
            changed = np.asarray(returned)
            if changed.shape != logits.shape or not np.issubdtype(changed.dtype, np.floating):
                name = getattr(function, "__name__", repr(function))
                found = f"{changed.dtype} {changed.shape}"
                raise ValueError(f"logits_processors: expected float32 {logits.shape} or None of {name}, found {found}")
            logits = np.array(changed, np.float32)
        for token, bias in self.sampling.logit_bias.items():
            logits[token] += np.float32(bias)
        return logits

    def _drawn(self, logits: np.ndarray) -> int:
        """A token that passes the filters, drawn at the temperature."""
        s = self.sampling
        u = self._random.random()
        if isinstance(s.mirostat, Mirostat):
            return self._near_surprise(logits, s.mirostat, u)
        if s.typical_p == 1 and s.xtc is None:
            return K.sample(logits, u, s.temperature, s.top_k, s.top_p, s.min_p)
        found = filters.keep_top_k(filters.candidates(logits), s.top_k)
        found = filters.keep_typical(found, s.typical_p)
        found = filters.keep_min_p(filters.keep_top_p(found, s.top_p), s.min_p)
        if isinstance(s.xtc, Xtc) and self._random.random() < s.xtc.probability:
            found = filters.drop_top_choices(found, s.xtc.threshold)
        return int(found.ids[K.sample(found.logits, u, s.temperature)])

    def _near_surprise(self, logits: np.ndarray, mirostat: Mirostat, u: float) -> int:
        """A token of about tau bits of surprise (Mirostat)."""
        found = filters.candidates(logits)
        temperature = self.sampling.temperature
        if temperature == 0:
            return int(found.ids[K.argmax(found.logits)])
        found = filters.Candidates(found.logits / np.float32(temperature), found.ids)
        if mirostat.version == 1:
            found = filters.keep_zipf(found, self._mu, len(logits))
        else:
            found = filters.keep_surprise(found, self._mu)
        drawn = K.sample(found.logits, u)
        surprise = -math.log2(max(float(found.probabilities[drawn]), 1e-300))
        self._mu -= mirostat.eta * (surprise - mirostat.tau)
        return int(found.ids[drawn])
