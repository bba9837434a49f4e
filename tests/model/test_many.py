"""Passes over several sequences: each gets the bits that it gets alone, whatever shares its pass, block or pool."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ruvllm.batching import Engine, Generated, Scored
from ruvllm.batching.sequence import Embedded
from ruvllm.batching.texts import embeddings, reading
from ruvllm.errors import ContextFullError, InsufficientMemoryError
from ruvllm.model import Llama, ModelConfig, RopeConfig
from ruvllm.model.generate import generate
from ruvllm.model.kv_pool import BLOCK, KVPool, block_bytes, sequence_bytes
from ruvllm.model.many import Many, Run
from ruvllm.model.sampling.options import Sampling
from ruvllm.model.sampling.sampler import Sampler
from tests.model.architectures import ARCHITECTURES, build
from tests.model.model_cases import MIXED, PLAIN, SMALL, WINDOWED, small_model, text

LENGTHS = (1, 33, 300, 520, 70)


def alone(model: Llama, ids: np.ndarray, kv: str) -> np.ndarray:
    """Logits (T, V) of a text on its own: half of it as a prompt, the rest token by token."""
    cache, half = model.new_cache(len(ids), kv), len(ids) // 2
    rows = [model.forward(ids[:half], cache)] if half else []
    return np.concatenate([*rows, *(model.forward([token], cache) for token in ids[half:])])


def together(model: Llama, texts: list[np.ndarray], kv: str, seed: int = 0) -> list[np.ndarray]:
    """Logits (T, V) of texts that share passes, pieces of them at random, in blocks of a pool in a random order."""
    rng = np.random.default_rng(seed)
    pool = KVPool(model.config, 12 * block_bytes(model.config, kv), kv)
    many, groups, done = Many(model, pool), range(len(pool.layout.nbytes)), [0] * len(texts)
    free = [[pool.allocate(group) for group in groups] for _ in range(12)]
    rng.shuffle(free)
    blocks: list[list[Any]] = [[] for _ in texts]
    found: list[list[np.ndarray]] = [[] for _ in texts]
    while any(n < len(ids) for n, ids in zip(done, texts, strict=True)):
        runs, who, left = [], [], many.most_tokens
        for i in rng.permutation(len(texts)):
            count = int(min(left, len(texts[i]) - done[i], rng.choice([0, 1, 1, 2, 9, 60])))
            if not count:
                continue
            while len(blocks[i]) * BLOCK < done[i] + count:
                blocks[i].append(free.pop())
            tables = np.array([[found[group].address for found in blocks[i]] for group in groups])
            runs.append(Run(texts[i][done[i] : done[i] + count], done[i], tables, count, len(texts[i])))
            who.append(i)
            done[i], left = done[i] + count, left - count
        if runs:
            logits, row = many.forward(runs), 0
            for i, run in zip(who, runs, strict=True):
                found[i].append(logits[row : row + run.wanted].copy())
                row += run.wanted
    return [np.concatenate(parts) for parts in found]


@pytest.mark.parametrize(
    ("layout", "kv", "config"), [("int4", "f32", PLAIN), ("f32", "f16", WINDOWED), ("int8", "int8", SMALL)]
)
def test_logits_are_those_of_each_text_alone(layout: str, kv: str, config: ModelConfig) -> None:
    model = small_model(layout, 2, config)
    texts = [text(n, seed=n) for n in LENGTHS]
    for ids, found in zip(texts, together(model, texts, kv), strict=True):
        np.testing.assert_array_equal(found, alone(model, ids, kv))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str) -> None:
    model = build(name, "int4", threads=2)
    texts = [text(n, model.config.vocab_size, seed=n) for n in (1, 40, 11)]
    for ids, found in zip(texts, together(model, texts, "f32"), strict=True):
        np.testing.assert_array_equal(found, alone(model, ids, "f32"))


def test_rotary_embeddings_that_depend_on_the_capacity() -> None:
    rope = RopeConfig(theta=500.0, scaling="dynamic", factor=2.0, original_max_position=32)
    model = small_model("f32", 1, replace(SMALL, rope=rope))
    texts = [text(n, seed=n) for n in (20, 50, 90)]
    for ids, found in zip(texts, together(model, texts, "f32"), strict=True):
        np.testing.assert_array_equal(found, alone(model, ids, "f32"))


# The engine.


def prompts_of(
    rng: np.random.Generator, count: int, lengths: tuple[int, ...], shared: tuple[int, ...]
) -> list[np.ndarray]:
    """Prompts, of which half begin alike."""
    beginning = text(300, seed=99)
    found = [text(int(rng.choice(lengths)), seed=i) for i in range(count)]
    return [
        np.concatenate([beginning[: rng.choice(shared)], ids]) if rng.random() < 0.5 else ids for ids in found
    ]  # fmt: skip


def sampling(i: int) -> Sampling:
    return Sampling(temperature=i % 3 * 0.5, top_k=20, repetition_penalty=1.1 if i % 2 else 1.0, seed=i)


def engine_of(model: Llama, blocks: int, sequences: int = 6, kv: str = "f32") -> Engine:
    return Engine(model, kv, memory=blocks * block_bytes(model.config, kv), sequences=sequences)


@pytest.mark.parametrize(
    ("config", "blocks", "cancelled", "lengths"),
    [
        (SMALL, 40, 0.0, (1, 5, 33, 280)), (SMALL, 5, 0.05, (5, 280)), (SMALL, 4, 0.0, (240, 250)),
        (MIXED, 40, 0.0, (5, 280, 600)), (MIXED, 5, 0.05, (240, 500, 690)),
        (MIXED, 3, 0.0, (240, 250)), (WINDOWED, 3, 0.0, (240, 500, 690)),
    ],
)  # fmt: skip
def test_random_arrivals(config: ModelConfig, blocks: int, cancelled: float, lengths: tuple[int, ...]) -> None:
    """Sequences come and go at random, in a pool that is large, small, or so small that some must give blocks back."""
    rng = np.random.default_rng(blocks)
    model = small_model("int4", 2, config)
    prompts = prompts_of(rng, 10, lengths, (40, 256, 300))
    most = [int(rng.integers(10, 30)) for _ in prompts]
    engine = engine_of(model, blocks)
    sequences = [
        Generated(ids, Sampler(sampling(i)), n, len(ids) + n)
        for i, (ids, n) in enumerate(zip(prompts, most, strict=True))
    ]
    came: dict[object, list[int]] = {sequence: [] for sequence in sequences}
    left, gone = list(sequences), set()
    while left or engine.busy:
        while left and rng.random() < 0.6:
            engine.submit(left.pop(0))
        for sequence, token in engine.step():
            assert token is not None
            came[sequence].append(token.id)
        require_sound(engine)
        for sequence in engine.running + engine.waiting:
            if rng.random() < cancelled:
                engine.cancel(sequence)
                gone.add(sequence)
    for i, sequence in enumerate(sequences):
        cache = model.new_cache(len(prompts[i]) + most[i], "f32")
        expected = [token.id for token in generate(model, cache, prompts[i], sampling(i), most[i])]
        assert came[sequence] == (expected[: len(came[sequence])] if sequence in gone else expected)
    assert bool(gone) == bool(cancelled)
    assert engine.preemptions > 0 or blocks > 4
    assert not engine.prefixes.used and not any(node.users for node in engine.prefixes)


def require_sound(engine: Engine) -> None:
    """Every block of the pool is free or in one node, those that sequences see are there, and memory is counted."""
    pool, prefixes = engine.pool, engine.prefixes
    nodes = {*prefixes, *(node for sequence in engine.running for node in sequence.path.nodes)}
    held = [(g, block.address) for node in nodes for g, block in enumerate(node.blocks) if block is not None]
    free = [(g, block.address) for g, blocks in enumerate(pool._free) for block in blocks]
    assert len({*held, *free}) == len(held) + len(free)
    assert sum(pool.layout.nbytes[g] for g, _ in held + free) == pool.allocated <= pool.memory
    needed = set()
    for sequence in engine.running:
        for group, window in enumerate(pool.layout.windows):
            first = 0 if window is None else max(0, sequence.computed - window + 1) // BLOCK
            needed |= {(group, node) for node in sequence.path.nodes[first:]}
    assert all(node.blocks[group] is not None for group, node in needed)
    assert sum(pool.layout.nbytes[group] for group, _ in needed) == prefixes.used


def test_windowed_layers_keep_what_a_pass_sees() -> None:
    """Of MIXED's three layers, two with a window of 20 need two blocks at the most, however long the text is."""
    model = small_model("int4", 2, MIXED)
    layer = block_bytes(MIXED) // 3
    assert sequence_bytes(MIXED, "f32", 200) == 3 * layer and sequence_bytes(MIXED, "f32", 1024) == (4 + 2 * 2) * layer
    assert Engine(model, memory=8 * layer - 1).max_tokens == 768
    engine = Engine(model, memory=8 * layer)
    assert engine.max_tokens == 1024
    ids = text(990)
    sequence = Generated(ids, Sampler(Sampling()), 30, 1020)
    engine.submit(sequence)
    engine.finish()
    expected = [token.id for token in generate(model, model.new_cache(1020, "f32"), ids, Sampling(), 30)]
    assert sequence.ids[990:].tolist() == expected and engine.preemptions == 0


def test_a_prefix_is_used_where_its_windows_are_still_there() -> None:
    model = small_model("int4", 2, MIXED)
    ids, layer = text(700), block_bytes(MIXED) // 3

    def reused(engine: Engine, prompt: np.ndarray) -> int:
        sequence = Generated(prompt, Sampler(Sampling()), 3, len(prompt) + 3)
        engine.submit(sequence)
        engine.finish()
        require_sound(engine)
        expected = [token.id for token in generate(model, model.new_cache(1000, "f32"), prompt, Sampling(), 3)]
        assert sequence.ids[len(prompt) :].tolist() == expected
        return sequence.reused_tokens

    branch, continued = np.concatenate([ids[:400], text(9, seed=1)]), np.concatenate([ids, text(9, seed=2)])
    engine = Engine(model, memory=40 * layer)
    assert [reused(engine, prompt) for prompt in (ids, branch, continued)] == [0, 400, 700]
    engine = Engine(model, memory=7 * layer)  # 3 + 2 x 2: the first block of the windowed layers is given up
    assert reused(engine, ids) == 0 and reused(engine, ids[:200]) == 0
    engine = Engine(model, memory=10 * layer)
    assert reused(engine, ids) == 0 and reused(engine, continued) == 700


def test_a_common_prefix_is_computed_once() -> None:
    model = small_model("int4", 2)
    prefix = text(300)
    engine = engine_of(model, 40, sequences=8)
    for i in range(12):
        engine.submit(Generated(np.concatenate([prefix, text(7, seed=i)]), Sampler(Sampling()), 1, 400))
    engine.finish()
    assert engine.computed_tokens == len(prefix) + 12 * 7
    again = Generated(np.concatenate([prefix, text(3, seed=50)]), Sampler(Sampling()), 1, 400)
    engine.submit(again)
    engine.finish()
    assert again.reused_tokens == len(prefix)


def test_a_text_that_is_computed_again_has_the_same_embedding() -> None:
    """An answer that grows takes the memory of a text of which most is read already."""
    model = small_model("int4", 2)
    ids = text(700)
    for pooling in ("mean", "last"):
        (expected,) = embeddings(engine_of(model, 8), [ids], pooling, False)
        engine = engine_of(model, 5)
        engine.many.most_tokens = 3
        answer, embedded = Generated(text(200, seed=1), Sampler(Sampling()), 400, 600), Embedded(ids, pooling)
        engine.submit(answer)
        engine.submit(embedded)
        with reading(engine):
            engine.finish()
        assert engine.preemptions == 1
        np.testing.assert_array_equal(embedded.pooled, expected)
        assert not any(len(node.ids) and (node.ids[:100] == ids[:100]).all() for node in engine.prefixes)


def test_a_pool_never_holds_more_than_its_memory() -> None:
    """Blocks of both groups of layers are taken and given back at random; those in use keep what is in them."""
    rng = np.random.default_rng(0)
    size = block_bytes(MIXED)
    pool = KVPool(MIXED, 5 * size + size // 2)
    layout = pool.layout
    used: list[tuple[int, Any, int]] = []
    for i in range(400):
        if used and rng.random() < 0.4:
            group, block, filled = used.pop(int(rng.integers(len(used))))
            assert (block.memory == filled).all()
            pool.free(group, block)
        group = int(rng.integers(len(layout.nbytes)))
        held = sum(layout.nbytes[other] for other, _, _ in used)
        block = pool.allocate(group)
        assert (block is None) == (held + layout.nbytes[group] > pool.memory)
        if block is not None:
            assert len(block.memory) == layout.nbytes[group]
            block.memory[:] = i % 256
            used.append((group, block, i % 256))
        kept = held + sum(layout.nbytes[group] * len(free) for group, free in enumerate(pool._free))
        assert kept + (0 if block is None else layout.nbytes[group]) == pool.allocated <= pool.memory
    assert sum(layout.nbytes) == size and len(layout.nbytes) == 2
    with pytest.raises(ValueError, match=f"^memory: expected at least {size} bytes, found {size - 1}$"):
        KVPool(MIXED, size - 1)


def test_scores_of_long_texts() -> None:
    model = small_model("int4", 2)
    ids = text(400)
    expected = model.forward(ids, model.new_cache(400, "f32"))
    engine = engine_of(model, 4)
    sequences = [Scored(ids, start) for start in (1, 100, 399)]
    for sequence in sequences:
        engine.submit(sequence)
    engine.finish()
    logits = expected.astype(np.float64)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for sequence, start in zip(sequences, (1, 100, 399), strict=True):
        targets = np.arange(start, 400)
        np.testing.assert_allclose(sequence.logprobs, logits[targets - 1, ids[targets]], atol=1e-5)
        assert sequence.greedy == bool((expected[targets - 1].argmax(axis=1) == ids[targets]).all())


def test_new_weights_are_not_mixed_with_old_blocks() -> None:
    """Tokens that were computed before serve only what has the same weights, adapters and edits."""
    model = small_model("int4", 1)
    engine, ids = engine_of(model, 8), text(100)
    first = Generated(ids, Sampler(Sampling()), 9, 200)
    engine.submit(first)
    for _ in range(3):
        engine.step()
    model.weights_changed()
    engine.finish()
    second = Generated(ids, Sampler(Sampling()), 1, 200)
    engine.submit(second)
    engine.finish()
    assert second.reused_tokens == 0
    assert sum(node.count for node in engine.prefixes) <= 102 + 100


def test_what_does_not_fit() -> None:
    model = small_model("int4", 1)
    engine = engine_of(model, 2)
    with pytest.raises(ContextFullError, match="may have 600 tokens, memory is for 512: give more memory, or lower"):
        engine.submit(Generated(text(500), Sampler(Sampling()), 100, 600))
    with pytest.raises(ContextFullError, match="the prompt has 1100 tokens, the model takes 1024"):
        engine.submit(Generated(text(1100), Sampler(Sampling()), 1, 1024))
    assert not engine.busy and engine.step() == []
    with pytest.raises(InsufficientMemoryError, match="^KV cache of many texts: 10000000.0 GB needed"):
        Engine(model, memory=1e16)


def test_one_thread_at_a_time() -> None:
    engine = engine_of(small_model("int4", 1), 2)
    engine.submit(Generated(text(5), Sampler(Sampling()), 2, 9))
    failed: list[BaseException] = []

    def other() -> None:
        try:
            engine.step()
        except RuntimeError as error:
            failed.append(error)

    with engine._in_use():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "in use by another thread" in str(failed[0])
    engine.finish()
