"""Soft-capped scores, sinks, and ragged batches of flash_attention."""

from typing import Any

import numpy as np
import pytest

from ruvllm.kernels import flash_attention, ragged_attention, reference

RNG = np.random.default_rng(7)
SINKS = np.array([2.0, -1.0, 0.5, 9.0], np.float32)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, np.float32)


@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize("options", [{"softcap": 2.5}, {"sinks": SINKS}, {"softcap": 20.0, "sinks": SINKS}])
@pytest.mark.parametrize("mask", [{}, {"causal": False}, {"window": 7}])
def test_options_change_scores(tokens: int, options: Any, mask: dict[str, Any]) -> None:
    q, k, v = 3 * normal(tokens, 4, 18), normal(tokens + 20, 2, 18), normal(tokens + 20, 2, 18)
    got = flash_attention(q, k, v, **mask, **options)
    expected = reference.flash_attention(q, k, v, **mask, **options)
    assert ((got - expected) ** 2).sum() <= 1e-10 * (expected**2).sum()
    plain = flash_attention(q, k, v, **mask)
    assert np.abs(got - plain).max() > 1e-2  # it makes a difference


def test_options_that_are_none_are_none() -> None:
    q, k, v = normal(5, 4, 18), normal(9, 2, 18), normal(9, 2, 18)
    np.testing.assert_array_equal(flash_attention(q, k, v, softcap=None, sinks=None), flash_attention(q, k, v))


@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize("options", [{}, {"sinks": SINKS, "softcap": 3.0}])
def test_log_sum_exp_merges_parts_of_the_positions(tokens: int, options: Any) -> None:
    q, k, v = 3 * normal(tokens, 4, 18), normal(320, 2, 18), normal(320, 2, 18)
    whole = flash_attention(q, k, v, causal=False, **options)
    out = np.empty_like(q)
    got, lse = flash_attention(q, k, v, causal=False, out=out, return_lse=True, **options)
    assert got is out and lse.shape == (tokens, 4) and lse.dtype == np.float32
    np.testing.assert_array_equal(got, whole)
    scores = np.einsum("thd,shd->ths", q, np.repeat(k, 2, 1).astype(np.float64)) / np.sqrt(18)
    if options:
        scores = 3 * np.tanh(scores / 3)
        scores = np.concatenate((scores, np.broadcast_to(SINKS[:, None], (tokens, 4, 1))), -1)
    np.testing.assert_allclose(lse, np.log(np.exp(scores).sum(-1)), rtol=1e-5, atol=1e-5)
    if not options:
        (a, la), (b, lb) = (flash_attention(q, k[s], v[s], False, return_lse=True) for s in (np.s_[:90], np.s_[90:]))
        share = 1 / (1 + np.exp(lb - la))[..., None]
        np.testing.assert_allclose(share * a + (1 - share) * b, whole, rtol=1e-4, atol=1e-5)
    ragged, parts = ragged_attention(q, k, v, [0, tokens], [0, 320], causal=False, return_lse=True, **options)
    np.testing.assert_array_equal(ragged, whole)
    np.testing.assert_array_equal(parts, lse)
    half, same = flash_attention(q, k, v, False, out=np.empty(q.shape, np.float16), return_lse=True, **options)
    np.testing.assert_array_equal(half, whole.astype(np.float16))
    np.testing.assert_array_equal(same, lse)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"softcap": 0}, ValueError, "softcap: expected a finite number > 0"),
        ({"softcap": "x"}, TypeError, "softcap: expected a number"),
        ({"sinks": np.zeros(3, np.float32)}, ValueError, r"sinks: expected shape \(4\)"),
        ({"sinks": np.zeros(4)}, TypeError, "sinks: expected float32"),
        ({"dropout": 0.1}, TypeError, "options: expected softcap, sinks or return_lse, found dropout"),
        ({"return_lse": "yes"}, TypeError, "return_lse: expected True or False"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(options: Any, error: type[Exception], message: str) -> None:
    q, k = normal(5, 4, 18), normal(9, 2, 18)
    with pytest.raises(error, match=f"^{message}"):
        flash_attention(q, k, k, **options)
    with pytest.raises(error):
        ragged_attention(q, k, k, [0, 5], [0, 9], **options)


@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"window": 3, "scale": 0.3}, {"softcap": 2.0, "sinks": SINKS}]
)
def test_each_sequence_of_a_ragged_batch_is_its_own(options: Any) -> None:
    starts, key_starts = [0, 4, 4, 5, 38], [0, 11, 14, 15, 60]
    q, k, v = normal(38, 4, 18), normal(60, 2, 18), normal(60, 2, 18)
    out = np.full_like(q, np.nan)
    assert ragged_attention(q, k, v, starts, key_starts, out, **options) is out
    for i in range(4):
        rows, keys = slice(*starts[i : i + 2]), slice(*key_starts[i : i + 2])
        np.testing.assert_array_equal(out[rows], flash_attention(q[rows], k[keys], v[keys], **options))
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (([0, 5, 3, 9],), "cu_seqlens: expected offsets that rise from 0 to 9, found 0, 5, 3, 9"),
        (([0, 5],), "cu_seqlens: expected"), (([1, 9],), "cu_seqlens: expected"), (([],), "cu_seqlens: .* found none"),
        (([0, 9], [0, 2, 9]), "cu_seqlens_k: expected 2 offsets, found 3"),
        (([0, 4, 9], [0, 3, 9]), "k: causal attention of 4 queries needs as many positions, found 3"),
        (([0, 4, 9], [0, 9, 9]), "k: expected at least one position"),
        ((list(range(10)) + [8],), r"found 0, 1, 2, 3, \.\.\., 8, 9, 8"),
    ],
)  # fmt: skip
def test_offsets_that_cannot_be(offsets: Any, message: str) -> None:
    x = normal(9, 2, 8)
    with pytest.raises(ValueError, match=f"{message}"):
        ragged_attention(x, x, x, *offsets)
