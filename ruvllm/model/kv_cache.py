"""KVCache: keys and values of one sequence, up to a fixed number of positions."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import numpy as np

from ruvllm.errors import ContextFullError
from ruvllm.kernels.attention.kv import SCALE_ROWS
from ruvllm.kernels.attention.tile import Cache
from ruvllm.kernels.matmul.micro_kernels import LANES
from ruvllm.kernels.memory import require_memory
from ruvllm.model.checks import is_integer
from ruvllm.model.config import ModelConfig
from ruvllm.model.kv_blocks import Block, BlockLayout
from ruvllm.model.kv_size import FEW_TOKENS, block_positions, cache_bytes, capacities, capacity

Filling = tuple[object, ...]  # weak references: what decides a token's keys and values


class KVCache:
    """Keys and values of up to ``max_tokens`` positions of one sequence, for every layer.

    They lie in blocks (``kv_blocks``), which are added as the text grows: a large cache costs nothing until it fills.
    The blocks of windowed layers are a ring: a new position takes the place of one that no later token sees. Forks
    share blocks until one of them writes there. A cache has one owner: two threads may use two caches of one model,
    but not one cache.

    Raises:
        ValueError: max_tokens < 1, or an unknown ``kv``.
        InsufficientMemoryError: full, it would not fit into the free memory.
    """

    def __init__(self, config: ModelConfig, max_tokens: int, kv: str = "f32") -> None:
        if not is_integer(max_tokens) or max_tokens < 1:
            raise ValueError(f"max_tokens: expected a positive integer, found {max_tokens!r}")
        self.config, self.dtype, self.max_tokens = config, kv, int(max_tokens)
        self.layout = BlockLayout(config, kv, block_positions(self.max_tokens))
        require_memory(self.nbytes, f"KV cache of {max_tokens} tokens")
        self.length = 0
        self.ids = np.zeros(self.max_tokens, np.int64)  # the tokens at positions :length
        self._owner: dict[str, int] = {}  # the thread that is filling it
        self._buffers: dict[tuple[str, int], Any] = {}
        self._model: Callable[[], object] = lambda: None  # refers to the model that fills it, and does not keep it
        self.capacities = capacities(config, self.max_tokens)
        # By group of layers: how many blocks it may have, those that it has, and where the block of each chunk is.
        step, windows = self.layout.positions, self.layout.windows
        self._rings = [capacity(window, self.max_tokens) // step for window in windows]
        self._blocks: list[list[Block]] = [[] for _ in windows]
        self._shared: set[Block] = set()  # with forks: they are not written to
        self._set_tables(np.zeros((len(windows), -(-self.max_tokens // step)), np.int64))
        self._fills: list[tuple[int, Filling]] = []  # from which position on it was filled with what
        self._reach = 0  # positions that were ever filled since it was cleared
        self.changes = 0  # how often tokens were appended or dropped: whoever goes on can tell whether others did

    def __len__(self) -> int:
        return self.length

    @property
    def free_positions(self) -> int:
        """Positions that are still free."""
        return self.max_tokens - self.length

    @property
    def nbytes(self) -> int:
        """Bytes of its keys and values when it is full."""
        return cache_bytes(self.config, self.max_tokens, self.dtype)

    @property
    def held_bytes(self) -> int:
        """Bytes of the blocks that it has now, with those that forks share."""
        return sum(n * len(blocks) for n, blocks in zip(self.layout.nbytes, self._blocks, strict=True))

    def reserve(self, end: int) -> None:
        """Own the memory of positions ``length`` to ``end``: add blocks, and copy those that are shared with forks."""
        step = self.layout.positions
        for group, (blocks, ring) in enumerate(zip(self._blocks, self._rings, strict=True)):
            for chunk in range(self.length // step, -(-end // step)):
                slot = chunk % ring
                if slot < len(blocks) and blocks[slot] not in self._shared:
                    continue
                block = self.layout.new_block(group)
                if slot == len(blocks):
                    blocks.append(block)
                else:
                    block.memory[:] = blocks[slot].memory
                    self._shared.discard(blocks[slot])
                    blocks[slot] = block
                self.tables[group, slot::ring] = block.address

    def _set_tables(self, tables: np.ndarray) -> None:
        """The block tables (groups, chunks), and where a tape finds them."""
        self.tables, self.layer_table = tables, self.layout.layer_table(tables)

    def of_layer(self, layer: int) -> Cache:
        """A layer, for kernels."""
        group = self.layout.groups[layer]
        return self.layout.cache(layer, self.tables[group], self._blocks[group][0])

    def require_free(self, tokens: int) -> None:
        """Raise ContextFullError unless ``tokens`` more fit; nothing is changed."""
        if tokens > self.free_positions:
            raise ContextFullError(
                f"context full: {tokens} more tokens do not fit, {self.length} of {self.max_tokens} are taken"
            )

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Raise RuntimeError if another thread is filling this cache: its buffers serve one at a time."""
        # No lock: Ctrl-C between taking one and "try" would leave it taken. It is re-entrant for the owning thread.
        me = threading.get_ident()
        if self._owner.setdefault("thread", me) != me:
            raise RuntimeError("this KV cache is in use by another thread: give each thread a cache of its own")
        try:
            yield
        finally:
            self._owner.clear()

    def claim(self, model: Any) -> None:
        """Bind this cache to ``model``, whose working memory and tokens it holds from now on.

        Raises ValueError if it is for a model of other sizes, or holds tokens of another model.
        """
        if self._model() is model:
            return
        for name in ("num_hidden_layers", "num_key_value_heads", "head_dim"):
            found, expected = getattr(self.config, name), getattr(model.config, name)
            if found != expected:
                raise ValueError(f"cache: it was made for a model with {name} = {found}, this one has {expected}")
        if self.capacities != capacities(model.config, self.max_tokens):
            raise ValueError("cache: it was made for a model whose layers have other windows")
        if self.length:
            raise ValueError("cache: it holds tokens of another model: clear() it, or make a new one")
        self._buffers.clear()
        self._model = weakref.ref(model)

    def buffers_for(self, path: str, tokens: int, make: Callable[[int], Any]) -> Any:
        """The working memory of the model that fills this cache: for one token, a few, or the most of any pass yet."""
        most = next((few for few in (1, FEW_TOKENS) if tokens <= few), 0)
        held = self._buffers.get((path, most))
        if held is None or held.tokens < tokens:
            held = self._buffers[path, most] = make(most or tokens)
        return held

    @property
    def oldest(self) -> int:
        """The smallest length, except 0, that it can be truncated to: windowed layers drop older positions."""
        windows = zip(map(self.config.window, range(len(self.capacities))), self.capacities, strict=True)
        kept = [self.reach - size + window - 1 for window, size in windows if window and self.reach > size]
        return max(0, *kept) if kept else 0

    def truncate(self, length: int) -> None:
        """Drop the positions from ``length`` on. Raises ValueError where windowed layers lack older positions."""
        if not is_integer(length) or not 0 <= length <= self.length:
            raise ValueError(f"length: expected 0 to {self.length}, found {length!r}")
        if 0 < length < self.oldest:
            raise ValueError(
                f"length: expected 0, or {self.oldest} to {self.length}, found {length}: layers with a window have "
                "forgotten what older positions need"
            )
        self.changes += length < self.length
        self._fills = [fill for fill in self._fills if fill[0] < length]
        self._reach = self.reach if length else 0
        self.length = length

    def restore(self, length: int) -> None:
        """Take positions up to ``length`` back after ``truncate``; only if nothing was filled in since."""
        if not self.length <= length <= min(self._reach, self.max_tokens):
            raise ValueError(f"length: expected {self.length} to {self._reach}, found {length}")
        self.length = length

    def rewind(self, length: int) -> int:
        """``truncate``, or clear where that is impossible; returns the remaining length."""
        self.truncate(length if length >= self.oldest else 0)
        return self.length

    def fill(self, filling: Filling) -> None:
        """What comes from now on is computed with ``filling``: weights, adapters and edits, by identity."""
        self.changes += 1
        self._fills = [found for found in self._fills if found[0] < self.length]
        if not self._fills or self._fills[-1][1] != filling:
            self._fills.append((self.length, filling))

    def keep_common_prefix(self, ids: np.ndarray, filling: Filling | None = None) -> int:
        """Drop what differs from ``ids`` and return how many leading tokens of ``ids`` are kept.

        filling: tokens that were computed with another are dropped too; None: whatever they were computed with.
        At least one token of ``ids`` is left to be computed, so that there are logits after the last.
        """
        others = (start for start, found in self._fills if filling is not None and found != filling)
        n = min(self.length, len(ids) - 1, next(others, self.length))
        different = np.flatnonzero(self.ids[:n] != ids[:n])
        return self.rewind(int(different[0]) if len(different) else max(n, 0))

    def clear(self) -> None:
        """Drop all positions; the memory stays."""
        self.truncate(0)

    def filled_with(self, filling: Filling) -> bool:
        """Whether all its tokens were computed with ``filling``."""
        return all(found == filling for start, found in self._fills if start < self.length)

    @property
    def reach(self) -> int:
        """Positions that were filled since it was last empty: rings have lost the first of them."""
        self._reach = max(self._reach, self.length)
        return self._reach

    def filled(self) -> list[tuple[list[np.ndarray], list[np.ndarray]]]:
        """Of each layer keys (b, K, 16) and values (16 b, DV), views of the b lines that hold something.

        Of one head after the other, a view for each block.
        """
        lines = -(-self.reach // LANES) * LANES
        return [self._pieces(layer, min(size, lines)) for layer, size in enumerate(self.capacities)]

    def _pieces(self, layer: int, positions: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        step, keys, values = self.layout.positions, [], []
        blocks = self._blocks[self.layout.groups[layer]][: -(-positions // step)]
        arrays = [self.layout.arrays(block, layer) for block in blocks]
        for head in range(self.config.num_key_value_heads):
            for i, (k, v) in enumerate(arrays):
                rows = min(step, positions - i * step)
                keys.append(k[head, : rows // LANES])
                values.append(v[head, :rows])
        return keys, values

    def expect(self, length: int, reach: int, max_tokens: int) -> None:
        """Set the length of an empty cache whose arrays get what one for ``max_tokens`` held.

        Raises ValueError where that was a ring of another size.
        """
        sizes = zip(self.capacities, capacities(self.config, max_tokens), strict=True)
        if any(reach > min(size, before) and size != before for size, before in sizes):
            expected = f"{max_tokens}, for which windowed layers were sized"
            raise ValueError(f"max_tokens: expected {expected}, found {self.max_tokens}")
        self.reserve(reach)
        self.length, self._reach = length, reach

    def refill(self, filling: Filling) -> None:
        """All its tokens were computed with ``filling``."""
        self._fills = [(0, filling)]

    def fork(self) -> KVCache:
        """Another cache that holds the same tokens, and continues them apart.

        It shares the blocks of this one. Whoever writes to a shared block copies it first: where a text goes on, that
        is the last one. ``llm.generate(prompt, n=...)`` and the other calls for many texts share memory by themselves.

        Raises:
            InsufficientMemoryError: full, it would not fit into the free memory.
            RuntimeError: another thread is using this cache.
        """
        require_memory(self.nbytes - self.held_bytes, f"fork of a KV cache of {self.max_tokens} tokens")
        with self.in_use():
            other = copy(self)
            other.ids, other._fills = self.ids.copy(), list(self._fills)
            other._owner, other._buffers = {}, {}
            other._blocks = [list(blocks) for blocks in self._blocks]
            other._set_tables(self.tables.copy())
            self._shared = {block for blocks in self._blocks for block in blocks}
            other._shared = set(self._shared)
            model: Any = self._model()
            if model is not None:
                model.forked(self, other)
        return other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write its tokens, with their keys and values, to a file for ``LLM.load_cache``.

        Raises:
            ValueError: it is empty; or its model is gone, or has other weights or adapters now than its tokens had.
            OSError: the file cannot be written; what was there before stays.
        """
        from ruvllm.model.cache_file import save_cache

        if not self.length:
            raise ValueError("cache: it is empty, there is nothing to save")
        model = self._model()
        if model is None:
            raise ValueError("cache: the model that computed its tokens is gone, and with it what identifies them")
        save_cache(model, self, path)

    def layer(self, i: int, length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of layer i as float32 (T, KV, D), in the order of positions: a copy, for inspection.

        Of a windowed layer the last T positions, else all. length: while a pass runs, the positions after it.
        """
        length = self.length if length is None else length
        held = np.arange(max(0, length - self.capacities[i]), length) % self.capacities[i]
        arrays = [self.layout.arrays(block, i) for block in self._blocks[self.layout.groups[i]]]
        keys, values = (np.concatenate(parts, axis=1) for parts in zip(*arrays, strict=True))
        dim = self.config.head_dim
        if self.dtype == "f16":
            keys, values = keys.view(np.float16), values.view(np.float16)
        heads, blocks, _, _ = keys.shape
        k = keys[:, :, :dim].transpose(1, 3, 0, 2).reshape(blocks * LANES, heads, dim)[held]
        v = values.transpose(1, 0, 2)[held, :, :dim]
        if self.dtype != "int8":
            return k.astype(np.float32), v.astype(np.float32)
        scales = np.ascontiguousarray(keys[:, :, dim:]).view(np.float32).reshape(heads, blocks, SCALE_ROWS // 4, LANES)
        k_scales, v_scales = scales.transpose(2, 1, 3, 0).reshape(2, blocks * LANES, heads, 1)[:, held]
        return k * k_scales, v * v_scales

    def __repr__(self) -> str:
        return f"KVCache({self.length} of {self.max_tokens} tokens, {self.dtype}, {self.nbytes / 1e6:.1f} MB)"
