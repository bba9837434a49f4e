"""KVCache: what it holds after tokens went through a model, and what it refuses."""

import dataclasses
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ruvllm.errors import ContextFullError
from ruvllm.model import KVCache, ModelConfig
from ruvllm.model.kv_size import cache_bytes
from ruvllm.model.random_weights import RandomWeights
from ruvllm.model.reference import rms_norm, rope_angles, rotate
from tests.model.model_cases import MIXED, SMALL, run, small_model, text

ONE_LAYER = dataclasses.replace(SMALL, num_hidden_layers=1)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "layers"])
@pytest.mark.parametrize(("kv", "tolerance"), [("f32", 2e-6), ("f16", 5e-4), ("int8", 4e-3)])
def test_holds_turned_keys_and_values_of_every_position(kv: str, tolerance: float, fused: bool) -> None:
    model, ids = small_model("f32", config=ONE_LAYER), text(40)
    model.fused = fused
    cache = model.new_cache(50, kv)
    run(model, cache, ids, [20, 1, 1, 18])
    assert len(cache) == 40 and cache.free_positions == 10
    np.testing.assert_array_equal(cache.ids[:40], ids)

    weights = RandomWeights(ONE_LAYER, seed=7)
    get = lambda name: weights.tensor(name).float32().astype(np.float64)
    h = rms_norm(get("embed")[ids], get("layers.0.attn_norm"), SMALL.rms_norm_eps)
    k, v = (
        (h @ get(f"layers.0.{name}").T + get(f"layers.0.{name}_bias")).reshape(40, -1, SMALL.head_dim).swapaxes(0, 1)
        for name in "kv"
    )
    k = rotate(k, *rope_angles(ONE_LAYER, 40))
    got_k, got_v = cache.layer(0)
    assert got_k.shape == got_v.shape == (40, SMALL.num_key_value_heads, SMALL.head_dim)
    assert got_k.dtype == got_v.dtype == np.float32
    assert np.abs(got_k - k.swapaxes(0, 1)).max() <= tolerance * np.abs(k).max()
    assert np.abs(got_v - v.swapaxes(0, 1)).max() <= tolerance * np.abs(v).max()


def test_sizes() -> None:
    small, large = KVCache(SMALL, 16), KVCache(SMALL, 160)
    assert KVCache(SMALL, 257).nbytes == 2 * KVCache(SMALL, 256).nbytes == 2 * 16 * small.nbytes  # whole blocks
    # Two layers, two kv heads: keys of 18, values of 18 padded to 32, four bytes each; two with f16.
    assert small.nbytes == 16 * 2 * 2 * (18 + 32) * 4
    assert large.nbytes == 10 * small.nbytes == 2 * KVCache(SMALL, 160, "f16").nbytes
    # int8: one byte each, and 8 bytes of scales for each position of a head.
    assert KVCache(SMALL, 160, "int8").nbytes == 160 * 2 * 2 * (18 + 8 + 32)
    assert KVCache(SMALL, 17).max_tokens == 17
    assert repr(KVCache(SMALL, 17, "f16")).startswith("KVCache(0 of 17 tokens, f16")


def test_options_are_refused_by_name() -> None:
    for wrong in (0, -1, 1.5, "10", None):
        with pytest.raises(ValueError, match="^max_tokens: expected a positive integer, found"):
            KVCache(SMALL, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^kv: expected one of f32, f16, int8, found 'int4'"):
        KVCache(SMALL, 10, "int4")


def filled(ids: np.ndarray, max_tokens: int = 32) -> KVCache:
    """A cache that holds these tokens, as far as its book-keeping goes."""
    cache = KVCache(ONE_LAYER, max_tokens)
    cache.ids[: len(ids)] = ids
    cache.length = len(ids)
    return cache


def test_truncate_and_clear() -> None:
    cache = filled(np.arange(10))
    cache.truncate(10)
    assert len(cache) == 10
    for wrong in (-1, 11):
        with pytest.raises(ValueError, match=f"^length: expected 0 to 10, found {wrong}$"):
            cache.truncate(wrong)
    cache.truncate(4)
    assert len(cache) == 4 and cache.free_positions == 28
    cache.clear()
    assert len(cache) == 0 and cache.free_positions == 32


def test_require_room() -> None:
    cache = filled(np.arange(30))
    cache.require_free(0)
    cache.require_free(2)
    with pytest.raises(ContextFullError, match="^context full: 3 more tokens do not fit, 30 of 32 are taken$"):
        cache.require_free(3)


@given(held=st.lists(st.integers(0, 2), max_size=12), wanted=st.lists(st.integers(0, 2), min_size=1, max_size=12))
def test_common_prefix(held: list[int], wanted: list[int]) -> None:
    cache = filled(np.array(held, np.int64))
    expected = 0
    while expected < min(len(held), len(wanted) - 1) and held[expected] == wanted[expected]:
        expected += 1
    assert cache.keep_common_prefix(np.array(wanted)) == expected == len(cache)


def test_a_cache_serves_one_thread_at_a_time() -> None:
    model, ids = small_model("f32", config=ONE_LAYER), text(4)
    cache = model.new_cache(10)
    caught: list[BaseException] = []

    def intrude() -> None:
        try:
            model.forward(ids, cache)
        except RuntimeError as error:
            caught.append(error)

    with cache.in_use():
        other = threading.Thread(target=intrude)
        other.start()
        other.join()
        model.forward(ids[:1], cache)  # whoever has it may use it
    assert len(caught) == 1 and str(caught[0]).startswith("this KV cache is in use by another thread: give each")
    cache.clear()
    expected = model.forward(ids, model.new_cache(10))
    with pytest.raises(ValueError, match="ids: expected token ids"):
        model.forward([-1], cache)
    np.testing.assert_array_equal(model.forward(ids, cache), expected)


def test_the_cache_of_a_windowed_layer_is_a_ring() -> None:
    """A window of 20 and a pass of 132 tokens fit into 256 positions, however long the context."""
    cache, small = KVCache(MIXED, 2000), KVCache(MIXED, 100)
    plain = KVCache(dataclasses.replace(MIXED, sliding_window=None, layer_types=()), 2000)
    for full in (cache, small, plain):
        full.reserve(full.max_tokens)
        assert full.held_bytes == full.nbytes
    assert cache.capacities == [256, 2048, 256]
    assert cache.nbytes == cache_bytes(MIXED, 2000) == plain.nbytes * (256 + 2048 + 256) // (3 * 2048)
    assert small.capacities == [112] * 3  # never more than the context


@pytest.mark.parametrize("kv", ["f32", "f16", "int8"])
@pytest.mark.parametrize("config", [SMALL, MIXED], ids=["plain", "windowed"])
def test_memory_grows_with_the_text(config: ModelConfig, kv: str) -> None:
    """In steps, whatever was there stays: the bits are those of a cache that had all its memory at once."""
    model, ids, parts = small_model("f32", config=config), text(620), [1, 255, 1, 100, 3, 132, 128]
    at_once = model.new_cache(700, kv)
    at_once.reserve(700)
    expected = run(model, at_once, ids, parts)
    cache, sizes, position = model.new_cache(700, kv), [], 0
    for part in parts:
        found = model.forward(ids[position : position + part], cache)
        np.testing.assert_array_equal(found, expected[position : position + part])
        position += part
        sizes.append(len(cache._blocks[-1]))
    assert sizes == [1, 1, 2, 2, 2, 2, 3]


@pytest.mark.parametrize("kv", ["f32", "f16", "int8"])
def test_a_ring_gives_the_bits_of_a_whole_cache(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, parts = small_model("f32", config=MIXED), text(700), [300, 1, 132, 130, 1, 1, 135]
    ring = run(model, model.new_cache(700, kv), ids, parts)
    cache = model.new_cache(700, kv)
    run(model, cache, ids, parts)
    k, v = cache.layer(0)
    with monkeypatch.context() as patch:
        patch.setattr("ruvllm.model.kv_size.PREFILL_TOKENS", 10_000)
        whole = model.new_cache(700, kv)
        whole.reserve(700)
        assert whole.capacities == [768] * 3
        np.testing.assert_array_equal(run(model, whole, ids, parts), ring)
    assert k.shape == v.shape == (256, MIXED.num_key_value_heads, MIXED.head_dim)
    for found, expected in zip((k, v), whole.layer(0), strict=True):
        np.testing.assert_array_equal(found, expected[-256:])


def test_a_ring_is_truncated_as_far_as_it_remembers() -> None:
    model, ids = small_model("f32", config=MIXED), text(600)
    expected = run(model, model.new_cache(600), ids, [600])
    cache = model.new_cache(600)
    run(model, cache, ids, [600])
    assert cache.oldest == 600 - 256 + 20 - 1
    with pytest.raises(ValueError, match="^length: expected 0, or 363 to 600, found 362: layers with a window have "):
        cache.truncate(362)
    cache.truncate(363)
    np.testing.assert_array_equal(run(model, cache, ids[363:], [100, 137]), expected[363:])
    assert cache.keep_common_prefix(np.concatenate([ids[:100], ids[:10]])) == 0 == len(cache)
    np.testing.assert_array_equal(run(model, cache, ids, [600]), expected)
    cache.clear()
    assert cache.oldest == 0


def test_a_ring_of_another_window_is_refused() -> None:
    other = dataclasses.replace(MIXED, sliding_window=200)
    with pytest.raises(ValueError, match="^cache: it was made for a model whose layers have other windows$"):
        small_model("f32", config=other).forward(text(3), KVCache(MIXED, 2000))
