"""What other models do, as layer code alone: float64 agrees, and tape and eager path have the same bits."""

from __future__ import annotations

import numpy as np
import pytest

from ruvllm.model import Llama
from ruvllm.model.batch import Batch
from ruvllm.model.reference import reference_logits
from tests.model.architectures import ARCHITECTURES, CONFIG, ReducedLayer, Weights, build

IDS = np.random.default_rng(1).integers(0, 300, 60)
PARTS = ((0, 40), (40, 41), (41, 42), (42, 47), (47, 48))


class Checkpoint(Weights):
    config = CONFIG


def logits(model: Llama, kv: str = "f32") -> np.ndarray:
    cache = model.new_cache(64, kv)
    return np.concatenate([model.forward(IDS[lo:hi], cache) for lo, hi in PARTS])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float64_agrees(name: str) -> None:
    expected = reference_logits(Checkpoint(CONFIG, seed=3), IDS[:48], ARCHITECTURES[name])
    found = logits(build(name, "f32"))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    plain = reference_logits(Checkpoint(CONFIG, seed=3), IDS[:48])
    assert name == "llama" or np.abs(plain - expected).max() > 0.01  # it is another model


@pytest.mark.parametrize("layout", ["int4", "f32", "bf16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tape_and_eager_path_have_the_same_bits(name: str, layout: str) -> None:
    found = []
    for fused, threads in ((False, 1), (True, 1), (True, 2), (True, 3)):
        model = build(name, layout, threads=1)
        model.fused, model.threads = fused, threads
        ReducedLayer.seen.clear()
        found.append([logits(model), *ReducedLayer.seen])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kv", ["f16", "int8"])
def test_other_caches_have_the_same_bits_on_both_paths(kv: str) -> None:
    model = build("gemma", "int8", threads=2)
    fused = logits(model, kv)
    model.fused = False
    np.testing.assert_array_equal(logits(model, kv), fused)


@pytest.mark.parametrize("name", ["llama", "gemma", "mixture"])
@pytest.mark.parametrize("kv", ["f32", "int8"])
def test_a_batch_has_the_bits_of_each_sequence_alone(name: str, kv: str) -> None:
    model = build(name, "int4", threads=2)
    prompts = [IDS[:n] for n in (1, 33, 7, 20)]
    alone = []
    for prompt in prompts:
        cache = model.new_cache(64, kv)
        model.forward(prompt, cache)
        alone.append(np.stack([model.forward([token], cache, last_only=True) for token in (5, 6, 7)]))
    caches = [model.new_cache(50 + i, kv) for i in range(len(prompts))]
    for prompt, cache in zip(prompts, caches, strict=True):
        model.forward(prompt, cache)
    batch = Batch(model, caches)
    together = np.stack([batch.forward([token] * len(caches)) for token in (5, 6, 7)], axis=1)
    np.testing.assert_array_equal(together, alone)
    assert [len(cache) for cache in caches] == [len(prompt) + 3 for prompt in prompts]


def test_what_a_batch_refuses() -> None:
    model = build("llama", "int4")
    with pytest.raises(ValueError, match="caches: expected some of one dtype, found none"):
        Batch(model, [])
    with pytest.raises(ValueError, match="caches: expected some of one dtype, found f16, f32"):
        Batch(model, [model.new_cache(4), model.new_cache(4, "f16")])
    batch = Batch(model, [model.new_cache(4), model.new_cache(4)])
    with pytest.raises(ValueError, match="ids: expected 2, one for each sequence, found 1"):
        batch.forward([1])
