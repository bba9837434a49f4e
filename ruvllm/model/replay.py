"""Replay: the tapes of a model, and the working memory that they run in."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from ruvllm.kernels import tape as t
from ruvllm.kernels.attention.decode import chunk_count, partial_width, token_scratch_size
from ruvllm.kernels.attention.kv import key_rows, padded
from ruvllm.kernels.attention.prefill import prompt_scratch_size
from ruvllm.kernels.memory import aligned_empty, aligned_zeros
from ruvllm.kernels.operations import broadcast
from ruvllm.kernels.quant.layout import BLOCK_TOKENS
from ruvllm.kernels.tape import Operation
from ruvllm.kernels.threads.cores import scheduler_calls
from ruvllm.kernels.threads.pool import num_threads
from ruvllm.kernels.threads.team import sync_size
from ruvllm.model.config import ModelConfig
from ruvllm.model.exchange import Alone, Exchange
from ruvllm.model.kv_blocks import DTYPES
from ruvllm.model.kv_cache import KVCache
from ruvllm.model.kv_pool import KVPool
from ruvllm.model.layer import Decoder
from ruvllm.model.ops.placement import place
from ruvllm.model.ops.protocol import Hooks
from ruvllm.model.ops.recorder import Recorder
from ruvllm.model.ops.recording import Pass
from ruvllm.model.ops.schedule import Value
from ruvllm.model.ops.swapped import swapped_now
from ruvllm.model.ops.tape import Tape

if TYPE_CHECKING:
    from ruvllm.model.low_rank import AdapterSet, LowRank

# Multiply-adds of one compiled call, in whole layers: 0.2 s at 20 GFLOP/s, which any core reaches. One token of a small
# model takes one call for all layers, a prompt of a large one a call for each: Ctrl-C is seen between calls.
MACS_PER_CALL = 2_000_000_000
_EXPERT = re.compile(r"(?<=\.experts\.)\d+")
_EACH = np.arange(t.HEADER_SIZE - t.EACH)
_BETWEEN_MEMBERS = 128  # bytes between two members' copies: two cache lines, which some processors fetch together


class Runner(Protocol):
    """What replays a tape: the parallel region, or a substitute that measures or debugs."""

    def run(self, tape: Tape, working: Working) -> None:
        """Replay the rows FIRST:END of a tape with THREADS threads, as the header of the working memory says."""
        ...


class Parallel:
    """Replays in one parallel region."""

    def run(self, tape: Tape, working: Working) -> None:
        """See ``Runner``."""
        t.replay.run(working.address, int(working.header[t.THREADS]))


class Replayed(Protocol):
    """What a replay needs of a model: ``Llama`` is one. layer_weights: weights in the matrices of the largest layer."""

    config: ModelConfig
    decoder: Decoder
    adapters: AdapterSet | None
    runner: Runner
    layer_weights: int

    @property
    def tapes(self) -> Tapes:
        """Its tapes; others after ``weights_changed``."""
        ...


class Tapes:
    """The tapes of a model, recorded when needed: one for each kind of pass, cache dtype and shape of adapters."""

    def __init__(self, model: Replayed, hooks: Hooks | None = None) -> None:
        self.model, self.hooks = model, hooks
        self._recorded: WeakKeyDictionary[Any, dict[tuple[Any, ...], Tape]] = WeakKeyDictionary()  # by adapter set
        self._by_shape: dict[Any, Tape] = {}  # by the adapters' shapes

    def tape(self, kind: Pass, kv: str) -> Tape:
        """The tape for passes of one kind, with the adapters that are active now."""
        active = self.model.adapters  # read once: another thread may swap them meanwhile
        recorded = self._recorded.setdefault(self if active is None else active, {})
        key = kind, kv, swapped_now()
        found = recorded.get(key)
        if found is None:
            found = recorded[key] = self._record(*key, {} if active is None else active.matrices)
        return found

    def _record(self, kind: Pass, kv: str, swapped: frozenset[str], adapters: Mapping[str, LowRank]) -> Tape:
        """Record a tape, or reuse one that was recorded for adapters of the same shape."""
        shape = kind, kv, swapped, tuple((name, x.rank, x.down.dtype) for name, x in adapters.items())
        if shape in self._by_shape:
            return self._by_shape[shape].with_adapters(adapters)
        recorder = Recorder(kind, DTYPES[kv], adapters, self.hooks, swapped)
        self.model.decoder(recorder, recorder.source_of(self.model.config.hidden_size))
        recorder.require_cache_of(self.model.config)
        tape = recorder.finish()
        self._by_shape[shape] = replace(tape, adapters={})  # unused adapters are not kept alive
        return tape


class Working:
    """The working memory of passes of up to ``tokens`` tokens; it belongs to a KV cache and is allocated once."""

    def __init__(self, model: Replayed, cache: KVCache | KVPool, tokens: int, threads: int) -> None:
        config = model.config
        D, heads = config.head_dim, config.num_attention_heads
        self.model, self.tokens, self.threads = model, tokens, threads
        self.cache: Any = cache  # ``run`` needs a KVCache
        self.tape: Tape | None = None
        self.logits: np.ndarray | None = None
        self._angles: dict[int, np.ndarray] = {}  # cos and sin of the pass
        self.capacity = token_capacity(tokens)
        chunks = chunk_count(cache.max_tokens)
        scratch = max(prompt_scratch_size(D), token_scratch_size(D, heads // config.num_key_value_heads))
        self.positions = np.zeros(tokens, np.int64)
        self.sync = aligned_empty(sync_size(threads), np.int64)
        self.partial = aligned_empty((heads, chunks, partial_width(D)))
        self.scratch = aligned_empty((threads, scratch))
        self.header = h = np.zeros(t.HEADER_SIZE, np.int64)
        self.address = h.ctypes.data  # read once: NumPy makes an object for each access
        self._rows: dict[Value, np.ndarray] = {}  # those last requested
        h[t.ONE], h[t.CAPACITY], h[t.CHUNKS], h[t.SCRATCH_SIZE] = 1, self.capacity, chunks, scratch
        h[t.CACHES], h[t.BLOCK_ROWS] = cache.layer_table.ctypes.data, cache.layout.positions
        h[t.TABLE_SIZE] = cache.tables.shape[1]  # for a pool, ``model.many`` sets it before each pass
        h[t.KEY_ROWS], h[t.VALUE_WIDTH] = key_rows(D, DTYPES[cache.dtype]), padded(D)
        h[t.SYNC], h[t.SYNC_SIZE] = self.sync.ctypes.data, self.sync.size
        h[t.CALLS] = scheduler_calls().ctypes.data
        t.set_space(h, t.ABSOLUTE, 0)
        t.set_space(h, t.POSITIONS, self.positions.ctypes.data)
        t.set_space(h, t.PARTIAL, self.partial.ctypes.data)
        t.set_space(h, t.SCRATCH, self.scratch.ctypes.data, 1, self.scratch[0].nbytes)

    def run(self, ids: np.ndarray, cos: np.ndarray, sin: np.ndarray, logits: np.ndarray | None) -> None:
        """Run the model on ids, appending to the cache; write logits (rows, V) of the last 1 or all of them."""
        length, T = self.cache.length, len(ids)
        self.positions[:T] = np.arange(length, length + T) if T > 1 else length
        tape = self.model.tapes.tape(Pass.of(T), self.cache.dtype)
        self.replay(tape, ids, cos, sin, logits)

    def replay(self, tape: Tape, ids: np.ndarray, cos: np.ndarray, sin: np.ndarray, logits: np.ndarray | None) -> None:
        """Replay a tape for ids at ``positions``."""
        h, T = self.header, len(ids)
        self._use(tape)
        h[t.TOKENS] = T
        np.multiply(_EACH, T, out=h[t.EACH :])
        self.model.decoder.embed.take(ids, self.rows_of(tape.source))
        h[t.ROPE_PAIRS] = cos.shape[2]
        t.set_space(h, t.COS, cos.ctypes.data, cos.strides[0])
        t.set_space(h, t.SIN, sin.ctypes.data, sin.strides[0])
        t.set_space(h, t.LOGITS, 0 if logits is None else logits.ctypes.data)
        h[t.LOGIT_ROWS] = 0 if logits is None else len(logits)
        self.logits, self._angles = logits, {t.COS: cos, t.SIN: sin}
        h[t.THREADS] = min(num_threads(), self.threads)
        per_call = max(1, MACS_PER_CALL // (T * self.model.layer_weights))  # segments
        self._call(tape, -1)
        first = 0
        for i, (start, end) in enumerate(tape.segments):
            if i in tape.calls or (i + 1) % per_call == 0 or end == len(tape.rows):
                h[t.FIRST], h[t.END], h[t.LAST_ADMISSION], first = first, end, start, end
                self.sync[:] = 0
                self.model.runner.run(tape, self)
                self._call(tape, i)

    def _call(self, tape: Tape, segment: int) -> None:
        """The Python functions that follow a segment; -1: those before the first."""
        for values, function in tape.calls.get(segment, ()):
            if self.header[values[0].count]:
                function(*map(self._array, values))

    def _array(self, value: Value) -> np.ndarray:
        """The rows of a value, with its heads apart, or the angles of this pass."""
        if value.space in self._angles:
            return self._angles[value.space][value.offset]
        rows = self.rows_of(value)
        return rows.reshape(len(rows), -1, value.dim) if value.dim else rows

    def rows_of(self, value: Value) -> np.ndarray:
        """The rows of a value in this pass, (rows, width); of values that each member has, member 0's copy."""
        count = int(self.header[value.count])
        if value.space == t.LOGITS:
            return np.empty((0, value.width), np.float32) if self.logits is None else self.logits
        rows = self._rows.get(value)
        if rows is None or len(rows) != count:
            rows = self._rows[value] = self._found_rows(value, count)
        return rows

    def _found_rows(self, value: Value, count: int) -> np.ndarray:
        memory = self.local if value.space == t.LOCAL else self.shared
        rows = memory[value.offset * self.capacity :][: count * value.row_bytes]
        return rows.view(np.float32).reshape(count, value.width)

    def _use(self, tape: Tape) -> None:
        """Point the header at a tape, with memory for its values."""
        if tape is self.tape:
            return
        before, self.tape = self.tape, tape
        self._rows.clear()
        self.header[t.ROWS_ADDRESS] = tape.rows.ctypes.data
        if before is None or (before.shared, before.local) != (tape.shared, tape.local):
            stride = tape.local * self.capacity + _BETWEEN_MEMBERS if tape.local else 0
            self.shared = aligned_zeros(tape.shared * self.capacity, np.uint8)
            self.local = aligned_zeros(stride * self.threads, np.uint8)
            t.set_space(self.header, t.SHARED, self.shared.ctypes.data, self.capacity)
            t.set_space(self.header, t.LOCAL, self.local.ctypes.data, self.capacity, stride)


def token_capacity(tokens: int) -> int:
    """Rows of working memory for passes of up to ``tokens``: rows in 8 bits are stored in blocks of BLOCK_TOKENS."""
    return tokens if tokens < BLOCK_TOKENS else -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS


def working_bytes(config: ModelConfig, tokens: int, architecture: type[Decoder] = Decoder) -> int:
    """Bytes of working memory for passes of up to ``tokens`` tokens on integer weights, threads' scratch apart."""
    recorder = recorded(config, ["int8"], architecture=architecture)
    return token_capacity(tokens) * place(recorder.schedule.ordered(), recorder.source, ())[t.SHARED]


def recorded(
    config: ModelConfig, layouts: list[str], kind: Pass = Pass.PROMPT, kv: str = "f32",
    architecture: type[Decoder] = Decoder,
) -> Recorder:  # fmt: skip
    """The recorded pass of a model without weights, whose matrices cycle through these layouts."""
    recorder = Recorder(kind, DTYPES[kv], {})
    architecture(config, _Shapes(config, layouts))(recorder, recorder.source_of(config.hidden_size))
    return recorder


def needed_operations(
    config: ModelConfig, layouts: list[str], kv: str, architecture: type[Decoder] = Decoder
) -> list[Operation]:
    """The operations that replay a model with matrices in these layouts; none is compiled here."""
    found: dict[Operation, None] = {}
    for i in range(len(layouts)):  # each layout once first: a mixture has few groups of matrices
        for kind in (Pass.TOKEN, Pass.PROMPT):
            steps = recorded(config, layouts[i:] + layouts[:i], kind, kv, architecture).schedule.steps
            found |= dict.fromkeys(step.operation for step in steps)
    return [*found, broadcast]


class _Shapes:
    """Placeholder parameters: all that a recorder needs to know of a model. Layouts alternate."""

    exchange: Exchange = Alone()

    def __init__(self, config: ModelConfig, layouts: list[str]) -> None:
        self.shapes, self.layouts = config.tensor_shapes(), itertools.cycle(layouts)
        self.of_experts: dict[str, str] = {}  # layouts: those of a group are the same

    def linear(self, name: str) -> Any:
        """A placeholder for a matrix."""
        rows, columns = self.shapes[name]
        group, layout = _EXPERT.sub("", name), next(self.layouts)
        layout = layout if group == name else self.of_experts.setdefault(group, layout)
        weights = SimpleNamespace(layout=layout, address=lambda: (0, 0))
        bias = np.empty(rows, np.float32) if f"{name}_bias" in self.shapes else None
        return SimpleNamespace(name=name, rows=rows, columns=columns, weights=weights, bias=bias)

    def vector(self, name: str) -> np.ndarray:
        """A placeholder for a vector."""
        return np.empty(self.shapes[name], np.float32)
