"""Many: one pass over new tokens of several sequences, whose keys and values lie in the blocks of one pool.

A pass has *runs*: consecutive new tokens of one sequence, one token where it decodes, a piece of its prompt where that
is still to be computed. The weights are read once for all. A token's logits are bit-identical to those that it gets
alone, whatever shares its pass: no kernel mixes rows, and sums run in the same order for one row and for many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ruvllm.kernels import tape as t
from ruvllm.kernels.attention.decode import chunk_count, partial_width
from ruvllm.kernels.memory import aligned_empty
from ruvllm.kernels.threads.pool import limited_to
from ruvllm.model.hooks import active
from ruvllm.model.kv_pool import BLOCK, KVPool
from ruvllm.model.kv_size import FEW_TOKENS
from ruvllm.model.llama import Llama
from ruvllm.model.ops.recording import Pass
from ruvllm.model.replay import Working


class Run(NamedTuple):
    """New tokens of one sequence.

    ids: (n,) int64, at the positions from ``start`` on. tables: for each group of layers the addresses of the
    sequence's blocks (groups, b), enough for all positions up to these. wanted: of how many of its last tokens logits
    are wanted. capacity: the most positions that the sequence may have, on which some rotary embeddings depend.
    """

    ids: np.ndarray
    start: int
    tables: np.ndarray
    wanted: int
    capacity: int


class Many:
    """Passes of one model over sequences in one pool. It always replays the tape, even if ``model.fused`` is False."""

    def __init__(self, model: Llama, pool: KVPool) -> None:
        self.model, self.pool = model, pool
        self.most_tokens = model.prefill_tokens  # in one pass
        tokens = max(FEW_TOKENS, self.most_tokens)
        self._workings = {n: Working(model, pool, n, model.threads) for n in (FEW_TOKENS, tokens)}
        self._slots = np.zeros(tokens, np.int64)
        self._runs = np.zeros((tokens, 3), np.int64)
        self._chosen = np.zeros(tokens, np.int64)
        self._logits = aligned_empty((0, model.config.vocab_size))
        self._partial = aligned_empty((0, 0, 0, 0))
        for working in self._workings.values():
            for space, array in ((t.SLOTS, self._slots), (t.RUNS, self._runs), (t.CHOSEN, self._chosen)):
                t.set_space(working.header, space, array.ctypes.data)

    def forward(self, runs: Sequence[Run]) -> np.ndarray:
        """Compute the tokens of runs, at most ``most_tokens``, and write their keys and values into the pool.

        Returns:
            The logits (sum of wanted, V), in the order of runs; the next pass overwrites them.
        """
        positions = np.concatenate([np.arange(run.start, run.start + len(run.ids)) for run in runs])
        ids = np.concatenate([run.ids for run in runs])
        working = next(working for most, working in self._workings.items() if len(ids) <= most)
        row, chosen, start = 0, 0, 0
        tables = np.concatenate([run.tables for run in runs], axis=1)
        for i, run in enumerate(runs):
            count = len(run.ids)
            self._runs[i] = row, count, start
            self._chosen[chosen : chosen + run.wanted] = np.arange(row + count - run.wanted, row + count)
            at = positions[row : row + count]
            self._slots[row : row + count] = start * BLOCK + at
            row, chosen, start = row + count, chosen + run.wanted, start + run.tables.shape[1]
        working.positions[: len(ids)] = positions
        working.header[t.RUN_COUNT] = len(runs)
        working.header[t.TABLE_SIZE] = tables.shape[1]
        self.pool.set_tables(tables)
        self._reach(int(positions.max()) + 1)
        cos, sin = self._angles(runs, positions)
        if len(self._logits) < chosen:
            self._logits = aligned_empty((chosen, self.model.config.vocab_size))
        hooks = active(self.model)
        if hooks is not None:
            hooks.begin(None, ids)
        tape = self.model.tapes.tape(Pass.of(len(ids), many=True), self.pool.dtype)
        with limited_to(self.model.threads):
            working.replay(tape, ids, cos, sin, self._logits[:chosen])
        return self._logits[:chosen]

    def _reach(self, positions: int) -> None:
        """Memory for partial results of a token that sees so many positions: each thread has its own."""
        config, chunks = self.model.config, chunk_count(positions)
        if self._partial.shape[2] >= chunks:
            return
        chunks = min(2 * chunks, chunk_count(max(config.max_position_embeddings, positions)))
        shape = self.model.threads, config.num_attention_heads, chunks, partial_width(config.head_dim)
        self._partial = aligned_empty(shape)
        for working in self._workings.values():
            working.header[t.CHUNKS] = chunks
            t.set_space(working.header, t.PARTIAL, self._partial.ctypes.data, 1, self._partial[0].nbytes)

    def _angles(self, runs: Sequence[Run], positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin (n, T, R/2) of the tokens."""
        rope = self.model.rope
        if not rope.vary:
            cos, sin = rope.upto(int(positions.max()) + 1, self.pool.max_tokens)
            return cos.take(positions, 1), sin.take(positions, 1)
        parts = []
        for run in runs:
            end = run.start + len(run.ids)
            parts.append([table[:, run.start : end] for table in rope.upto(end, run.capacity)])
        cos, sin = (np.concatenate(tables, axis=1) for tables in zip(*parts, strict=True))
        return cos, sin
