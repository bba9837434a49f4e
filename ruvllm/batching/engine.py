"""Engine: continuous batching. Sequences are submitted, computed together step by step, and leave when they are done.

A step is one pass over the model. Sequences that decode have one token in it, those whose prompt is not yet computed
have a piece of it, as far as the pass has room. Their keys and values lie in blocks of one pool, whose size bounds the
memory. Sequences that begin alike share blocks, also with those that ended before; of sequences that arrive together
the first computes what is common and the others wait for it.

If the pool is full, idle blocks are given up, those first that were used longest ago. If that is not enough, the
sequence that came last gives its blocks back and waits until there is room; it is computed again then. The results do
not change: a sequence's tokens are those that it would get alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ruvllm.batching.prefixes import Match, Path, Prefixes, common_prefix
from ruvllm.batching.sequence import Sequence
from ruvllm.errors import ContextFullError
from ruvllm.kernels.memory import free_memory
from ruvllm.model.checks import is_integer, parse_size
from ruvllm.model.generate import Token
from ruvllm.model.kv_pool import BLOCK, KVPool, block_bytes, blocks_for, sequence_bytes
from ruvllm.model.llama import Llama
from ruvllm.model.many import Many, Run

MOST_SEQUENCES = 32  # computed together by default: with more, a step takes as much longer
_WORTH_WAITING = 32  # tokens that another sequence is about to compute


class Progress(NamedTuple):
    """What a step did for a sequence: its new token; None where it ended without one, or failed (``error``)."""

    sequence: Sequence
    token: Token | None


class Engine:
    """Computes many sequences on one model. One thread at a time may use it.

    Args:
        model: runs the sequences.
        kv: precision of keys and values: "f32", "f16" or "int8".
        memory: most bytes for keys and values, or a size such as "2GB", used as sequences need them; None:
            enough for all sequences at the model's context length, but at most half of what is free.
        sequences: the most that are computed together; more wait.

    Raises:
        ValueError: an unknown ``kv``, sequences < 1, or memory for less than one block of 256 tokens.
        InsufficientMemoryError: that much memory is not free.
    """

    def __init__(
        self, model: Llama, kv: str = "f32", memory: float | str | None = None, sequences: int = MOST_SEQUENCES
    ) -> None:
        if not is_integer(sequences) or sequences < 1:
            raise ValueError(f"sequences: expected a positive integer, found {sequences!r}")
        pool = KVPool(model.config, _memory(model, kv, memory, sequences), kv)
        self.model, self.pool, self.prefixes = model, pool, Prefixes(pool)
        self.many = Many(model, pool)
        self.most = min(sequences, self.many.most_tokens)
        self.running: list[Sequence] = []  # in the order of their admission
        self.waiting: list[Sequence] = []
        self.runs: list[tuple[Sequence, int]] = []  # of the last pass: sequences and how many tokens each had
        self.computed_tokens = 0  # of all passes
        self.preemptions = 0
        self._thread: dict[str, int] = {}

    @property
    def busy(self) -> bool:
        """Whether there is something to compute."""
        return bool(self.running or self.waiting)

    @property
    def max_tokens(self) -> int:
        """The most tokens that one sequence can have here."""
        return self.pool.max_tokens

    def submit(self, sequence: Sequence) -> None:
        """Add a sequence.

        Raises:
            ContextFullError: it does not fit into the model's context, or, even alone, into this engine's memory.
            ValueError: it has no tokens.
        """
        if not sequence.length:
            raise ValueError(f"{sequence.what}: expected at least one token, found none")
        needed, limit = sequence.capacity, self.model.config.max_position_embeddings
        if sequence.length > limit:
            found = f"{sequence.what} has {sequence.length} tokens"
            raise ContextFullError(f"context full: {found}, the model takes {limit}")
        if needed > self.max_tokens:
            raise ContextFullError(
                f"context full: the sequence may have {needed} tokens, memory is for {self.max_tokens}: "
                "give more memory, or lower max_tokens"
            )
        self.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence; what it has computed may still serve others. One that has ended already stays as it is."""
        sequence.done = True
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def step(self) -> list[Progress]:
        """One pass; does nothing where no sequence is left.

        An exception that one sequence's sampler raises ends that sequence alone, which keeps it as ``error``. After
        any other, such as KeyboardInterrupt, all sequences are as they were before the step.

        Raises:
            RuntimeError: another thread is using the engine.
        """
        with self._in_use():
            self.runs = self._planned()
            if not self.runs:
                return []
            passes = [_run(sequence, tokens) for sequence, tokens in self.runs]
            logits = self.many.forward(passes)
            progress, row = [], 0
            for (sequence, tokens), run in zip(self.runs, passes, strict=True):
                self._computed(sequence, tokens)
                try:
                    token = sequence.take(logits[row : row + run.wanted])
                except Exception as error:  # of a sampler, or a processor that the user wrote
                    sequence.error, sequence.done, token = error, True, None
                row += run.wanted
                if sequence.done:
                    self.running.remove(sequence)
                    self._release(sequence)
                if token is not None or sequence.done:
                    progress.append(Progress(sequence, token))
            return progress

    def finish(self) -> None:
        """Steps until no sequence is left."""
        while self.busy:
            self.step()

    # Which tokens a pass computes.

    def _planned(self) -> list[tuple[Sequence, int]]:
        """The sequences of the next pass, and how many tokens of each."""
        left, plan = self.many.most_tokens, {}
        for sequence in self.running:  # other weights than those of the tokens before: nothing more to share
            sequence.shares = sequence.shares and sequence.key[0] == self.model.filling
        for sequence in sorted(self.running, key=lambda s: s.pending > 1):  # those that decode come first
            plan[sequence] = min(sequence.pending, left)
            left -= plan[sequence]
        preempted = self.preemptions
        for sequence in list(self.running):
            if sequence in self.running and plan[sequence]:
                self._allocate(sequence, plan[sequence])
        if self.preemptions == preempted:
            self._admit(plan, left)
        return [(sequence, tokens) for sequence, tokens in plan.items() if tokens and sequence in self.running]

    def _admit(self, plan: dict[Sequence, int], left: int) -> None:
        """Let sequences join that fit, as long as the pass has room."""
        for sequence in list(self.waiting):
            if not left or len(self.running) == self.most:
                return
            sequence.key = self.model.filling, self.model.rope.kinds(sequence.capacity)
            match = self.prefixes.match(self.prefixes.root(sequence.key), sequence.ids[: sequence.reusable])
            if self._about_to_come(sequence) >= match.tokens + _WORTH_WAITING:
                continue
            if not self._fits(sequence, match):
                return  # no later one goes before it
            self.waiting.remove(sequence)
            sequence.path, sequence.shares = self.prefixes.take(match), sequence.kept
            sequence.computed = sequence.path.tokens
            if sequence.length == sequence.prompt_tokens:
                sequence.reused_tokens = sequence.computed
            self.running.append(sequence)
            plan[sequence] = min(sequence.pending, left)
            self._allocate(sequence, plan[sequence])
            left -= plan[sequence]

    def _about_to_come(self, sequence: Sequence) -> int:
        """Tokens that the sequence could reuse once a prompt that is being computed is done."""
        ids = sequence.ids[: sequence.reusable]
        coming = [other for other in self.running if other.pending > 1 and other.shares and other.key == sequence.key]
        shared = [common_prefix(ids, other.ids) for other in coming]
        return max(shared, default=0)

    def _fits(self, sequence: Sequence, match: Match) -> bool:
        """Whether there are blocks for all its tokens, and one more for each sequence that runs."""
        idle = sum(not node.users for node in match.nodes)
        needed = self.pool.bytes_for(blocks_for(sequence.length) - len(match.nodes) + idle)
        one_more = len(self.running) * sum(self.pool.layout.nbytes)
        return not self.running or needed + one_more <= self.prefixes.available

    def _allocate(self, sequence: Sequence, tokens: int) -> None:
        """Blocks for its next tokens; if there are none, the sequences that came last give theirs back."""
        while len(sequence.path.nodes) < blocks_for(sequence.computed + tokens):
            if self.prefixes.extend(sequence.path, self.prefixes.root(sequence.key) if sequence.shares else None):
                continue
            last = self.running.pop()
            self._release(last)
            last.computed = 0
            self.waiting.insert(0, last)
            self.preemptions += 1
            if last is sequence:
                return

    def _computed(self, sequence: Sequence, tokens: int) -> None:
        """The next tokens of a sequence are in its blocks, where others may find them."""
        first, sequence.computed = sequence.computed, sequence.computed + tokens
        self.computed_tokens += tokens
        for block in range(first // BLOCK, blocks_for(sequence.computed)) if sequence.shares else ():
            node, start = sequence.path.nodes[block], block * BLOCK
            node.count = min(BLOCK, sequence.computed - start)
            node.ids[: node.count] = sequence.ids[start : start + node.count]
        self.prefixes.advance(sequence.path, sequence.computed)

    def _release(self, sequence: Sequence) -> None:
        self.prefixes.release(sequence.path)
        sequence.path = Path([])

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        me = threading.get_ident()
        if self._thread.setdefault("thread", me) != me:
            raise RuntimeError("this engine is in use by another thread: step it from one thread at a time")
        try:
            yield
        finally:
            self._thread.clear()

    def __repr__(self) -> str:
        return f"Engine({len(self.running)} sequences, {len(self.waiting)} waiting, {self.pool!r})"


def _run(sequence: Sequence, tokens: int) -> Run:
    start, end = sequence.computed, sequence.computed + tokens
    wanted = max(0, end - max(start, sequence.wanted_from))
    return Run(sequence.ids[start:end], start, sequence.path.tables(), wanted, sequence.capacity)


def _memory(model: Llama, kv: str, memory: float | str | None, sequences: int) -> int:
    """Bytes of the pool."""
    size = block_bytes(model.config, kv)
    if memory is None:
        most = sequences * sequence_bytes(model.config, kv, model.config.max_position_embeddings)
        free = free_memory()
        return most if free is None else max(size, min(most, free // 2))
    if (given := parse_size("memory", memory)) < size:
        raise ValueError(f"memory: expected at least {size} bytes, which {BLOCK} tokens need, found {memory!r}")
    return given
