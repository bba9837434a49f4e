"""The tape: a recorded sequence of operations, and the parallel region that replays it.

A row of the tape holds the address of a compiled operation, flags (whether there is a barrier before it, see
``threads.team``), and the operation's arguments. Rows do not depend on the model, the cache, the number of tokens or
the number of threads: an array argument is an *operand*, an offset into a memory *space*. The header says where each
space begins, and is filled in for each pass. So a tape is recorded once, and replayed for any cache, prompt and team.

    address = base[space] + offset * scale[space] + rank * stride[space]

- ABSOLUTE (weights, constants): base 0, scale 1; the offset is the address.
- SHARED (one copy for the team, tokens stacked): scale is the token capacity, offsets are bytes per token.
- LOCAL (the same, one copy per member): stride is the size of a member's copy.
- COS, SIN: offset is the rotary embedding, scale the bytes of its table.
- CACHE: no address: the offset is a layer, of whose cache operations find the blocks by the table CACHES.
- SLOTS, RUNS, CHOSEN: of passes over several sequences, see ``model.many``.

An operation is a C function of its own, compiled and cached by itself, for the models that use it. The region below
serves every model.
"""

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ruvllm.kernels.experts import MAX_EXPERTS
from ruvllm.kernels.jit.decorators import DISABLE_JIT, view_kernel
from ruvllm.kernels.jit.views import array_at, integer_loader
from ruvllm.kernels.quant.layout import BLOCK_TOKENS
from ruvllm.kernels.simd.vectors import prefetch_l2
from ruvllm.kernels.threads.regions import CFunction, Region
from ruvllm.kernels.threads.team import (
    admit,
    barrier,
    call_operation,
    close_gate,
    join_team,
    offer,
    offered,
    part,
    time_stamp,
)

# Header fields; then base, scale and stride of each space.
(
    THREADS, TOKENS, LOGIT_ROWS, ONE, SYNC, SYNC_SIZE, ROWS_ADDRESS, FIRST, END, TIMES, CAPACITY, SCRATCH_SIZE,
    BLOCK_ROWS, KEY_ROWS, VALUE_WIDTH, CHUNKS, CACHES, LAST_ADMISSION,
    CALLS, ROPE_PAIRS, RUN_COUNT, TABLE_SIZE,
) = range(22)  # fmt: skip
(
    ABSOLUTE, SHARED, LOCAL, POSITIONS, COS, SIN, CACHE, PARTIAL, SCRATCH, LOGITS, SLOTS, RUNS, CHOSEN,
) = range(13)  # fmt: skip
_SPACE_BITS = 4
_BASE, _SCALE, _STRIDE = (24 + i * (1 << _SPACE_BITS) for i in range(3))
EACH = _STRIDE + (1 << _SPACE_BITS)  # EACH + k: how many rows there are where each token has k of them
HEADER_SIZE = EACH + MAX_EXPERTS + 1

# Row fields. COUNT: the header field that holds the operation's number of rows. REPLICATED: each member computes all
# rows, into its own copy. ARGUMENTS: the first of up to twelve.
FUNCTION, FLAGS, COUNT, REPLICATED, ARGUMENTS = range(5)
# Flags. MEET: a barrier before the row. OFFER: before it, the leader publishes how many threads wait. ADMIT: they join
# before the row. ENTRY: the row runs only for members that start the replay here.
MEET, OFFER, ADMIT, ENTRY = 1, 2, 4, 8
FIELDS = 16
_ROW_BYTES = FIELDS * 8
_LINE = 8  # int64 fields of a cache line


class Member(NamedTuple):
    """What an operation knows of the member that runs it: the header, its rank in the team of ``size``, the rows."""

    header: Any
    rank: Any
    size: Any
    rows: Any
    replicated: Any


def operand(space: int, offset: int = 0) -> int:
    """An array argument: an offset into a space, as one integer."""
    return offset << _SPACE_BITS | space


def set_space(header: np.ndarray, space: int, base: int, scale: int = 1, stride: int = 0) -> None:
    """Where a space begins, the factor of its offsets, and the stride of the members' copies."""
    header[_BASE + space], header[_SCALE + space], header[_STRIDE + space] = base, scale, stride


@view_kernel
def address_for(m, operand, rank):
    """The address of a member's operand."""
    space, offset = operand & ((1 << _SPACE_BITS) - 1), operand >> _SPACE_BITS
    return m.header[_BASE + space] + offset * m.header[_SCALE + space] + rank * m.header[_STRIDE + space]


@view_kernel
def address_of(m, operand):
    """The address of this member's operand."""
    return address_for(m, operand, m.rank)


@view_kernel
def matrix(m, operand, rows, columns):
    """An operand as float32 (rows, columns)."""
    return array_at(address_of(m, operand), (rows, columns), np.float32)


@view_kernel
def number(m, operand):
    """An operand as one float32."""
    return array_at(address_of(m, operand), 1, np.float32)[0]


@view_kernel
def row_range(m):
    """The rows lo:hi that this member computes: all, or whole token blocks, whose rows share cache lines in 8 bits."""
    if m.replicated:
        return np.int64(0), m.rows
    lo, hi = part((m.rows + BLOCK_TOKENS - 1) // BLOCK_TOKENS, m.rank, m.size)
    return min(lo * BLOCK_TOKENS, m.rows), min(hi * BLOCK_TOKENS, m.rows)


class Operation(CFunction):
    """What one member does for one row of the tape; made by ``@operation`` from ``body(member, *arguments)``.

    ``arguments`` are the body's parameter names; recorders pass them by keyword. A parameter that is annotated with a
    class of named tuples stands for its fields.
    """

    parameters = 4  # table, row, rank, size

    def __init__(self, body: Callable[..., None]) -> None:
        parameters = list(inspect.signature(body).parameters.values())[1:]
        groups = tuple(getattr(p.annotation, "_fields", None) and p.annotation for p in parameters)
        self.arguments = tuple(
            name
            for p, group in zip(parameters, groups, strict=True)
            for name in (group._fields if group else (p.name,))
        )
        super().__init__(_entry(body, groups))

    if DISABLE_JIT:

        @cached_property
        def address(self) -> int:
            from ruvllm.kernels.threads.atomics_python import OPERATIONS

            OPERATIONS.append(self.function)
            return len(OPERATIONS)


def _entry(body: Callable[..., None], groups: tuple[Any, ...]) -> Callable[[Any, Any, Any, Any], None]:
    """The C function around a body: it unpacks the row."""
    inlined, load = view_kernel(body), integer_loader(groups)

    def call(table: Any, row: Any, rank: Any, size: Any) -> None:
        header, fields = array_at(table, HEADER_SIZE, np.int64), array_at(row, FIELDS, np.int64)
        m = Member(header, rank, size, header[fields[COUNT]], fields[REPLICATED])
        inlined(m, *load(row + ARGUMENTS * 8))

    call.__name__, call.__qualname__, call.__doc__ = body.__name__, body.__qualname__, body.__doc__
    return call


def operation(body: Callable[..., None]) -> Operation:
    """Make an operation of ``body(member, *arguments)``; it is compiled when its address is first needed."""
    return Operation(body)


def _replay(table: Any) -> None:
    """One thread's replay: rows FIRST:END in order. TIMES, if set, receives three time stamps per row and member."""
    t = array_at(table, HEADER_SIZE, np.int64)
    sync = array_at(t[SYNC], t[SYNC_SIZE], np.int64)
    rank, size, start = join_team(sync, t[THREADS], array_at(t[CALLS], 3, np.int64))
    if rank < 0:
        return
    start = max(start, t[FIRST])
    entering = True
    rows = array_at(t[ROWS_ADDRESS], (t[END], np.int64(FIELDS)), np.int64)
    fields = array_at(t[ROWS_ADDRESS], t[END] * FIELDS, np.int64)
    times = array_at(t[TIMES], (t[THREADS], t[END], np.int64(3)), np.int64)
    for i in range(start, t[END]):
        # Between two matrix products, rows of the tape are evicted from L1 and L2: prefetch the next one.
        prefetch_l2(fields, (i + 1) * FIELDS)
        prefetch_l2(fields, (i + 1) * FIELDS + _LINE)
        flags = rows[i, FLAGS]
        if t[TIMES]:
            times[rank, i, 0] = time_stamp()
        if i > start:  # earlier members have met here already
            if flags & OFFER:
                offer(sync, rank)
            if flags & MEET:
                barrier(sync, rank, size)
            if flags & ADMIT:
                larger = offered(sync, rank)
                if larger > size:
                    admit(sync, rank, size, larger, i)
                    size = larger
        if i == t[LAST_ADMISSION]:
            close_gate(sync, rank)
        entering = entering and flags & ENTRY != 0
        if t[TIMES]:
            times[rank, i, 1] = time_stamp()
        if t[rows[i, COUNT]] and (entering or not flags & ENTRY):
            call_operation(rows[i, FUNCTION], table, t[ROWS_ADDRESS] + i * _ROW_BYTES, rank, size)
        if t[TIMES]:
            times[rank, i, 2] = time_stamp()


replay = Region(_replay)
