"""Forks of KV caches: each goes on as if it were alone, and shares what none of them changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ruvllm.errors import InsufficientMemoryError
from ruvllm.model import KVCache, Llama, ModelConfig
from ruvllm.model.cache_file import load_cache
from tests.model.model_cases import MIXED, SMALL, small_model, text


def blocks_of(cache: KVCache) -> set[int]:
    return {block.address for blocks in cache._blocks for block in blocks}


def require_bits_of_its_text(model: Llama, cache: KVCache, held: list[int]) -> None:
    """Its next logits are those after ``held`` in a cache of their own."""
    assert cache.ids[: len(cache)].tolist() == held
    alone = model.new_cache(cache.max_tokens, cache.dtype)
    if held:
        model.forward(held, alone)
    length = len(cache)
    np.testing.assert_array_equal(model.forward([5, 6], cache), model.forward([5, 6], alone))
    cache.truncate(length)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "layers"])
@pytest.mark.parametrize("kv", ["f32", "f16", "int8"])
@pytest.mark.parametrize("config", [SMALL, MIXED], ids=["plain", "windowed"])
def test_a_family_of_forks(config: ModelConfig, kv: str, fused: bool) -> None:
    """Caches are continued, forked, truncated, cleared and dropped at random."""
    rng = np.random.default_rng([len(kv), fused])
    model = small_model("f32", 1, config)
    model.fused = fused
    first = text(530)
    family: list[tuple[KVCache, list[int]]] = [(model.new_cache(900, kv), [])]
    model.forward(first, family[0][0], last_only=True)
    family[0][1].extend(first.tolist())
    for _ in range(40):
        chosen = int(rng.integers(len(family)))
        cache, held = family[chosen]
        action = rng.choice(["go on", "fork", "truncate", "clear", "drop"], p=[0.4, 0.3, 0.2, 0.05, 0.05])
        if action == "go on" and len(held) < 750:
            more = text(int(rng.choice([1, 2, 17, 120])), seed=int(rng.integers(1000)))
            model.forward(more, cache)
            held.extend(more.tolist())
        elif action == "fork" and len(family) < 6:
            family.append((cache.fork(), list(held)))
        elif action == "truncate" and held:
            length = int(rng.integers(max(1, cache.oldest), len(held) + 1))
            cache.truncate(length)
            del held[length:]
        elif action == "clear":
            cache.clear()
            held.clear()
        elif action == "drop" and len(family) > 1:
            del family[chosen]
    assert len(family) > 2
    for cache, held in family:
        require_bits_of_its_text(model, cache, held)


@pytest.mark.parametrize("config", [SMALL, MIXED], ids=["plain", "windowed"])
def test_forks_share_what_they_do_not_write(config: ModelConfig) -> None:
    model = small_model("f32", 1, config)
    cache = model.new_cache(900)
    model.forward(text(600), cache, last_only=True)
    groups, before = len(cache._blocks), [block.memory.copy() for blocks in cache._blocks for block in blocks]
    fork = cache.fork()
    second = fork.fork()
    assert blocks_of(cache) == blocks_of(fork) == blocks_of(second)
    model.forward([1], fork)
    assert len(blocks_of(fork) - blocks_of(cache)) == groups  # the last block of each group of layers
    copied = blocks_of(fork)
    model.forward(text(100, seed=3), fork)
    assert blocks_of(fork) == copied  # the block is its own now
    second.clear()
    model.forward(text(3, seed=4), second)
    for block, expected in zip((b for blocks in cache._blocks for b in blocks), before, strict=True):
        np.testing.assert_array_equal(block.memory, expected)
    assert len(cache) == 600 and len(fork) == 701 and len(second) == 3


@pytest.mark.parametrize("config", [SMALL, MIXED], ids=["plain", "windowed"])
def test_a_fork_is_saved_as_itself(config: ModelConfig, tmp_path: Path) -> None:
    model = small_model("int4", 1, config)
    cache = model.new_cache(700, "f16")
    ids = text(400)
    model.forward(ids, cache, last_only=True)
    fork = cache.fork()
    model.forward(text(9, seed=2), fork)
    model.forward(text(30, seed=3), cache)
    fork.save(tmp_path / "fork.kv")
    read = load_cache(model, tmp_path / "fork.kv")
    np.testing.assert_array_equal(read.ids[:409], np.concatenate([ids, text(9, seed=2)]))
    for layer in range(config.num_hidden_layers):
        for found, expected in zip(read.layer(layer), fork.layer(layer), strict=True):
            np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(model.forward([1], read), model.forward([1], fork))


def test_a_fork_keeps_what_its_tokens_were_computed_with() -> None:
    model, ids = small_model("f32", 1), text(20)
    cache = model.new_cache(40)
    model.forward(ids, cache)
    fork = cache.fork()
    cache.truncate(15)
    cache.restore(18)
    assert fork.keep_common_prefix(ids, model.filling) == 19 and len(cache) == 18
    model.weights_changed()
    model.forward([1], cache)
    assert fork.keep_common_prefix(ids, model.filling) == 0
    empty = model.new_cache(40).fork()
    np.testing.assert_array_equal(model.forward(ids, empty), model.forward(ids, model.new_cache(40)))


def test_a_fork_needs_memory_for_the_rest_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("f32", 1)
    cache = model.new_cache(1024)
    model.forward(text(600), cache, last_only=True)
    rest = cache.nbytes - cache.held_bytes
    assert cache.held_bytes == 3 * rest == 3 * cache.nbytes // 4
    monkeypatch.setattr("ruvllm.kernels.memory.free_memory", lambda: rest)
    cache.fork()
    monkeypatch.setattr("ruvllm.kernels.memory.free_memory", lambda: rest - 1)
    with pytest.raises(InsufficientMemoryError, match="^fork of a KV cache of 1024 tokens"):
        cache.fork()
