"""How a tape is recorded: steps and what they read and write, new values, calls of Python between operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from ruvllm.kernels import operations as o
from ruvllm.kernels import tape as t
from ruvllm.kernels.tape import Operation
from ruvllm.model.kv_size import FEW_TOKENS
from ruvllm.model.ops.protocol import Hooks
from ruvllm.model.ops.schedule import ANY, PRIVATE, Access, Partition, Schedule, Step, Value, by_rows
from ruvllm.model.ops.tape import Calls, Tape, assemble

if TYPE_CHECKING:
    from ruvllm.model.config import ModelConfig
    from ruvllm.model.low_rank import LowRank


class Pass(Enum):
    """The tokens that one replay of a tape runs."""

    TOKEN = "one token of one sequence"
    FEW = "at most FEW_TOKENS tokens of one sequence"
    PROMPT = "more tokens of one sequence"
    FEW_OF_MANY = "at most FEW_TOKENS tokens of several sequences"
    MANY = "more tokens of several sequences"

    @property
    def many(self) -> bool:
        """Whether the tokens are of several sequences, in a pool."""
        return self in (Pass.FEW_OF_MANY, Pass.MANY)

    @property
    def few(self) -> bool:
        """Whether operations on rows are replicated."""
        return self in (Pass.TOKEN, Pass.FEW, Pass.FEW_OF_MANY)

    @staticmethod
    def of(tokens: int, many: bool = False) -> Pass:
        """The kind of pass for so many tokens, of one or of several sequences."""
        if many:
            return Pass.FEW_OF_MANY if tokens <= FEW_TOKENS else Pass.MANY
        return Pass.TOKEN if tokens == 1 else Pass.FEW if tokens <= FEW_TOKENS else Pass.PROMPT


class Recording:
    """Records one kind of pass.

    Args:
        kind: the tokens of one replay.
        kv: the NumPy scalar class of the KV cache.
        adapters: what is added to each matrix, by its name.
        hooks: what Python does at named arrays.
        swapped: names of kernels that Python is to call in place of the operations.
    """

    def __init__(
        self, kind: Pass, kv: type, adapters: Mapping[str, LowRank], hooks: Hooks | None = None,
        swapped: frozenset[str] = frozenset(),
    ) -> None:  # fmt: skip
        self.kind, self.kv, self.adapters, self.swapped = kind, kv, adapters, swapped
        self.hooks: Hooks = hooks or {}
        self.single = kind is Pass.TOKEN
        self.schedule = Schedule()
        self.kept: list[object] = []  # owners of the memory whose addresses are on the tape
        self.calls: Calls = {}
        self.source = Value()
        self._layer = -1
        self._partial = Value(space=t.PARTIAL)
        self._ended = False
        self._gathers: list[Value] = []  # gathered rows
        self._rounded: list[Value] = []  # those with rows in 8 bits
        self._cached: set[tuple[int, int, int]] = set()  # layer, kv heads and head size of each attention
        self._caches: dict[int, Value] = {}

    def source_of(self, width: int) -> Value:
        """The input of the first layer: embedded tokens (T, width)."""
        self.source = self._floats(t.TOKENS, width)
        return self.source

    def finish(self) -> Tape:
        """The tape of everything recorded."""
        return assemble(self.schedule.ordered(), self.source, self.calls, self.kept, self.adapters)

    def require_cache_of(self, config: ModelConfig) -> None:
        """Raise ValueError unless each attention's keys and values fit a cache of this configuration."""
        layers, kv_heads, dim = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        for layer, found_heads, found_dim in sorted(self._cached):
            if not 0 <= layer < layers or (found_heads, found_dim) != (kv_heads, dim):
                raise ValueError(
                    f"attention: found layer {layer} with {found_heads} kv heads of {found_dim}, expected one of "
                    f"{layers} layers with {kv_heads} kv heads of {dim}, as the cache has"
                )

    @property
    def _row_space(self) -> int:
        return t.LOCAL if self.kind.few else t.SHARED

    def _floats(self, count: int, width: int, dim: int = 0) -> Value:
        """A new float32 array; of a few tokens each member has a copy."""
        return Value(count, width, 4 * width, self._row_space, dim=dim)

    def _like(self, x: Value) -> Value:
        return self._floats(x.count, x.width, x.dim)

    def _rows(self, x: Value) -> Partition:
        """How an operation on rows divides x."""
        if x.space == t.LOCAL:
            return PRIVATE
        return ANY if self.kind.few else by_rows(x.count)

    def _whole(self, x: Value) -> Access:
        """x read as a whole by every member."""
        return Access(x, PRIVATE if x.space == t.LOCAL else ANY)

    def _on_rows(
        self, operation: Operation, inputs: list[Value], out: Value, arguments: dict[str, object], in_place: bool = True
    ) -> Value:
        reads = [Access(x, self._rows(x)) for x in inputs]
        self._record(operation, out.count, reads, [Access(out, self._rows(out))], arguments, in_place=in_place)
        return out

    def _array(self, array: np.ndarray) -> int:
        self.kept.append(array)
        return t.operand(t.ABSOLUTE, array.ctypes.data)

    def _number(self, x: float) -> int:
        return self._array(np.array([x], np.float32))

    def _record(
        self, operation: Operation, count: int, reads: list[Access], writes: list[Access],
        arguments: Mapping[str, object], label: str = "", in_place: bool = False,
    ) -> None:  # fmt: skip
        if self._ended:
            raise ValueError(f"{operation.__name__}: nothing may follow ops.logits")
        for value, _ in reads:
            self._gathered(value)
        name = label or operation.__name__
        self.schedule.add(Step(operation, count, reads, writes, dict(arguments), in_place, name, self._layer))

    def _gathered(self, x: Value) -> None:
        """Record the gathering of rows that are now read, unless it was."""
        if x.source is None:
            return
        (source, routing), x.source = x.source, None
        arguments = {"x": source, "routing": routing, "out": x, "columns": x.width, "k": routing.width}
        reads = [self._whole(source), self._whole(routing)]
        self._record(o.gather, x.count, reads, [Access(x, self._rows(x))], arguments)

    def _require_rows(self, name: str, x: Value, count: int) -> None:
        """Raise ValueError unless x has so many rows, as a header field says."""
        if x.count != count:
            each = max(1, count - t.EACH)
            raise ValueError(f"{name}: expected {each} row{'s' * (each > 1)} for each token, found others")

    def _swapped(self, name: str, function: Callable[..., object], out: Value, *inputs: Value) -> Value:
        """out, which a swapped kernel fills anew after the operation."""
        if name in self.swapped:
            self._call(function, out, *inputs)
        return out

    def _call(self, function: Callable[..., object], *values: Value) -> None:
        """The replay returns here, and Python gets the values, to read, change or fill them."""
        segment = self.schedule.steps[-1].segment if self.schedule.steps else -1
        self.calls.setdefault(segment, []).append((values, function))
        self.schedule.end_segment(meet=True)
        for x in self._rounded:  # rounded anew: the first value may have changed, and members may join who have no copy
            x.quantized = None
        self._rounded.clear()
