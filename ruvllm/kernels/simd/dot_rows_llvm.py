"""Integer dot products for a tile, one or two panels times some tokens, whose accumulators stay in registers.

A tile is a tuple of vectors: those of all tokens for the first panel, then those for the second. Weights are a tuple of
one vector for each panel; its length gives the number of panels. simd/dot_llvm.py has the steps themselves.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ruvllm.kernels.jit.views import unpack
from ruvllm.kernels.simd import dot_llvm
from ruvllm.kernels.simd.dot_llvm import _BYTES, _I16, _add_pairs, add_signed, add_unsigned, adds_128, u8x64
from ruvllm.kernels.simd.memory_llvm import _load_as, _pointer, _read_f16, _target
from ruvllm.kernels.simd.rows_llvm import _at, _fma
from ruvllm.kernels.simd.vectors_llvm import (
    LANES,
    _constant,
    _splat,
    f32x16,
    i32x16,
)

__all__ = [
    "dot_rows",
    "end_rows",
    "f16_of",
    "fma_columns",
    "fma_panels",
    "lines_of",
    "offset_rows",
    "scale_rows",
    "sdot_rows",
    "signed_offset_rows",
    "start_rows",
    "store_panels",
]  # fmt: skip

_PAIRS = ir.VectorType(_I16, 32)
_OFFSET_128 = 2  # index of a group's offset for weights with 128 added (quant/layout.py)


def _sums(rows: Any) -> types.UniTuple:
    return types.UniTuple(i32x16, rows.count)


def _keep_order(builder: ir.IRBuilder) -> None:
    """A compiler fence, no instruction: loads before it in the IR stay before it in the machine code.

    Otherwise LLVM's scheduler takes a tile's tokens one after the other, with all eight dot products of a token's
    group in a row. Each depends on the one before and waits some five cycles for it, and within a hundred instructions
    of look-ahead (half as many with a second hardware thread) a core finds too few independent ones. Step by step,
    twelve are independent. (Where a vector is several registers, there are that many independent sums anyway, and
    LLVM's order needs fewer registers.)
    """
    builder.fence("acq_rel", targetscope="singlethread")


@intrinsic
def lines_of(typingctx: Any, w: Any, at: Any, offset: Any) -> Any:
    """The line of 64 bytes at w[at[i] + offset] for each panel i; ``at`` is a tuple of the panels' offsets."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        w, at, offset = args
        found = []
        for start in unpack(builder, at):
            pointer = _pointer(context, builder, sig.args[0], w, builder.add(start, offset))
            found.append(_load_as(builder, _BYTES, 1, pointer))
        return context.make_tuple(builder, sig.return_type, found)

    return types.UniTuple(u8x64, at.count)(w, at, types.intp), codegen


@intrinsic
def f16_of(typingctx: Any, w: Any, at: Any, offset: Any) -> Any:
    """Sixteen IEEE halves at byte at[i] + offset of w for each panel i, as float32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        w, at, offset = args
        one = f32x16(sig.args[0], types.intp)
        found = [_read_f16(context, builder, one, (w, builder.add(start, offset))) for start in unpack(builder, at)]
        return context.make_tuple(builder, sig.return_type, found)

    return types.UniTuple(f32x16, at.count)(w, at, types.intp), codegen


def _splats(context: Any, builder: Any, array: Any, kind: Any, index: ir.Value, step: ir.Value, count: int) -> Any:
    """The ``count`` elements array[index + r step], each broadcast to all lanes."""
    found = []
    for row in range(count):
        pointer = _pointer(context, builder, kind, array, _at(builder, index, step, row), kind.dtype)
        found.append(_splat(builder, builder.load(pointer), LANES))
    return found


def _offsets(context: Any, builder: Any, sig: Any, args: Any, column: int = 0) -> Any:
    offsets, index, step = args[:3]
    panels = sig.args[3].count
    index = builder.add(index, index.type(column))
    found = _splats(context, builder, offsets, sig.args[0], index, step, sig.return_type.count // panels)
    return context.make_tuple(builder, sig.return_type, found * panels)


@intrinsic
def offset_rows(typingctx: Any, offsets: Any, index: Any, step: Any, at: Any, tile: Any) -> Any:
    """The tokens' int32 offsets[index], offsets[index + step], .., broadcast to all lanes, for each panel of ``at``."""
    return _sums(tile)(offsets, types.intp, types.intp, at, tile), _offsets


@intrinsic
def signed_offset_rows(typingctx: Any, offsets: Any, index: Any, step: Any, at: Any, tile: Any) -> Any:
    """Initial sums for signed weights: where ``sdot_rows`` adds 128 to them, these subtract it again; else zeros."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if adds_128(dot_llvm.target_kind()):
            return _offsets(context, builder, sig, args, _OFFSET_128)
        return context.make_tuple(builder, sig.return_type, [_constant(i32x16, 0)] * sig.return_type.count)

    return _sums(tile)(offsets, types.intp, types.intp, at, tile), codegen


@intrinsic
def start_rows(typingctx: Any, offsets: Any) -> Any:
    """Accumulators for ``dot_rows`` that start from ``offsets``; only ``end_rows`` can read them."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if dot_llvm.target_kind() != "avx2":
            return args[0]
        return context.make_tuple(builder, offsets, [_constant(i32x16, 0)] * offsets.count)

    return offsets(offsets), codegen


@intrinsic
def end_rows(typingctx: Any, sums: Any, offsets: Any) -> Any:
    """The sums that accumulators hold; ``offsets`` are those that they started from."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if dot_llvm.target_kind() != "avx2":
            return args[0]
        found = [
            builder.add(start, _add_pairs(builder, builder.bitcast(acc, _PAIRS)))
            for acc, start in zip(*(unpack(builder, a) for a in args), strict=True)
        ]
        return context.make_tuple(builder, sums, found)

    return sums(sums, sums), codegen


def _step(add: Any) -> Any:
    @intrinsic
    def step(typingctx: Any, sums: Any, lines: Any, xq: Any, index: Any, step: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            sums, lines, xq, index, step = args
            kind = dot_llvm.target_kind()
            sums, lines = unpack(builder, sums), unpack(builder, lines)
            rows = len(sums) // len(lines)
            found = list(sums)
            for row in range(rows):
                pointer = _pointer(context, builder, sig.args[2], xq, _at(builder, index, step, row), types.int8)
                quads = _splat(builder, _load_as(builder, ir.IntType(32), 1, pointer), LANES)
                for i in range(row, len(sums), rows):
                    found[i] = add(builder, kind, sums[i], lines[i // rows], quads)
            if rows > 1 and kind == "vnni512":
                _keep_order(builder)
            return context.make_tuple(builder, sig.return_type, found)

        return sums(sums, lines, xq, types.intp, types.intp), codegen

    return step


# One step (simd/dot_llvm.py) with the quads xq[index + row step : +4] and unsigned weights below 128, or signed ones.
dot_rows = _step(add_unsigned)
sdot_rows = _step(add_signed)


@intrinsic
def fma_panels(typingctx: Any, w: Any, x: Any, index: Any, tile: Any) -> Any:
    """The tile + w[panel] x[index + row]."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        w, x, index, tile = args
        w, tile = unpack(builder, w), unpack(builder, tile)
        rows = len(tile) // len(w)
        splats = _splats(context, builder, x, sig.args[1], index, index.type(1), rows)
        found = [_fma(builder, w[i // rows], splats[i % rows], total) for i, total in enumerate(tile)]
        return context.make_tuple(builder, sig.return_type, found)

    return tile(w, x, types.intp, tile), codegen


@intrinsic
def scale_rows(typingctx: Any, tile: Any, sums: Any, scales: Any, xs: Any, index: Any) -> Any:
    """The tile + float(sums) (scales[panel] xs[index + row])."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        tile, sums, scales = (unpack(builder, a) for a in args[:3])
        rows = len(tile) // len(scales)
        splats = _splats(context, builder, args[3], sig.args[3], args[4], args[4].type(1), rows)
        found = []
        for i, (total, s) in enumerate(zip(tile, sums, strict=True)):
            factor = builder.fmul(scales[i // rows], splats[i % rows])
            found.append(_fma(builder, builder.sitofp(s, f32x16.llvm), factor, total))
        return context.make_tuple(builder, sig.return_type, found)

    return tile(tile, sums, scales, xs, types.intp), codegen


@intrinsic
def fma_columns(
    typingctx: Any, columns: Any, offsets: Any, index: Any, x: Any, x_index: Any, step: Any, at: Any, tile: Any
) -> Any:
    """The tile + v x[x_index + 2 row step], v the panel's 16 rows of the column that is unpacked in ``columns``.

    offsets[index + row step]: the offset of the column if there were one panel. For several panels (those of ``at``),
    their vectors are stored one after the other, and offsets are that many times as large.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        columns, offsets, index, x, x_index, step, _, tile = args
        tile, panels = unpack(builder, tile), sig.args[6].count
        rows = len(tile) // panels
        splats = _splats(context, builder, x, sig.args[3], x_index, builder.mul(step, step.type(2)), rows)
        found = list(tile)
        for row in range(rows):
            pointer = _pointer(context, builder, sig.args[1], offsets, _at(builder, index, step, row), types.int32)
            first = builder.mul(builder.zext(builder.load(pointer), index.type), index.type(panels))
            for panel in range(panels):
                here = builder.add(first, index.type(panel * LANES))
                pointer = _pointer(context, builder, sig.args[0], columns, here, types.float32)
                i = panel * rows + row
                found[i] = _fma(builder, _load_as(builder, f32x16.llvm, 4, pointer), splats[row], tile[i])
        return context.make_tuple(builder, sig.return_type, found)

    return tile(columns, offsets, types.intp, x, types.intp, types.intp, at, tile), codegen


@intrinsic
def store_panels(typingctx: Any, out: Any, starts: Any, offset: Any, step: Any, tile: Any) -> Any:
    """Store the vector of panel i and token t at out[starts[i] + offset + t step:], for each of ``starts``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        out, starts, offset, step, tile = args
        starts, vectors = unpack(builder, starts), unpack(builder, tile)
        rows = len(vectors) // len(starts)
        for i, vector in enumerate(vectors):
            target_index = builder.add(starts[i // rows], _at(builder, offset, step, i % rows))
            pointer = _target(context, builder, sig.args[0], out, target_index, types.float32)
            builder.store(vector, builder.bitcast(pointer, f32x16.llvm.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(out, starts, types.intp, types.intp, tile), codegen
