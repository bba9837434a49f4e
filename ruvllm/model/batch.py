"""Batch: the next token of several sequences in one pass, each with its own KV cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import numpy as np

from ruvllm.kernels import tape as t
from ruvllm.kernels.attention.decode import chunk_count, partial_width
from ruvllm.kernels.memory import aligned_empty
from ruvllm.kernels.threads.pool import limited_to
from ruvllm.model.hooks import active
from ruvllm.model.kv_cache import KVCache
from ruvllm.model.llama import Llama
from ruvllm.model.ops.recorder import Pass
from ruvllm.model.replay import Working


class Batch:
    """Decodes one token at a time for each of several sequences, reading the weights once for all of them.

    Always replays the tape, even if ``model.fused`` is False.

    Each sequence's logits are bit-identical to those that it gets alone.

    Args:
        model: runs the sequences.
        caches: one for each sequence, all of one dtype and filled by this model.

    Raises:
        ValueError: no caches, the same one twice, or caches of different dtypes.
    """

    def __init__(self, model: Llama, caches: Sequence[KVCache]) -> None:
        dtypes = {cache.dtype for cache in caches}
        if len(dtypes) != 1:
            raise ValueError(f"caches: expected some of one dtype, found {', '.join(sorted(dtypes)) or 'none'}")
        if len(set(map(id, caches))) < len(caches):
            raise ValueError("caches: expected a different one for each sequence")
        self.model, self.caches = model, list(caches)
        for cache in caches:
            cache.claim(model)
        config, chunks = model.config, max(chunk_count(cache.max_tokens) for cache in caches)
        self.working = Working(model, caches[0], max(2, len(caches)), model.threads)
        self.partial = aligned_empty((len(caches), config.num_attention_heads, chunks, partial_width(config.head_dim)))
        self.table = np.stack([cache.table for cache in caches])
        header = self.working.header
        header[t.CACHES], header[t.CHUNKS] = self.table.ctypes.data, chunks
        t.set_space(header, t.PARTIAL, self.partial.ctypes.data)

    def forward(self, ids: Iterable[int] | np.ndarray) -> np.ndarray:
        """Append ids (S,), one to each sequence; returns logits (S, V).

        Raises:
            TypeError, ValueError: ids are not one token id for each sequence.
            ContextFullError: a sequence is full; none is changed.
            RuntimeError: another thread is using one of the caches.
        """
        ids = self.model.checked_ids(ids)
        if len(ids) != len(self.caches):
            raise ValueError(f"ids: expected {len(self.caches)}, one for each sequence, found {len(ids)}")
        with ExitStack() as owned:
            for cache in self.caches:
                owned.enter_context(cache.in_use())
                cache.claim(self.model)
                cache.require_room(1)
            return self._forward(ids)

    def _forward(self, ids: np.ndarray) -> np.ndarray:
        """``forward`` of checked ids."""
        lengths = np.array([cache.length for cache in self.caches])
        cos, sin = self._angles()
        logits = np.empty((len(ids), self.model.config.vocab_size), np.float32)
        self.working.positions[: len(ids)] = lengths
        hooks = active(self.model)
        if hooks is not None:
            hooks.begin(None, ids)
        for cache in self.caches:
            cache.fill(self.model.filling)
        tape = self.model.tapes.tape(Pass.BATCH, self.caches[0].dtype)
        with limited_to(self.model.threads):
            self.working.replay(tape, ids, cos, sin, logits)
        for cache, token in zip(self.caches, ids, strict=True):
            cache.ids[cache.length] = token
            cache.length += 1
        return logits

    def _angles(self) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin (n, S, R/2) of each sequence's next position: they may depend on its cache's capacity."""
        tables = [self.model.rope.upto(cache.length + 1, cache.max_tokens) for cache in self.caches]
        rows = [[table[:, c.length] for table in pair] for c, pair in zip(self.caches, tables, strict=True)]
        cos, sin = (np.stack(parts, axis=1) for parts in zip(*rows, strict=True))
        return cos, sin
