"""Penalties: subtracted from the logits of tokens that have occurred, or that would prolong a repetition."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

import ruvllm.kernels as K
from ruvllm.model.sampling.options import Dry, Sampling

_LARGEST_LOG = 88.7228391  # ln of the largest float32


def penalise_tokens(logits: np.ndarray, ids: np.ndarray, sampling: Sampling) -> None:
    """The repetition, presence and frequency penalties on logits (V,), for the last tokens of ids (n,).

    logits[i] = logits[i] / r if positive else logits[i] r, then logits[i] -= presence + frequency * count(i), for each
    i that occurs.
    """
    last = ids if sampling.repeat_last_n < 0 else ids[max(0, len(ids) - sampling.repeat_last_n) :]
    if sampling.repetition_penalty != 1.0 and len(last):
        K.apply_repetition_penalty(logits, last, sampling.repetition_penalty)
    if (sampling.presence_penalty or sampling.frequency_penalty) and len(last):
        distinct, counts = np.unique(last, return_counts=True)
        off = sampling.presence_penalty + sampling.frequency_penalty * counts
        logits[distinct] -= off.astype(np.float32)


def penalise_repeats(logits: np.ndarray, ids: np.ndarray, dry: Dry, spell: Callable[[int], bytes]) -> None:
    """DRY on logits (V,) after ids (n,); spell(id): the bytes of a token, in which breakers are looked for."""
    window = ids if dry.last_n < 0 else ids[max(0, len(ids) - dry.last_n) :]
    most = int(_LARGEST_LOG / math.log(dry.base)) if dry.base > 1.000001 else len(window)  # no exponent is greater
    breakers = [text.encode() for text in dry.breakers]
    longest = _unbroken(window, min(len(window), most + dry.allowed_length), breakers, spell)
    if longest < dry.allowed_length:
        return
    for token, length in _repeats(window, longest).items():
        if length >= dry.allowed_length and not any(text in spell(token) for text in breakers):
            logits[token] -= np.float32(dry.multiplier * dry.base ** min(length - dry.allowed_length, most))


def _unbroken(window: np.ndarray, most: int, breakers: list[bytes], spell: Callable[[int], bytes]) -> int:
    """How many of the last ``most`` tokens follow the last one in which a breaker ends."""
    if not breakers:
        return most
    reach = max(map(len, breakers)) - 1  # bytes of the tokens behind that a breaker may need
    behind: list[bytes] = []
    for count, token in enumerate(window[len(window) - most :][::-1].tolist()):
        piece, rest = spell(token), b"".join(behind[::-1][:reach])[:reach]
        ends = [found + len(text) for text in breakers if (found := (piece + rest).rfind(text)) >= 0]
        if ends:
            end, passed = max(ends) - len(piece), 0
            while end > 0:  # it ends in a later token
                passed += 1
                end -= len(behind[-passed])
            return count - passed
        behind.append(piece)
    return most


def _repeats(window: np.ndarray, longest: int) -> dict[int, int]:
    """For each token that once followed the last tokens: how many of them, at most ``longest``, it followed."""
    n = len(window)
    ends = np.flatnonzero(window[:-1] == window[-1])
    followed: dict[int, int] = {}
    length = 1
    while len(ends):
        followed.update(dict.fromkeys(window[ends + 1].tolist(), length))
        if length == longest:
            break
        ends = ends[ends >= length]
        ends = ends[window[ends - length] == window[n - 1 - length]]
        length += 1
    return followed
