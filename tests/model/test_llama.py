"""Llama: logits against transformers and against plain NumPy; the same from every file, on every path, in any part."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.errors import ContextFullError
from ruvllm.kernels.threads.pool import most_threads
from ruvllm.kernels.threads.regions import Region
from ruvllm.model import Llama, ModelConfig, RopeConfig, llama, replay
from ruvllm.model.kv_size import PREFILL_TOKENS
from ruvllm.model.random_weights import RandomWeights
from ruvllm.model.reference import reference_logits
from ruvllm.model.replay import Working
from tests.model import tiny
from tests.model.model_cases import KINDS, LAYOUTS, SMALL, WINDOWED, load, logits, run, small_model, text
from tests.processes import python


@pytest.fixture(scope="module")
def models() -> dict[str, Llama]:
    """A small model of every layout, all from the same random numbers."""
    return {layout: small_model(layout, 2) for layout in LAYOUTS}


# --- what is computed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "layers"])
@pytest.mark.parametrize("case", tiny.CASES)
def test_logits_of_transformers(case: str, fused: bool) -> None:
    ids, expected = tiny.golden(case)
    model = load(tiny.directory(case), "f32", threads=2)
    model.fused = fused
    assert np.abs(logits(model, ids) - expected).max() <= 2e-4


@pytest.mark.parametrize("case", ["llama3_scaled_gqa", "mistral_window"])
def test_decoding_gives_the_logits_of_transformers(case: str) -> None:
    """Far beyond the original context length, and past the window."""
    ids, expected = tiny.golden(case)
    model = load(tiny.directory(case), "f32")
    got = run(model, model.new_cache(len(ids)), ids, [5] + [1] * (len(ids) - 5))
    assert np.abs(got - expected).max() <= 2e-4


@pytest.mark.parametrize("window", [None, 300, 5])
def test_long_texts(window: int | None) -> None:
    """Longer than the 256 positions that attention takes at a time, and than one pass of the model."""
    config = dataclasses.replace(SMALL, sliding_window=window)
    ids = text(530)
    expected = reference_logits(RandomWeightsCheckpoint(config), ids)
    model = small_model("f32", 2, config)
    cache = model.new_cache(530)
    assert np.abs(run(model, cache, ids, [500, *[1] * 20, 10]) - expected).max() <= 2e-5


class RandomWeightsCheckpoint(RandomWeights):
    """The weights of ``small_model`` as the oracle reads them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, seed=7)


@pytest.mark.parametrize("scaling", ["linear", "ntk", "llama3"])
def test_scaled_rope_far_out(scaling: str) -> None:
    """Positions beyond 8k: of one layer with a window, the last token needs the last few positions alone."""
    rope = RopeConfig(theta=1e4, scaling=scaling, factor=4.0, original_max_position=8192)
    config = dataclasses.replace(SMALL, num_hidden_layers=1, sliding_window=20, rope=rope)
    model = small_model("f32", 2, config)
    ids = text(9000)
    got = model.forward(ids, model.new_cache(9000), last_only=True)
    # RoPE turns relative to each other, so the same twenty tokens at positions 0 .. 19 are the oracle.
    expected = reference_logits(RandomWeightsCheckpoint(config), ids[-20:])[-1]
    assert np.abs(got - expected).max() <= 2e-4


@pytest.mark.parametrize("case", tiny.CASES)
def test_a_gguf_file_gives_the_logits_of_the_directory(case: str, tmp_path: Path) -> None:
    """Bit for bit from the same 32- or 16-bit floats; llama3's divisors are rounded to float32 in GGUF files."""
    ids, _ = tiny.golden(case)
    expected = logits(load(tiny.directory(case)), ids)
    got = logits(load(tiny.write_gguf(case, tmp_path / "model.gguf", tiny.DTYPE.get(case, "F32"))), ids)
    if case == "llama3_scaled_gqa":
        assert np.abs(got - expected).max() <= 2e-4
    else:
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("layout", ["auto", "f32"])
def test_sixteen_bit_files(dtype: str, layout: str, tmp_path: Path) -> None:
    """The rounded weights themselves are computed with exactly, whether they stay 16-bit or not."""
    path = tiny.write_gguf("llama2_mha", tmp_path / "model.gguf", dtype)
    ids, _ = tiny.golden("llama2_mha")
    model = load(path, layout)
    assert model.decoder.head.layout == ("f32" if layout == "f32" else dtype.lower())
    with open_checkpoint(path) as checkpoint:
        assert np.abs(logits(model, ids, "f32") - reference_logits(checkpoint, ids)).max() <= 2e-4


@pytest.mark.parametrize("layout", ["f16", "bf16", "int8", "int4"])
def test_lower_precision_stays_near(layout: str, models: dict[str, Llama]) -> None:
    """Errors of each format's own size: mean KL divergence from the float32 model's predictions."""
    ids = text(100)
    p, q = (log_softmax(logits(models[name], ids)) for name in ("f32", layout))
    divergence = float((np.exp(p) * (p - q)).sum(axis=1).mean())
    assert 0 < divergence <= {"f16": 1e-6, "bf16": 1e-4, "int8": 1e-3, "int4": 0.05}[layout]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(("kv", "largest"), [("f16", 1e-6), ("int8", 1e-4)])
def test_smaller_caches_stay_near(kv: str, largest: float, models: dict[str, Llama]) -> None:
    """Errors of each format's own size, as those of weights: mean KL divergence from the float32 cache's."""
    ids = text(100)
    p, q = (log_softmax(logits(models["f32"], ids, name)) for name in ("f32", kv))
    divergence = float((np.exp(p) * (p - q)).sum(axis=1).mean())
    assert 0 < divergence <= largest


# --- the same on every path --------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, WINDOWED], ids=["full", "window"])
@pytest.mark.parametrize(("layout", "kv"), KINDS)
def test_fused_is_layer_by_layer_bit_for_bit(layout: str, kv: str, config: ModelConfig) -> None:
    model = small_model(layout, 2, config)
    caches = [model.new_cache(300, kv), model.new_cache(300, kv)]
    ids = text(300)
    for tokens in (1, 2, 7, 130, 1, 6, 1):
        start = caches[0].length
        part = ids[start : start + tokens]
        model.fused = True
        expected = model.forward(part, caches[0])
        model.fused = False
        np.testing.assert_array_equal(model.forward(part, caches[1]), expected, err_msg=f"{tokens} at {start}")
    for layer in range(config.num_hidden_layers):
        for fused, walked in zip(caches[0].layer(layer), caches[1].layer(layer), strict=True):
            np.testing.assert_array_equal(fused, walked)


def test_mixed_weights(tmp_path: Path) -> None:
    """A file whose matrices are partly in 8 bits, partly (where rows are not whole groups) in 16-bit floats."""
    ids, expected = tiny.golden("mlp_bias_f16")
    model = load(tiny.write_gguf("mlp_bias_f16", tmp_path / "model.gguf", "Q8_0"), threads=2)
    layouts = {linear.layout for linear in model.linears().values()}
    assert len(layouts) > 1
    fused = logits(model, ids)
    assert (fused.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.9
    model.fused = False
    np.testing.assert_array_equal(logits(model, ids), fused)


def test_results_are_the_same_for_any_number_of_threads_and_in_two_processes() -> None:
    several = json.loads(python("-m", "tests.model.model_cases", 1, 2, 3, NUMBA_NUM_THREADS="3"))
    another = json.loads(python("-m", "tests.model.model_cases", 2, NUMBA_NUM_THREADS="2"))
    assert set(several.values()) == {several["1"]}
    assert another["2"] == several["1"]


def test_plain_python_agrees() -> None:
    """NUMBA_DISABLE_JIT=1: a prompt and the tokens after it, with every kernel as Python that a debugger can enter."""
    program = "-m", "tests.model.model_cases", "tokens"
    plain, compiled = (json.loads(python(*program, NUMBA_DISABLE_JIT=flag)) for flag in "10")
    # A value at a tie is rounded to another half float where its last bit differs: 2^-11 of it.
    for got, expected, tolerance in zip(plain, compiled, (1e-4, 1e-4, 1e-4, 2e-3), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


# --- in any parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, WINDOWED], ids=["full", "window"])
@pytest.mark.parametrize("layout", ["f32", "int8"])
def test_a_text_in_parts_gives_the_bits_of_the_text_at_once(layout: str, config: ModelConfig) -> None:
    """Over three chunks of attention: token by token on one thread, and in parts that end anywhere."""
    model, one_thread = small_model(layout, 2, config), small_model(layout, 1, config)
    ids = text(600)
    whole = logits(model, ids)
    np.testing.assert_array_equal(run(one_thread, one_thread.new_cache(600), ids, [1] * 600), whole)
    for parts in ([132] * 4 + [72], [169, 1, 130, 300], [7, 5, 128, 3, 457]):
        np.testing.assert_array_equal(run(model, model.new_cache(600), ids, parts), whole, err_msg=str(parts[:4]))


@pytest.mark.parametrize("layout", ["f32", "f16", "int8"])
def test_prefill_is_token_by_token(layout: str, models: dict[str, Llama]) -> None:
    """Over two chunks of attention; the tokens on one thread."""
    one_thread, ids = small_model(layout, 1), text(290)
    one_by_one = run(one_thread, one_thread.new_cache(290), ids, [1] * 290)
    np.testing.assert_array_equal(one_by_one, logits(models[layout], ids))


@pytest.mark.parametrize(("layout", "kv"), [("f32", "f32"), ("int4", "f16")])
def test_later_tokens_do_not_change_earlier_logits(layout: str, kv: str, models: dict[str, Llama]) -> None:
    model, ids = models[layout], text(150)
    before = logits(model, ids, kv)
    for j in (1, 5, 6, 127, 128, 149):
        changed = ids.copy()
        changed[j] = (changed[j] + 1) % SMALL.vocab_size
        after = logits(model, changed, kv)
        np.testing.assert_array_equal(after[:j], before[:j])
        assert (after[j] != before[j]).any()


def test_a_window_forgets() -> None:
    """With one layer, a token that has left the window changes nothing; the last one in it does."""
    model = small_model("f32", config=dataclasses.replace(WINDOWED, num_hidden_layers=1))
    ids = text(60)
    before = logits(model, ids)[-1]
    out, within = ids.copy(), ids.copy()
    out[60 - 38] += 1
    within[60 - 37] += 1
    np.testing.assert_array_equal(logits(model, out % SMALL.vocab_size)[-1], before)
    assert (logits(model, within % SMALL.vocab_size)[-1] != before).any()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "layers"])
@pytest.mark.parametrize("layout", ["f32", "int4"])
def test_last_only_is_the_last_of_all(layout: str, fused: bool) -> None:
    model = small_model(layout)
    model.fused = fused
    for tokens in (1, 2, 6, 11, 132, 133):
        ids = text(tokens)
        every = logits(model, ids)
        last = model.forward(ids, model.new_cache(tokens), last_only=True)
        assert last.shape == (SMALL.vocab_size,)
        np.testing.assert_array_equal(last, every[-1])


def test_logits_go_where_they_are_asked_to(models: dict[str, Llama]) -> None:
    model, ids = models["f32"], text(3)
    out = np.empty((3, SMALL.vocab_size), np.float32)
    assert model.forward(ids, model.new_cache(3), out=out) is out
    np.testing.assert_array_equal(out, logits(model, ids))
    cache = model.new_cache(3)
    with pytest.raises(ValueError, match="out: expected shape"):
        model.forward(ids, cache, last_only=True, out=out)
    with pytest.raises(TypeError, match="out: expected a float32"):
        model.forward(ids, cache, out=out.astype(np.float64))
    assert cache.length == 0


# --- the cache between calls -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "layers"])
def test_what_was_truncated_leaves_no_trace(fused: bool) -> None:
    model = small_model("f32")
    model.fused = fused
    ids, other = text(200), text(200, seed=1)
    fresh = model.new_cache(200)
    expected = run(model, fresh, ids, [90, 50, *[1] * 60])
    used = model.new_cache(200)
    run(model, used, np.concatenate([ids[:90], other[90:]]), [90, 1, 109])
    assert used.keep_common_prefix(ids) == 90
    np.testing.assert_array_equal(run(model, used, ids[90:], [50, *[1] * 60]), expected[90:])
    used.clear()
    np.testing.assert_array_equal(run(model, used, ids, [90, 50, *[1] * 60]), expected)


def test_a_full_cache_stays_usable(models: dict[str, Llama]) -> None:
    model, ids = models["f32"], text(20)
    cache = model.new_cache(10)
    first = model.forward(ids[:8], cache)
    for too_many in (ids[8:11], ids):
        with pytest.raises(ContextFullError, match=f"{len(too_many)} more tokens do not fit, 8 of 10 are taken"):
            model.forward(too_many, cache)
        assert cache.length == 8
    last = model.forward(ids[8:10], cache)
    np.testing.assert_array_equal(np.concatenate([first, last]), logits(model, ids[:10]))
    with pytest.raises(ContextFullError, match="1 more tokens do not fit, 10 of 10 are taken"):
        model.forward(ids[:1], cache)


def test_an_interrupted_prompt_counts_as_not_taken(models: dict[str, Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = models["f32"], text(300)
    cache = model.new_cache(310)
    model.forward(ids[:10], cache)
    expected = run(model, model.new_cache(300), ids, [10, 290])[10:]
    original, passes = Working.run, []

    def interrupted(*arguments: object) -> None:
        passes.append(1)
        if len(passes) == 2:
            raise KeyboardInterrupt
        original(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Working, "run", interrupted)
        model.forward(ids[10:], cache)
    assert len(passes) == 2 and cache.length == 10
    np.testing.assert_array_equal(model.forward(ids[10:], cache), expected)


@pytest.mark.parametrize("kv", ["f32", "int8"])
def test_layers_in_several_calls(kv: str, models: dict[str, Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the calls of a long prompt Ctrl-C is seen: the results are the same, and nothing of it remains."""
    layout = "int8" if kv == "int8" else "f32"  # pairs that other tests compile as well
    model, ids = models[layout], text(60)
    parts = [41, 1, 18]
    expected = run(model, model.new_cache(60, kv), ids, parts)
    calls: list[int] = []
    original = Region.run

    def counted(region: Region, table: int, threads: int) -> None:
        calls.append(1)
        if len(calls) == interrupt_at:
            raise KeyboardInterrupt
        original(region, table, threads)

    monkeypatch.setattr(replay, "MACS_PER_CALL", 1)
    monkeypatch.setattr(Region, "run", counted)
    interrupt_at = 0
    cache = model.new_cache(60, kv)
    np.testing.assert_array_equal(run(model, cache, ids, parts), expected)
    assert len(calls) == len(parts) * model.config.num_hidden_layers
    cache.truncate(41)
    interrupt_at = len(calls) + 2
    with pytest.raises(KeyboardInterrupt):
        model.forward(ids[41:], cache)
    assert cache.length == 41
    np.testing.assert_array_equal(run(model, cache, ids[41:], parts[1:]), expected[41:])


def test_passes_of_large_models_have_fewer_tokens(models: dict[str, Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    model = models["f32"]
    weights = sum(x.size for name, x in model.linears().items() if name.startswith("layers.0."))
    assert model.prefill_tokens == PREFILL_TOKENS
    for most, expected in ((20 * weights, 18), (18 * weights, 18), (18 * weights - 1, 12), (weights, 6)):
        monkeypatch.setattr(llama, "LAYER_MACS", most)
        assert model.prefill_tokens == expected


# --- what is refused ---------------------------------------------------------------------------------------------


def test_ids_outside_the_vocabulary_are_refused(models: dict[str, Llama]) -> None:
    model = models["f32"]
    cache = model.new_cache(10)
    for wrong in (-1, SMALL.vocab_size, 1 << 62, -(1 << 62)):
        with pytest.raises(ValueError, match=rf"^ids: expected token ids from 0 to 210, found {wrong}$"):
            model.forward([3, wrong, 4], cache)
    nothing: list[int] = []
    for empty in (nothing, np.array(nothing), iter(nothing)):
        with pytest.raises(ValueError, match="^ids: expected at least one token id"):
            model.forward(empty, cache)
    for not_integers in ([1.0, 2.0], np.array([1.5]), ["a"], [True], [None]):
        with pytest.raises(TypeError, match="^ids: expected integers"):
            model.forward(not_integers, cache)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^ids: expected 1 dimensions"):
        model.forward(np.zeros((2, 2), np.int64), cache)
    assert cache.length == 0


def test_every_kind_of_integers_is_taken(models: dict[str, Llama]) -> None:
    model = models["f32"]
    expected = logits(model, np.array([5, 6, 7]))
    for ids in ([5, 6, 7], (5, 6, 7), iter([5, 6, 7]), np.array([5, 6, 7], np.uint8), np.arange(5, 11)[:3]):
        np.testing.assert_array_equal(model.forward(ids, model.new_cache(3)), expected)


def test_options_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="^weights: expected one of auto, f32, .*, found 'int3'"):
        Llama(SMALL, layout="int3")
    for threads in (0, -1, 1.5):
        with pytest.raises(ValueError, match="^threads: expected a positive integer, found"):
            Llama(SMALL, threads=threads)  # type: ignore[arg-type]


# --- loading -----------------------------------------------------------------------------------------------------


def test_random_weights_depend_on_the_seed_alone() -> None:
    first, again, other = (Llama(SMALL, seed=seed) for seed in (1, 1, 2))
    ids = text(4)
    np.testing.assert_array_equal(logits(first, ids), logits(again, ids))
    assert (logits(first, ids) != logits(other, ids)).any()


def test_the_file_may_go_after_loading(tmp_path: Path) -> None:
    path = tiny.write_gguf("llama2_mha", tmp_path / "model.gguf")
    ids, expected = tiny.golden("llama2_mha")
    model = load(path)
    path.write_bytes(b"")
    path.unlink()
    assert np.abs(logits(model, ids) - expected).max() <= 2e-4


def test_progress_counts_every_weight() -> None:
    counted: list[int] = []
    model = Llama(SMALL, progress=counted.append)
    assert sum(counted) == sum(linear.rows * linear.columns for linear in model.linears().values())


def test_a_tied_head_is_the_embedding() -> None:
    tied = Llama(dataclasses.replace(SMALL, tie_word_embeddings=True))
    untied = Llama(SMALL)
    assert tied.decoder.head is tied.decoder.embed
    assert set(untied.linears()) - set(tied.linears()) == {"head"}
    assert untied.nbytes - tied.nbytes == untied.decoder.head.nbytes


def test_threads_that_cannot_be_had_are_said(caplog: pytest.LogCaptureFixture) -> None:
    most = most_threads()
    assert Llama(SMALL, threads=most).threads == most and not caplog.records
    assert Llama(SMALL, threads=most + 7).threads == most
    assert f"threads: expected at most {most} in this process, found {most + 7}" in caplog.text
