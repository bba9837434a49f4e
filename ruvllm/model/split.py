"""SplitLlama: a model that several ranks run together, each with its share of the weights and of the KV cache.

Rank 0 decides: it samples, and tells the others before each pass which tokens follow which cache. They ``follow``. So
whatever runs on one model runs on rank 0 of a split one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from functools import partial
from threading import RLock

import numpy as np

from ruvllm.kernels.memory import aligned_empty
from ruvllm.kernels.threads.pool import limited_to
from ruvllm.model.config import ModelConfig
from ruvllm.model.exchange import exchange_of
from ruvllm.model.kv_blocks import DTYPES
from ruvllm.model.kv_cache import KVCache
from ruvllm.model.kv_size import PREFILL_TOKENS
from ruvllm.model.linear import Linear
from ruvllm.model.llama import Llama, Weights
from ruvllm.model.low_rank import AdapterSet, Factors
from ruvllm.model.names import Point
from ruvllm.model.ops.eager import Eager
from ruvllm.model.ranks import Ranks, deaf_to_interrupts, guard, uninterrupted
from ruvllm.model.replay import Tapes
from ruvllm.model.share import Share

_KINDS = tuple(DTYPES)  # the precisions of KV caches


class Command(IntEnum):
    """What rank 0 tells the others to do."""

    PASS = 1
    ADAPTERS = 2
    FORK = 3
    END = 4


# A command: these fields, then the numbers of caches that are gone, then the tokens of a pass.
_FIELDS = _COMMAND, _CACHE, _FORK, _KIND, _CAPACITY, _LENGTH, _TOKENS, _ROWS, _GONE = range(9)
_MOST_GONE = 8  # caches that one command can report as gone


class SplitLlama(Llama):
    """One rank's share of a model.

    Args:
        shares: what each rank holds.
        ranks: all of them.
        weights: the share's tensors.
        layout, threads, progress: as for ``Llama``.
        wire: as ``shares`` were made for.
    """

    def __init__(
        self, shares: list[Share], ranks: Ranks, weights: Weights, layout: str = "auto", threads: int | None = None,
        progress: Callable[[int], None] | None = None, wire: str = "auto",
    ) -> None:  # fmt: skip
        self.ranks: Ranks = ranks
        self.exchange = exchange_of(ranks, shares, wire)
        self.shares, self.share = shares, shares[ranks.rank]
        super().__init__(self.share.local, weights, layout, threads, progress=progress)
        embed = self.decoder.embed
        self.decoder.embed = _Embedding(embed, self.share.tokens, ranks)
        self._lock = RLock()  # one pass at a time: threads of rank 0 share the communicator
        self._running = False
        self._command = np.zeros(len(_FIELDS) + _MOST_GONE + PREFILL_TOKENS, np.int64)
        self._logits: dict[int, np.ndarray] = {}
        self._numbers: weakref.WeakKeyDictionary[KVCache, int] = weakref.WeakKeyDictionary()  # rank 0's caches
        self._made = 0
        self._gone: list[int] = []
        self._factors: weakref.WeakKeyDictionary[AdapterSet, Mapping[str, Factors]] = weakref.WeakKeyDictionary()

    def guard(self) -> None:
        """Once every rank has its share: see to it that none waits for ever where the program of one ends."""
        guard(self.ranks, partial(_end, self.ranks, len(self._command)))

    @property
    def whole_config(self) -> ModelConfig:
        """The configuration of the whole model."""
        return self.share.config

    @property
    def points(self) -> dict[str, Point]:
        """Raises ValueError: no rank has whole arrays."""
        raise ValueError("trace, edit, embed, names: not for a model that is split over ranks; load it on one")

    @property
    def tapes(self) -> Tapes:
        """What is replayed in a pass that all ranks take part in; raises ValueError outside of one."""
        if not self._running:
            raise ValueError("a model that is split over ranks runs one sequence at a time, and cannot be trained")
        return super().tapes

    def forward(
        self, ids: Iterable[int] | np.ndarray, cache: KVCache, last_only: bool = False,
        out: np.ndarray | None = None, ops: Callable[..., Eager] | None = None,
    ) -> np.ndarray:  # fmt: skip
        """See ``Llama.forward``; for rank 0, the others ``follow``."""
        self._require_first()
        with self._lock:
            return super().forward(ids, cache, last_only, out, ops)

    def _forward(
        self, ids: np.ndarray, cache: KVCache, logits: np.ndarray | None, ops: Callable[..., Eager] | None
    ) -> None:
        """A pass on all ranks; rank 0 gets the logits."""
        with uninterrupted():
            try:
                self._announce(Command.PASS, cache, ids, 0 if logits is None else len(logits))
                self._run(ids, cache, logits, 0 if logits is None else len(logits), ops)
            except BaseException as error:  # the others wait in a sum
                self.ranks.abort(error)
                raise

    def _run(
        self, ids: np.ndarray, cache: KVCache, logits: np.ndarray | None, rows: int,
        ops: Callable[..., Eager] | None = None,
    ) -> None:  # fmt: skip
        """This rank's part of a pass."""
        part = self._rows(rows) if rows else None
        self._running = True
        try:
            super()._forward(ids, cache, part, ops)
        finally:
            self._running = False
        if part is not None:
            self.ranks.gather_columns(part, [share.tokens for share in self.shares], logits)

    def _rows(self, rows: int) -> np.ndarray:
        """A buffer for this rank's columns of so many rows of logits."""
        if rows not in self._logits:
            self._logits = {1: self._logits.get(1, aligned_empty((1, len(self.share.tokens))))}
            self._logits[rows] = aligned_empty((rows, len(self.share.tokens)))
        return self._logits[rows]

    def identity(self) -> str:
        """Raises ValueError: a file of a KV cache holds all of it, which no rank has."""
        raise ValueError("save, load_cache: not for a model that is split over ranks; load it on one")

    def forked(self, cache: KVCache, fork: KVCache) -> None:
        """Rank 0: let the other ranks fork their part of the cache."""
        if cache in self._numbers and not self.ranks.ended:
            with self._lock, uninterrupted():
                self._announce(Command.FORK, cache, fork=fork)

    def unembed(self, x: np.ndarray) -> np.ndarray:
        """Raises ValueError: no rank has the whole head."""
        raise ValueError("unembed: not for a model that is split over ranks; load it on one")

    def pack_adapters(self, factors: Mapping[str, Factors]) -> AdapterSet:
        """This rank's share of adapters; ``factors`` are those of the whole model."""
        packed = super().pack_adapters(factors)
        self._factors[packed] = factors
        return packed

    def _held(self, name: str, factors: Factors) -> Factors:
        part, (down, up) = self.share.part(name), factors
        assert part is not None
        return (
            down if part.columns is None else down[:, part.columns.start : part.columns.stop],
            up if part.rows is None else up[part.rows.start : part.rows.stop],
        )

    def set_adapters(self, adapters: AdapterSet | None) -> None:
        """Set the adapters of all ranks from the next token on."""
        self._require_first()
        with self._lock, uninterrupted():
            if adapters is not self.adapters:
                self._announce(Command.ADAPTERS)
                self.ranks.share_object(None if adapters is None else dict(self._factors[adapters]))
            super().set_adapters(adapters)

    def weights_changed(self) -> None:
        """Raises ValueError: adapters cannot be merged into a part of the weights."""
        raise ValueError("merge: not for a model that is split over ranks; adapters apply without it")

    # Rank 0.

    def _announce(
        self, command: Command, cache: KVCache | None = None, ids: np.ndarray | None = None, rows: int = 0,
        fork: KVCache | None = None,
    ) -> None:  # fmt: skip
        """Tell the other ranks; of a pass its cache, tokens, and how many rows of logits are wanted."""
        c, first = self._command, len(_FIELDS)
        c[:first] = 0
        c[_COMMAND] = command
        if cache is not None and ids is not None:
            c[_CACHE], c[_KIND], c[_CAPACITY] = self._number(cache), _KINDS.index(cache.dtype), cache.max_tokens
            c[_LENGTH], c[_TOKENS], c[_ROWS] = cache.length, len(ids), rows
            c[first + _MOST_GONE :][: len(ids)] = ids
        if cache is not None and fork is not None:
            c[_CACHE], c[_FORK] = self._number(cache), self._number(fork)
        gone = self._gone[:_MOST_GONE]
        del self._gone[: len(gone)]
        c[_GONE] = len(gone)
        c[first : first + len(gone)] = gone
        self.ranks.announce(c)

    def _number(self, cache: KVCache) -> int:
        """The number by which the other ranks know a cache."""
        if cache not in self._numbers:
            self._made += 1
            self._numbers[cache] = self._made
            weakref.finalize(cache, self._gone.append, self._made).atexit = False
        return self._numbers[cache]

    def end(self) -> None:
        """Rank 0: let the other ranks return from ``follow``; the model cannot be used any more."""
        if self.ranks.rank == 0 and not self.ranks.ended:
            self._announce(Command.END)
            self.ranks.ended = True

    def _require_first(self) -> None:
        if self.ranks.ended:
            raise RuntimeError("the other ranks have ended: this model was closed")
        if self.ranks.rank:
            raise RuntimeError(f"rank {self.ranks.rank} computes what rank 0 asks for: call follow() on it")

    # The other ranks.

    def follow(self) -> None:
        """Carry out rank 0's commands until it ends. An error here ends all ranks. Ctrl-C is left to rank 0."""
        if self.ranks.rank == 0:
            raise RuntimeError("follow: rank 0 leads, the others follow")
        if self.ranks.ended:
            raise RuntimeError("follow: rank 0 has closed this model; load it again")
        caches: dict[int, KVCache] = {}
        with deaf_to_interrupts():
            try:
                while self._obey(caches):
                    pass
            except BaseException as error:
                self.ranks.abort(error)
                raise
        self.ranks.ended = True

    def _obey(self, caches: dict[int, KVCache]) -> bool:
        """The next command; False at the last."""
        c, first = self._command, len(_FIELDS)
        self.ranks.listen(c)
        for number in c[first : first + int(c[_GONE])].tolist():
            caches.pop(number, None)
        if c[_COMMAND] == Command.END:
            return False
        if c[_COMMAND] == Command.ADAPTERS:
            factors = self.ranks.share_object(None)
            super().set_adapters(None if factors is None else self.pack_adapters(factors))
            return True
        if c[_COMMAND] == Command.FORK:
            caches[int(c[_FORK])] = caches[int(c[_CACHE])].fork()
            return True
        number, kind = int(c[_CACHE]), _KINDS[int(c[_KIND])]
        if number not in caches:
            caches[number] = self.new_cache(int(c[_CAPACITY]), kind)
            caches[number].claim(self)
        cache = caches[number]
        cache.truncate(int(c[_LENGTH]))
        with limited_to(self.threads):
            self._run(c[first + _MOST_GONE :][: int(c[_TOKENS])].copy(), cache, None, int(c[_ROWS]))
        return True


class _Embedding(Linear):
    """The embeddings of all tokens, of which this rank has some: a sum over the ranks of each one's rows."""

    def __init__(self, rows: Linear, tokens: range, ranks: Ranks) -> None:
        super().__init__(rows.weights, rows.bias, rows.name)
        self._tokens, self._ranks = tokens, ranks

    def take(self, ids: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Rows ids (T,) int64 of the whole matrix as (T, K) float32, into ``out`` if given."""
        out = np.empty((len(ids), self.columns), np.float32) if out is None else out
        mine = (ids >= self._tokens.start) & (ids < self._tokens.stop)
        super().take(np.where(mine, ids - self._tokens.start, 0), out)
        out[~mine] = 0
        self._ranks.add(out)
        return out


def _end(ranks: Ranks, size: int) -> None:
    """At the end of a program: rank 0 lets the others go, which must not end before it lets them."""
    from mpi4py import MPI

    if ranks.ended or MPI.Is_finalized():
        return
    command = np.zeros(size, np.int64)
    if ranks.rank == 0:
        command[_COMMAND] = Command.END
        ranks.announce(command)
        return
    ranks.listen(command)
    if command[_COMMAND] != Command.END:
        ranks.abort(RuntimeError("its program has ended, but rank 0 uses the model: call follow() on it"))
