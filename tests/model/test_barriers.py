"""Barriers of a tape are enough, and none is needless.

Three steps. What operations declare is true: each runs with every byte that it does not declare to read scrambled, and
changes no byte that it does not declare to write. Declared accesses of different members never conflict within a phase:
so no order of members can matter. Without any one barrier they do.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest

from ruvllm.kernels import operations as o
from ruvllm.kernels import tape as t
from ruvllm.kernels.tape import Operation
from ruvllm.kernels.threads.pool import limited_to
from ruvllm.kernels.threads.team import COUNTERS
from ruvllm.model import Llama
from ruvllm.model.exchange import Gathers
from ruvllm.model.lora import MicroLora
from ruvllm.model.lora_adapter import LoraAdapter, LoraConfig
from ruvllm.model.ops.recording import Pass
from ruvllm.model.ops.schedule import Step
from ruvllm.model.ops.shuffled import Shuffled
from ruvllm.model.ops.tape import Tape
from ruvllm.model.random_weights import RandomWeights
from ruvllm.model.replay import Working
from ruvllm.model.share import shares_of
from tests.model.architectures import ARCHITECTURES, CONFIG, build, config_of
from tests.model.tape_memory import Memory, run_step

IDS = np.random.default_rng(1).integers(0, 300, 80)
SIZE = 3  # members
KINDS = [(name, "int4", tokens) for name in ARCHITECTURES for tokens in (1, 5, 41)]
KINDS += [("llama", layout, tokens) for layout in ("f32", "adapted") for tokens in (1, 5, 41)]
KINDS += [("mixture", "f32", tokens) for tokens in (1, 5, 41)]


class InOrder:
    """A runner: one member after the other does each operation; ``each`` is called before."""

    def __init__(self) -> None:
        self.tape: Tape | None = None
        self.working: Working | None = None

    def run(self, tape: Tape, working: Working) -> None:
        self.tape, self.working = tape, working
        for i in range(working.header[t.FIRST], working.header[t.END]):
            self.step(tape.steps[i], tape.rows[i], working)

    def step(self, step: Step, row: np.ndarray, working: Working) -> None:
        if working.header[step.count] and not row[t.FLAGS] & t.ENTRY:
            for member in range(SIZE):
                run_step(step, row, working, member, SIZE)


def model_of(name: str, layout: str) -> Llama:
    model = build(name, "int4" if layout == "adapted" else layout)
    model.threads = SIZE
    if layout == "adapted":
        lora = LoraAdapter(CONFIG, LoraConfig(4, targets=("q", "k", "v", "o", "gate", "up", "down")))
        for b in lora.b.values():
            b[:] = np.random.default_rng(2).standard_normal(b.shape)
        MicroLora(model).attach(lora)
    return model


def run(model: Llama, runner: InOrder, tokens: int) -> None:
    """A prompt, then a pass of so many tokens with the runner: all logits wanted."""
    cache = model.new_cache(64)
    model.forward(IDS[:21], cache)
    model.runner = runner
    with limited_to(2):
        model.forward(IDS[21 : 21 + tokens], cache, out=logits_of(model, tokens))


def logits_of(model: Llama, tokens: int) -> np.ndarray:
    return np.zeros((tokens, model.config.vocab_size), np.float32)


class Checked(InOrder):
    """Runs each operation of each member a second time on scrambled memory, and compares."""

    def __init__(self, model: Llama, tokens: int) -> None:
        super().__init__()
        self.random = np.random.default_rng(0)
        self.logits = logits_of(model, tokens)
        self.checked = 0

    def step(self, step: Step, row: np.ndarray, working: Working) -> None:
        memory = Memory(working, working.cache, self.logits)
        before = memory.snapshot()
        written = []
        for member in range(SIZE):
            written.append(self._check(step, row, memory, member, before))
        for member in range(SIZE):  # within one operation: what others write is nothing to this member
            others = {n: np.logical_or.reduce([w[n] for i, w in enumerate(written) if i != member]) for n in before}
            mine = written[member]
            assert not any((others[n] & mine[n]).any() for n in before), f"{step.label}: two members write one byte"
            allowed = {n: ~others[n] for n in before}
            self._compare(step, row, memory, member, before, allowed)
        memory.restore(before)
        super().step(step, row, working)

    def _check(
        self, step: Step, row: np.ndarray, memory: Memory, member: int, before: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """What a member writes, all of it declared; the same if what it does not declare to read is scrambled."""
        reads, writes = (memory.mask(accesses, member, SIZE) for accesses in (step.reads, step.writes))
        after = self._compare(step, row, memory, member, before, reads)
        changed = {name: after[name] != before[name] for name in before}
        for name in before:
            assert not (changed[name] & ~writes[name]).any(), f"{step.label}: undeclared write to {name}"
        self.checked += 1
        return changed

    def _compare(
        self, step: Step, row: np.ndarray, memory: Memory, member: int, before: dict[str, np.ndarray],
        readable: dict[str, np.ndarray],
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """What memory holds after a member's part; the same if all that is not readable was scrambled before."""
        memory.restore(before)
        run_step(step, row, memory.working, member, SIZE)
        after = memory.snapshot()
        scrambled = {}
        for name, content in before.items():
            noise = self.random.integers(0, 256, content.size, np.uint8)
            scrambled[name] = np.where(readable[name], content, noise)
        memory.restore(scrambled)
        run_step(step, row, memory.working, member, SIZE)
        again = memory.snapshot()
        for name in before:
            same = after[name] == again[name]
            untouched = (after[name] == before[name]) & (again[name] == scrambled[name])
            assert (same | untouched).all(), f"{step.label}: undeclared read, seen in {name}"
        return after


@pytest.mark.parametrize(("name", "layout", "tokens"), KINDS)
def test_operations_touch_what_they_declare(name: str, layout: str, tokens: int) -> None:
    model = model_of(name, layout)
    checked = Checked(model, tokens)
    cache = model.new_cache(64)
    model.forward(IDS[:21], cache)
    model.runner = checked
    with limited_to(2):
        model.forward(IDS[21 : 21 + tokens], cache, out=checked.logits)
    assert checked.tape is not None and checked.checked == SIZE * len(checked.tape.steps)


def conflicts(steps: list[Step], memory: Memory) -> Iterator[str]:
    """Pairs of steps and members of which one writes what the other touches, so that their order matters."""
    masks = [
        [(memory.mask(s.writes, m, SIZE), memory.mask(s.accesses, m, SIZE)) for m in range(SIZE)] for s in steps
    ]  # fmt: skip
    for i, step in enumerate(steps):
        for j, other in enumerate(steps):
            if i == j:  # members divide the work of one operation: see the test above
                continue
            for member in range(SIZE):
                for another in range(SIZE):
                    if member != another and _overlap(masks[i][member][0], masks[j][another][1]):
                        yield f"{step.label} and {other.label}"


def _overlap(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return any((a[name] & b[name]).any() for name in a)


@pytest.mark.parametrize(("name", "layout", "tokens"), KINDS)
def test_barriers_are_enough_and_none_is_needless(name: str, layout: str, tokens: int) -> None:
    model = model_of(name, layout)
    runner = InOrder()
    run(model, runner, tokens)
    tape, working = runner.tape, runner.working
    assert tape is not None and working is not None
    memory = Memory(working, working.cache, logits_of(model, tokens))
    starts = [0, *(i for i in range(1, len(tape.rows)) if tape.rows[i, t.FLAGS] & t.MEET), len(tape.rows)]
    phases = [
        [step for step in tape.steps[lo:hi] if step.operation is not o.broadcast] for lo, hi in pairwise(starts)
    ]  # a broadcast runs where a region begins, and every phase begins with what the one before left
    for phase in phases:
        assert not list(conflicts(phase, memory))
    for before, after in pairwise(phases):
        called = {s.segment for s in before} & tape.calls.keys() - {s.segment for s in after}
        counters = sum(step.counted for step in before) >= COUNTERS and any(step.counted for step in after)
        assert called or counters or any(True for _ in conflicts(before + after, memory)), (
            f"needless barrier before {after[0].label}"
        )


@pytest.mark.parametrize(("name", "layout"), [(n, "int4") for n in ARCHITECTURES] + [("llama", "adapted")])
def test_any_order_of_members_gives_the_same_bits(name: str, layout: str) -> None:
    def logits(model: Llama) -> np.ndarray:
        cache = model.new_cache(64)
        return np.concatenate([model.forward(IDS[lo:hi], cache) for lo, hi in ((0, 40), (40, 41), (41, 42), (42, 47))])

    model = model_of(name, layout)
    expected = logits(model)
    for seed in range(12):  # members join at random admission points, too
        model.runner = Shuffled(members=2 + seed % 2, seed=seed)
        np.testing.assert_array_equal(logits(model), expected)


class _OneRank:
    """In place of ``Ranks``: Python copies what it is given, between the operations."""

    rank = 0

    def join(self, part: np.ndarray, out: np.ndarray, columns: object) -> None:
        out[...] = part


@pytest.mark.parametrize("name", ["llama", "mixture"])
def test_arrays_that_python_fills_reach_all_members(name: str) -> None:
    """In memory that nothing else uses meanwhile: the bits are those of a model that exchanges nothing."""
    config, ranks = config_of(name), cast(Any, _OneRank())
    kind: type[Llama] = type("Filled", (Llama,), {"exchange": Gathers(ranks, shares_of(config, [1.0], by_rows=True))})
    plain, other = (each(config, RandomWeights(config, 3), "int4", 1) for each in (Llama, kind))
    other.threads = SIZE
    caches = [model.new_cache(64) for model in (plain, other)]
    for seed, (lo, hi) in enumerate([(0, 40), (40, 41), (41, 42), (42, 47)]):
        other.runner = Shuffled(members=SIZE, seed=seed)
        expected, found = (m.forward(IDS[lo:hi], cache) for m, cache in zip((plain, other), caches, strict=True))
        np.testing.assert_array_equal(found, expected)


def test_shuffling_finds_a_missing_barrier() -> None:
    """The debug mode is worth something: without one barrier, some seed gives other bits."""
    model = model_of("llama", "int4")
    expected = model.forward(IDS[:41], model.new_cache(64, "f32"))
    tape = model.tapes.tape(Pass.PROMPT, "f32")
    row = next(i for i, step in enumerate(tape.steps) if step.label.endswith(".o"))
    tape.rows[row, t.FLAGS] = 0
    found = []
    for seed in range(20):
        model.runner = Shuffled(members=3, seed=seed)
        found.append(model.forward(IDS[:41], model.new_cache(64, "f32")))
    assert not all(np.array_equal(x, expected) for x in found)


def test_shuffled_needs_memory_for_its_members() -> None:
    model = build("llama", "int4", threads=1)
    model.runner = Shuffled(members=2, seed=0)
    with pytest.raises(ValueError, match="members: expected at most 1, the model's threads, found 2"):
        model.forward(IDS[:3], model.new_cache(8))


def test_every_operation_is_covered() -> None:
    """Each operation stands on some tape that is checked above."""
    # Those of many sequences are the same bodies, tested by their bits.
    seen = {"broadcast", "append_to_blocks", "attend_each_run", "chosen_rows"}
    for name, layout, tokens in KINDS:
        runner = InOrder()
        run(model_of(name, layout), runner, tokens)
        assert runner.tape is not None
        seen |= {step.operation.__name__ for step in runner.tape.steps}
    everything = [o.integer_matmul(0), o.float_matmul(np.float32)]
    everything += [o.grouped_integer_matmul(0), o.grouped_float_matmul(np.float32)]
    everything += [o.adapter_down(np.int8), o.adapter_up(np.int8)]
    everything += [make(np.float32) for make in (o.append, o.attend, o.attend_token, o.append_blocks, o.attend_runs)]
    everything += [x for name in o.__all__ if isinstance(x := getattr(o, name), Operation)]
    assert {operation.__name__ for operation in everything} <= seen
