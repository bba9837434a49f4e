"""Integer dot products for a tile of tokens: tuples of sums that stay in registers (see _dot_llvm.py for the steps).

A tuple has one vector of 16 sums for each token of the tile: ``tile_zeros`` decides how many fit the registers of the
target, and everything else takes the number from the tuple that it is given.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from ruvllm.kernels import _dot_llvm
from ruvllm.kernels._dot_llvm import _I16, _add_pairs, add_signed, add_unsigned, raises_signed
from ruvllm.kernels._simd_llvm import LANES, _call, _constant, _pointer, _splat, f32x16, i32x16

__all__ = [
    "dot_rows", "end_rows", "offset_rows", "scale_rows", "sdot_rows", "signed_offset_rows", "start_rows", "tile_zeros",
]  # fmt: skip

_PAIRS = ir.VectorType(_I16, 32)
_OFFSETS = 4  # int32 of one group of activations, see quant.py
_RAISED = 2  # the one for weights raised by 128


def _sums(rows: Any) -> types.UniTuple:
    return types.UniTuple(i32x16, rows.count)


def _row(builder: ir.IRBuilder, index: ir.Value, step: ir.Value, row: int) -> ir.Value:
    return builder.add(index, builder.mul(step, step.type(row)))


@intrinsic
def tile_zeros(typingctx: Any) -> Any:
    """As many vectors of float32 zeros as a tile has tokens: 12 where 32 registers hold a vector each, else 6.

    Each token takes two vectors, its integer sums of one group and its float32 sums of all.
    """
    wide = _dot_llvm.target_kind(cpu_target.target_context) == "vnni512"
    result = types.UniTuple(f32x16, 12 if wide else 6)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.make_tuple(builder, result, [_constant(f32x16, 0.0)] * result.count)

    return result(), codegen


def _splats(context: Any, builder: Any, sig: Any, args: Any, column: int = 0) -> Any:
    offsets, index, step = args[:3]
    found = []
    for row in range(sig.return_type.count):
        at = builder.add(_row(builder, index, step, row), index.type(column))
        pointer = _pointer(context, builder, sig.args[0], offsets, at, types.int32)
        found.append(_splat(builder, builder.load(pointer), LANES))
    return context.make_tuple(builder, sig.return_type, found)


@intrinsic
def offset_rows(typingctx: Any, offsets: Any, index: Any, step: Any, rows: Any) -> Any:
    """The int32 offsets[index], offsets[index + step], .. in all lanes: one vector for each of ``rows``."""
    return _sums(rows)(offsets, types.intp, types.intp, rows), _splats


@intrinsic
def signed_offset_rows(typingctx: Any, offsets: Any, index: Any, step: Any, rows: Any) -> Any:
    """What sums of signed weights begin with: where ``sdot_rows`` raises them by 128, that is undone here."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if raises_signed(_dot_llvm.target_kind(context)):
            return _splats(context, builder, sig, args, _RAISED)
        return context.make_tuple(builder, sig.return_type, [_constant(i32x16, 0)] * sig.return_type.count)

    return _sums(rows)(offsets, types.intp, types.intp, rows), codegen


@intrinsic
def start_rows(typingctx: Any, offsets: Any) -> Any:
    """Accumulators for ``dot_rows`` that begin with ``offsets``; only ``end_rows`` can read them."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if _dot_llvm.target_kind(context) != "avx2":
            return args[0]
        return context.make_tuple(builder, offsets, [_constant(i32x16, 0)] * offsets.count)

    return offsets(offsets), codegen


@intrinsic
def end_rows(typingctx: Any, sums: Any, offsets: Any) -> Any:
    """The sums; ``offsets`` are those that the accumulators began with."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if _dot_llvm.target_kind(context) != "avx2":
            return args[0]
        found = [
            builder.add(start, _add_pairs(builder, builder.bitcast(acc, _PAIRS)))
            for acc, start in zip(*(cgutils.unpack_tuple(builder, a) for a in args), strict=True)
        ]
        return context.make_tuple(builder, sums, found)

    return sums(sums, sums), codegen


def _step(add: Any) -> Any:
    @intrinsic
    def step(typingctx: Any, sums: Any, w: Any, xq: Any, index: Any, step: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            sums, w, xq, index, step = args
            kind = _dot_llvm.target_kind(context)
            found = []
            for row, acc in enumerate(cgutils.unpack_tuple(builder, sums)):
                pointer = _pointer(context, builder, sig.args[2], xq, _row(builder, index, step, row), types.int8)
                quad = builder.load(builder.bitcast(pointer, ir.IntType(32).as_pointer()))
                quad.align = 1
                found.append(add(builder, kind, acc, w, _splat(builder, quad, LANES)))
            return context.make_tuple(builder, sig.return_type, found)

        return sums(sums, w, xq, types.intp, types.intp), codegen

    return step


dot_rows = _step(add_unsigned)  # one step with unsigned weights below 128 and the quads xq[index + row step : +4]
sdot_rows = _step(add_signed)  # the same with signed weights


@intrinsic
def scale_rows(typingctx: Any, acc: Any, sums: Any, scale: Any, xs: Any, index: Any, step: Any) -> Any:
    """The tuple of acc[r] + float(sums[r]) (scale xs[index + r step])."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        acc, sums, scale, xs, index, step = args
        found = []
        pairs = zip(cgutils.unpack_tuple(builder, acc), cgutils.unpack_tuple(builder, sums), strict=True)
        for row, (a, s) in enumerate(pairs):
            pointer = _pointer(context, builder, sig.args[3], xs, _row(builder, index, step, row), types.float32)
            factor = builder.fmul(scale, _splat(builder, builder.load(pointer), LANES))
            number = builder.sitofp(s, f32x16.llvm)
            found.append(_call(builder, f"llvm.fma.v{LANES}f32", f32x16.llvm, [number, factor, a]))
        return context.make_tuple(builder, sig.return_type, found)

    return acc(acc, sums, scale, xs, types.intp, types.intp), codegen
