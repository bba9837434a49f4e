"""Choosing the next token from logits: repetition penalty, top-k, top-p, min-p, temperature, and the draw."""

from typing import Any

import numpy as np

from ruvllm.kernels import check, reference
from ruvllm.kernels.jit.decorators import kernel
from ruvllm.kernels.sampling.ranking import (
    argmax_index,
    largest,
    log_sum_exp,
    select,
    select_largest,
    vector,
)
from ruvllm.kernels.simd.math import exp
from ruvllm.kernels.simd.sums import exp_and_sum, exp_sum
from ruvllm.kernels.spec import KernelSpec

_FIRST_CANDIDATES = 256  # sorted for top-p before the size of the nucleus is known
_FEW = 64  # elements whose exponentials are summed in float32
_ZERO = np.float32(0)
_MINUS_INFINITY = np.float32(-np.inf)

# --- penalty ------------------------------------------------------------------------------------------------------


@kernel(strict=True)
def penalise(logits, ids, penalty):
    """Divide logits[i] by penalty where positive, else multiply, for the distinct ids (n,) int64; penalty float32."""
    for j in range(ids.size):
        value = logits[ids[j]]
        logits[ids[j]] = value / penalty if value > _ZERO else value * penalty


def apply_repetition_penalty(logits: np.ndarray, ids: Any, penalty: float) -> np.ndarray:
    """logits[i] = logits[i] / penalty if positive else logits[i] * penalty, once for each distinct i of ``ids``.

    Args:
        logits: (V,) float32, changed in place.
        ids: (n,) integers in 0..V-1: tokens that occurred, repeats allowed.
        penalty: > 1 makes them less likely, 1 changes nothing.

    Returns:
        ``logits``.

    Raises:
        TypeError: ``logits`` is not a float32 array, or ids are not integers.
        ValueError: ``logits`` cannot be written, an id is out of range, or penalty is not > 0.

    Source: Keskar et al. 2019, "CTRL"; negative logits are multiplied as in transformers and llama.cpp.
    """
    logits = check.output("logits", logits, getattr(logits, "shape", ()))
    if logits.ndim != 1:
        raise ValueError(f"logits: expected 1 dimension, found shape {logits.shape}")
    factor = np.float32(check.positive("penalty", penalty))
    if not 0 < factor < np.inf:
        raise ValueError(f"penalty: expected a number > 0 that float32 holds, found {penalty}")
    distinct = np.unique(check.integers("ids", ids))
    if distinct.size and not 0 <= distinct[0] <= distinct[-1] < logits.size:
        raise ValueError(f"ids: expected 0 to {logits.size - 1}, found {distinct[0]} to {distinct[-1]}")
    penalise(logits, distinct, factor)
    return logits


# --- drawing ------------------------------------------------------------------------------------------------------


@kernel(strict=True)
def draw_from_all(x, top, inverse_temperature, u):
    """The index i at which the running sum of exp((x - top) inverse_temperature) passes u times the total.

    Exponentials are computed twice instead of stored, the second time only until the running sum passes.
    """
    total = 0.0
    for first in range(0, x.size, _FEW):
        total += exp_sum(x[first : first + _FEW], top, inverse_temperature)
    target = u * total
    before, last = 0.0, 0
    for first in range(0, x.size, _FEW):
        strip = x[first : first + _FEW]
        after = before + exp_sum(strip, top, inverse_temperature)
        if after > before:
            if after > target:
                for i in range(strip.size):
                    weight = exp((strip[i] - top) * inverse_temperature)
                    if weight > _ZERO:
                        before += np.float64(weight)
                        last = first + i
                        if before > target:
                            break
                return last
        before = after
    return last


@kernel
def count_at_least(x, threshold):
    """How many elements of x (n,) are >= threshold (float32)."""
    count = 0
    for i in range(x.size):
        count += x[i] >= threshold
    return count


@kernel(strict=True)
def cut_and_draw(values, weights, total, top_p, lowest, last_chance, inverse_temperature, u):
    """Apply top-p, min-p and temperature, in this order, to the descending logits ``values`` (k,), and draw an index.

    total: sum of exp(logit - values[0]) over all tokens, or 0 if ``values`` are all candidates; lowest: the least
    logit that min-p keeps. Returns -1, unless last_chance, if the nucleus reaches beyond ``values``.
    weights: (k,) float32 of scratch.
    """
    k = values.size
    kept = k
    complete = last_chance
    if top_p < 1.0:
        among = exp_and_sum(values, values[0], weights)
        goal = top_p * (total if total > 0.0 else among)
        running = 0.0
        for i in range(k):
            running += np.float64(weights[i])
            if running >= goal:
                kept = i + 1
                complete = True
                break
    while kept > 1 and values[kept - 1] < lowest:
        kept -= 1
        complete = True
    if not complete:
        return -1
    return draw_from_all(values[:kept], values[0], inverse_temperature, u)


def sample(
    logits: Any, u: float, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> int:
    """Draw a token id: p_i proportional to exp(logits_i / temperature) over the tokens that pass the filters.

    The filters come in llama.cpp's default order, each over what the one before has kept, and all before the
    temperature: top_k keeps the k largest logits; top_p the fewest likeliest tokens whose probabilities sum to at
    least p; min_p those at least min_p times as likely as the likeliest. (transformers divides by the temperature
    first.) A repetition penalty comes before: ``apply_repetition_penalty``.

    Args:
        logits: (V,) float32, not changed; -inf is never drawn.
        u: uniform random number in [0, 1): the same u draws the same token.
        temperature: >= 0; 0 takes the largest logit, of equal ones the first.
        top_k: >= 0; 0 is off.
        top_p: in (0, 1]; 1 is off.
        min_p: in [0, 1]; 0 is off.

    Raises:
        TypeError: ``logits`` is not a float32 array.
        ValueError: a number outside its range, or logits that are empty, hold NaN or +inf, or are all -inf.

    Source: Fan et al. 2018 (top-k); Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration" (top-p);
    Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling".
    """
    logits = vector("logits", logits)
    u, temperature = check.number("u", u), check.number("temperature", temperature)
    top_k, top_p, min_p = check.integer("top_k", top_k), check.number("top_p", top_p), check.number("min_p", min_p)
    _require("u", u, 0 <= u < 1, "a number in [0, 1)")
    _require("temperature", temperature, 0 <= temperature < np.inf, "a finite number >= 0")
    _require("top_k", top_k, top_k >= 0, "an integer >= 0")
    _require("top_p", top_p, 0 < top_p <= 1, "a number above 0 and at most 1")
    _require("min_p", min_p, 0 <= min_p <= 1, "a number from 0 to 1")
    best = largest(logits, "logits")
    top = logits[best]
    if not np.isfinite(top):
        raise ValueError(f"logits: the largest must be finite, found {top}")
    if temperature == 0 or top_k == 1:
        return best
    inverse_temperature = np.float32(min(1 / temperature, 1e30)) if temperature > 1e-30 else np.float32(1e30)
    lowest = top + np.float32(np.log(min_p)) if min_p else _MINUS_INFINITY
    if not 0 < top_k < logits.size and top_p == 1 and not min_p:
        return int(draw_from_all(logits, top, inverse_temperature, u))
    limit, total = min(top_k, logits.size), 0.0
    if not top_k:
        least = lowest
        if top_p < 1:
            log_total = log_sum_exp(logits)
            total = float(np.exp(log_total - top))
            # tokens of probability < (1 - p) / V sum to less than 1 - p: the nucleus needs none of them
            least = max(least, np.float32(log_total + np.log((1 - top_p) / logits.size)))
        limit = max(1, int(count_at_least(logits, least)))
    count = limit if top_k or top_p == 1 else min(limit, _FIRST_CANDIDATES)
    while True:
        values, ids = select(logits, count)
        drawn = cut_and_draw(
            values, np.empty_like(values), total, top_p, lowest, count == limit, inverse_temperature, u
        )
        if drawn >= 0:
            return int(ids[drawn])
        count = min(limit, 8 * count)


def _require(name: str, value: float, ok: bool, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, found {value!r}")


SPECS = [
    KernelSpec(
        name="apply_repetition_penalty",
        function=apply_repetition_penalty,
        compiled=(penalise,),
        reference=reference.apply_repetition_penalty,
        formula="logits[i] / penalty if positive else logits[i] * penalty, for the distinct i of ids, in place",
        example=lambda rng, n, tokens: {
            "logits": 4 * rng.standard_normal(n, np.float32),
            "ids": rng.integers(0, n, tokens),
            "penalty": 1.1,
        },
        flops=lambda n, tokens: float(tokens),
        bytes=lambda n, tokens: 16.0 * tokens,
        sizes=({"n": 49152, "tokens": 512}, {"n": 128256, "tokens": 4096}),
    ),
    KernelSpec(
        name="sample",
        function=sample,
        compiled=(argmax_index, log_sum_exp, count_at_least, select_largest, cut_and_draw, draw_from_all),
        reference=reference.sample,
        formula="i with probability softmax(logits / temperature)[i] over what top-k, top-p and min-p keep",
        example=lambda rng, n: {
            "logits": 4 * rng.standard_normal(n, np.float32),
            "u": float(rng.random()),
            "temperature": 0.8,
            "top_k": 40,
            "top_p": 0.95,
            "min_p": 0.05,
        },
        flops=lambda n: 2.0 * n,
        bytes=lambda n: 8.0 * n,
        sizes=({"n": 32000}, {"n": 49152}, {"n": 128256}),
        tolerance=0.0,
    ),
]
