"""What other models do, as layer code alone: float64 agrees, and tape and eager path have the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ruvllm.model import Llama, LoraAdapter, LoraConfig, MicroLora
from ruvllm.model.layer import Decoder, MixtureOfExperts, TransformerLayer
from ruvllm.model.ops import Ops
from ruvllm.model.reference import reference_logits
from tests.model.architectures import ARCHITECTURES, CONFIG, ReducedLayer, Weights, build, config_of, decoder

IDS = np.random.default_rng(1).integers(0, 300, 60)
PARTS = ((0, 40), (40, 41), (41, 42), (42, 47), (47, 48))


def logits(model: Llama, kv: str = "f32") -> np.ndarray:
    cache = model.new_cache(64, kv)
    return np.concatenate([model.forward(IDS[lo:hi], cache) for lo, hi in PARTS])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float64_agrees(name: str) -> None:
    expected = reference_logits(Weights(config_of(name), seed=3), IDS[:48], ARCHITECTURES[name])
    found = logits(build(name, "f32"))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    plain = reference_logits(Weights(CONFIG, seed=3), IDS[:48])
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


class TwoRoutings(MixtureOfExperts):
    """Two routings at once, of 1 and of all experts, whose rows are products, scaled and read by Python too."""

    def __call__(self, ops: Ops, h: Any) -> Any:
        scores = ops.linear(h, self.router)
        routings = ops.route(scores, 1), ops.route(scores, 5, normalised=False)
        gathered = [ops.gather(h, routing) for routing in routings]
        ops.call(h, self.halve)  # what was gathered stays as it was
        out = h
        for routing, x in zip(routings, gathered, strict=True):
            gate, up = ops.grouped_linear(x, routing, self.gates), ops.grouped_linear(x, routing, self.ups)
            down = ops.grouped_linear(ops.silu_mul(gate, up), routing, self.downs)
            out = ops.add(out, ops.combine(ops.add(down, x), routing))
        return out

    def halve(self, h: np.ndarray) -> None:
        h *= np.float32(0.5)


@pytest.mark.parametrize("layout", ["f32", "int8"])
def test_two_routings_at_once(layout: str) -> None:
    architecture = decoder(type("TwoRoutingsLayer", (TransformerLayer,), {"experts_type": TwoRoutings}))
    config = config_of("mixture")
    expected = reference_logits(Weights(config, seed=3), IDS[:48], architecture)
    found = []
    for threads, fused in ((1, True), (2, True), (1, False)):
        model = Llama(config, Weights(config, seed=3), layout, threads, architecture=architecture)
        model.fused = fused
        found.append(logits(model))
        np.testing.assert_array_equal(found[-1], found[0])
    if layout == "f32":  # 8 bits send some tokens to other experts
        assert np.abs(found[0] - expected).max() <= 1e-4 * np.abs(expected).max()


def wrong(change: Callable[[Ops, Any], Any]) -> Llama:
    """A model whose layers end with this change."""

    class Layer(TransformerLayer):
        def __call__(self, ops: Ops, x: Any) -> Any:
            return change(ops, super().__call__(ops, x))

    return Llama(CONFIG, Weights(CONFIG, seed=3), "f32", 1, architecture=decoder(Layer))


def test_layer_code_that_does_not_fit_is_refused() -> None:
    """Where eager NumPy would raise, the tape must not read or write beyond an array."""
    linear = build("llama", "f32").decoder.layers[0].mlp.down  # 200 inputs
    cases: list[tuple[str, Callable[[Ops, Any], Any]]] = [
        ("layers.0.down: expected 200 inputs, found 96", lambda ops, x: ops.linear(x, linear)),
        ("rms_norm: expected a weight of 96, found 32", lambda ops, x: ops.rms_norm(x, np.ones(32, np.float32), 1e-5)),
        ("do not split into heads of 36", lambda ops, x: ops.heads(x, 36)),
        ("route: expected 1 <= k <= experts", lambda ops, x: ops.route(x, 97)),
    ]
    for message, change in cases:
        with pytest.raises(ValueError, match=message):
            model = wrong(change)
            model.forward(IDS[:3], model.new_cache(8))

    class Longer(Decoder):
        def __call__(self, ops: Ops, x: Any) -> Any:
            logits = super().__call__(ops, x)
            return ops.add(logits, logits)

    model = Llama(CONFIG, Weights(CONFIG, seed=3), "f32", 1, architecture=Longer)
    with pytest.raises(ValueError, match="add: nothing may follow ops.logits"):
        model.forward(IDS[:3], model.new_cache(8))
    misplaced = build("llama", "f32")
    misplaced.decoder.layers[0].attention.layer = 3
    with pytest.raises(ValueError, match="found layer 3 with 2 kv heads of 32, expected one of 3 layers"):
        misplaced.forward(IDS[:3], misplaced.new_cache(8))


def test_a_hook_sees_the_same_rows_on_both_paths() -> None:
    """At the start, in the middle, on heads, on the last rows and on logits."""
    seen: list[np.ndarray] = []

    def keep(x: np.ndarray) -> None:
        seen.append(x.copy())

    class Hooked(Decoder):
        def __call__(self, ops: Ops, x: Any) -> Any:
            ops.call(x, keep)
            for layer in self.layers:
                x = layer(ops, ops.boundary(x))
            q = ops.heads(ops.linear(x, self.layers[0].attention.q), CONFIG.head_dim)
            last = ops.call(ops.last_rows(ops.call(x, keep)), keep)
            ops.call(q, keep)
            return ops.call(ops.logits(ops.rms_norm(last, self.norm, self.eps), self.head), keep)

    model = Llama(CONFIG, Weights(CONFIG, seed=3), "int4", 2, architecture=Hooked)
    found = []
    for fused in (False, True):
        model.fused, cache = fused, model.new_cache(40)
        seen.clear()
        for ids, last_only in ((IDS[:20], True), (IDS[20:21], True), (IDS[21:25], False)):
            model.forward(ids, cache, last_only)
        found.append(list(seen))
    assert len(found[0]) == len(found[1]) == 15
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("fused", [False, True])
def test_a_hook_that_changes_what_was_rounded_changes_the_next_product(fused: bool) -> None:
    class Changed(TransformerLayer):
        def __call__(self, ops: Ops, x: Any) -> Any:
            h = ops.rms_norm(x, self.attn_norm, self.eps)
            before = ops.linear(h, self.attention.q)
            after = ops.linear(ops.call(h, self.halve), self.attention.q)
            return ops.add(x, ops.linear(ops.add(before, after), self.attention.o))

        def halve(self, h: np.ndarray) -> None:
            h *= np.float32(0.5)

    architecture = decoder(Changed)
    expected = reference_logits(Weights(CONFIG, seed=3), IDS[:9], architecture)
    model = Llama(CONFIG, Weights(CONFIG, seed=3), "int8", 1, architecture=architecture)
    model.fused = fused
    found = model.forward(IDS[:9], model.new_cache(9))
    assert np.abs(found - expected).max() <= 0.05 * np.abs(expected).max()


def test_a_cache_follows_weights_that_change() -> None:
    """Adapters merged and unmerged while a conversation is held in one cache."""
    model = build("llama", "f32")
    lora = MicroLora(model)
    adapter = LoraAdapter(CONFIG, LoraConfig(4))
    for b in adapter.b.values():
        b[:] = np.random.default_rng(2).standard_normal(b.shape)
    lora.attach(adapter, "a")
    cache = model.new_cache(40)
    model.forward(IDS[:5], cache)
    lora.use("a")
    for change in (lora.merge, lora.unmerge):
        change()
        found = []
        for fused in (True, False):
            model.fused = fused
            found.append(model.forward([7], cache, last_only=True))
            cache.truncate(len(cache) - 1)
        np.testing.assert_array_equal(found[0], found[1])
        model.fused = True
