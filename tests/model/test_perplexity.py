"""Perplexity against the definition in float64, window by window."""

import dataclasses
import math

import numpy as np
import pytest

from ruvllm.kernels import reference
from ruvllm.model import Llama
from ruvllm.model.perplexity import Perplexity, divergence, perplexity
from tests.model.model_cases import small_model, text


@pytest.fixture(scope="module")
def model() -> Llama:
    return small_model("f32")


def scored(model: Llama, ids: np.ndarray, context: int, bos: int | None) -> list[float]:
    """Negative log-likelihoods: of each whole window, the tokens of its second half after their first."""
    losses = []
    for start in range(0, len(ids) - context + 1, context):
        window = ids[start : start + context].copy()
        if bos is not None:
            window[0] = bos
        logprobs = reference.log_softmax(model.forward(window, model.new_cache(context)))
        losses += [-logprobs[j, window[j + 1]] for j in range(context // 2, context - 1)]
    return losses


@pytest.mark.parametrize(("tokens", "context"), [(64, 64), (200, 64), (191, 64), (100, 33), (300, 150), (9, 4)])
@pytest.mark.parametrize("bos", [None, 1])
def test_definition(model: Llama, tokens: int, context: int, bos: int | None) -> None:
    ids = text(tokens, seed=2)
    before = ids.copy()
    result = perplexity(model, ids, context, bos, nbytes=1000)
    losses = scored(model, ids, context, bos)
    np.testing.assert_array_equal(ids, before)
    assert result.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)
    assert float(result) == result.value
    assert result.nll == pytest.approx(np.mean(losses), rel=1e-6)
    assert (result.tokens, result.windows, result.context) == (len(losses), tokens // context, context)
    assert result.error == pytest.approx(result.value * np.std(losses, ddof=1) / math.sqrt(len(losses)), rel=1e-5)
    # Bits of a token, times tokens a byte: of the whole text, as if every token cost what the scored ones do.
    assert result.bits_per_byte == pytest.approx(np.mean(losses) / math.log(2) * tokens / 1000, rel=1e-6)


def test_progress_counts_windows(model: Llama) -> None:
    counted: list[tuple[int, int]] = []
    perplexity(model, text(200), 64, progress=lambda *done: counted.append(done))
    assert counted == [(1, 3), (2, 3), (3, 3)]


def test_begins_each_window_with_bos(model: Llama) -> None:
    ids = text(128, seed=3)
    assert perplexity(model, ids, 64, bos=1).value != perplexity(model, ids, 64, bos=2).value
    assert perplexity(model, ids, 64).bits_per_byte is None


def test_uniform_predictions_have_the_vocabulary_as_perplexity() -> None:
    flat = small_model("f32")
    flat.decoder.norm[:] = 0
    assert perplexity(flat, text(64), 64).value == pytest.approx(211, rel=1e-6)


def test_one_token_says_nothing_about_the_error(model: Llama) -> None:
    result = perplexity(model, text(4), 4)
    assert (result.tokens, result.error) == (1, math.inf)


def test_reads_as_one_line() -> None:
    shown = str(Perplexity(12.3456, 0.25, 2.5, 100, 2, 64, 0.9))
    assert shown == "perplexity 12.3456 +/- 0.2500 (100 tokens scored in 2 windows of 64, 0.9000 bits per byte)"


def test_options_are_refused_by_name(model: Llama) -> None:
    for context in (3, 0, -5, 1025, 64.0, None):
        with pytest.raises(ValueError, match="^context: expected 4 to 1024, found"):
            perplexity(model, text(2000), context)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^text: expected at least 64 tokens, one window \(context\), found 63$"):
        perplexity(model, text(63), 64)
    with pytest.raises(TypeError, match="^ids: expected integers"):
        perplexity(model, text(64).astype(np.float64), 64)
    with pytest.raises(ValueError, match="^ids: expected token ids from 0 to 210, found 211"):
        perplexity(model, np.full(64, 211), 64)


# --- divergence --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("context", "bos", "kv"), [(64, None, "f32"), (33, 1, "int8")])
def test_divergence_is_its_definition(model: Llama, context: int, bos: int | None, kv: str) -> None:
    rounded, ids = small_model("int4"), text(150, seed=2)
    result = divergence(rounded, model, ids, context, bos, nbytes=500, kv=kv)
    each, same = [], []
    for start in range(0, len(ids) - context + 1, context):
        window = ids[start : start + context].copy()
        if bos is not None:
            window[0] = bos
        p = reference.log_softmax(model.forward(window, model.new_cache(context)))
        q = reference.log_softmax(rounded.forward(window, rounded.new_cache(context, kv)))
        for j in range(context // 2, context - 1):
            each.append(float((np.exp(p[j]) * (p[j] - q[j])).sum()))
            same.append(p[j].argmax() == q[j].argmax())
    assert result.kl == float(result) == pytest.approx(np.mean(each), rel=1e-5)
    assert result.error == pytest.approx(np.std(each, ddof=1) / math.sqrt(len(each)), rel=1e-5)
    assert (result.median, result.largest) == pytest.approx((np.median(each), max(each)), rel=1e-5)
    assert result.same_top == pytest.approx(np.mean(same)) and 0 < result.same_top < 1
    assert result.tokens == len(each)
    assert result.perplexity == perplexity(rounded, ids, context, bos, nbytes=500, kv=kv)
    assert result.baseline == perplexity(model, ids, context, bos, nbytes=500)


def test_nothing_diverges_from_itself(model: Llama) -> None:
    counted: list[tuple[int, int]] = []
    result = divergence(model, model, text(130), 64, progress=lambda *done: counted.append(done))
    assert (result.kl, result.largest, result.same_top) == (0, 0, 1)
    assert counted == [(1, 2), (2, 2)]
    assert "same top token 100.00 %" in str(result) and "difference +0.000 %" in str(result)


def test_divergence_needs_one_vocabulary(model: Llama) -> None:
    other = Llama(dataclasses.replace(model.config, vocab_size=200))
    with pytest.raises(ValueError, match="^baseline: expected .* same vocabulary, found sizes 211 and 200$"):
        divergence(model, other, text(100), 64)
