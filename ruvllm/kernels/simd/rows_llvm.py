"""Several SIMD vectors at once: tuples that stay in registers, and small arrays on the stack (simd/vectors.py)."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ruvllm.kernels.jit.views import _view, unpack
from ruvllm.kernels.simd.memory_llvm import _pointer, _target
from ruvllm.kernels.simd.vectors_llvm import LANES, _call, _constant, _splat, f32x16

__all__ = [
    "add_rows", "f32_zeros", "fma_each", "fma_outer", "fma_rows", "fma_three", "fma_two", "load_rows",
    "never_inline", "stack_f32", "stack_i32", "stack_i64", "store_rows", "sum_lanes", "sum_rows", "zip_rows",
]  # fmt: skip

_I32 = ir.IntType(32)


def _rows(count: Any) -> Any:
    return types.UniTuple(f32x16, count)


def _fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return _call(builder, f"llvm.fma.v{LANES}f32", f32x16.llvm, [a, b, c])


def _at(builder: ir.IRBuilder, index: ir.Value, step: ir.Value, row: int) -> ir.Value:
    return builder.add(index, builder.mul(step, step.type(row)))


@intrinsic(prefer_literal=True)
def f32_zeros(typingctx: Any, rows: Any) -> Any:
    """A tuple of ``rows`` vectors of zeros; ``rows`` is a constant."""
    if not isinstance(rows, types.IntegerLiteral):
        return None
    result = _rows(rows.literal_value)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.make_tuple(builder, result, [_constant(f32x16, 0.0)] * result.count)

    return result(rows), codegen


@intrinsic
def fma_rows(typingctx: Any, w: Any, x: Any, index: Any, step: Any, sums: Any) -> Any:
    """The tuple of sums[r] + w x[index + r step], where each element of x is broadcast to all lanes."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        w, x, index, step, sums = args
        found = []
        for row, total in enumerate(unpack(builder, sums)):
            pointer = _pointer(context, builder, sig.args[1], x, _at(builder, index, step, row), types.float32)
            found.append(_fma(builder, w, _splat(builder, builder.load(pointer), LANES), total))
        return context.make_tuple(builder, sig.return_type, found)

    return sums(f32x16, x, types.intp, types.intp, sums), codegen


def _fma_by_row(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    """fma_rows of several w, each with a tuple of sums; row by row, so that only one broadcast x is in a register."""
    count = len(args) // 2 - 1
    weights, (x, index, step) = args[:count], args[count : count + 3]
    sums = [unpack(builder, t) for t in args[count + 3 :]]
    found: list[list[ir.Value]] = [[] for _ in sums]
    for row in range(len(sums[0])):
        pointer = _pointer(context, builder, sig.args[count], x, _at(builder, index, step, row), types.float32)
        broadcast = _splat(builder, builder.load(pointer), LANES)
        for w, before, after in zip(weights, sums, found, strict=True):
            after.append(_fma(builder, w, broadcast, before[row]))
    kinds = sig.return_type.types
    tuples = [context.make_tuple(builder, kind, rows) for kind, rows in zip(kinds, found, strict=True)]
    return context.make_tuple(builder, sig.return_type, tuples)


@intrinsic
def fma_two(typingctx: Any, a: Any, b: Any, x: Any, index: Any, step: Any, left: Any, right: Any) -> Any:
    """fma_rows of a with the sums ``left``, and of b with ``right``, which share each broadcast element of x."""
    return types.Tuple((left, right))(f32x16, f32x16, x, types.intp, types.intp, left, right), _fma_by_row


@intrinsic
def fma_three(
    typingctx: Any, a: Any, b: Any, c: Any, x: Any, index: Any, step: Any, left: Any, middle: Any, right: Any
) -> Any:
    """fma_two for three vectors."""
    result = types.Tuple((left, middle, right))
    return result(f32x16, f32x16, f32x16, x, types.intp, types.intp, left, middle, right), _fma_by_row


@intrinsic
def fma_each(typingctx: Any, w: Any, rows: Any, sums: Any) -> Any:
    """The tuple of sums[r] + w rows[r]."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pairs = zip(unpack(builder, args[1]), unpack(builder, args[2]), strict=True)
        return context.make_tuple(builder, sums, [_fma(builder, args[0], row, s) for row, s in pairs])

    return sums(f32x16, rows, sums), codegen


@intrinsic
def fma_outer(typingctx: Any, left: Any, right: Any, sums: Any) -> Any:
    """The tuple of sums[i n + j] + left[i] right[j], n vectors in ``right``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        left, right, sums = (unpack(builder, rows) for rows in args)
        pairs = [(a, b) for a in left for b in right]
        found = [_fma(builder, a, b, s) for (a, b), s in zip(pairs, sums, strict=True)]
        return context.make_tuple(builder, sig.return_type, found)

    return sums(left, right, sums), codegen


@intrinsic
def sum_rows(typingctx: Any, a: Any, b: Any) -> Any:
    """The tuple of a[r] + b[r]."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pairs = zip(*(unpack(builder, rows) for rows in args), strict=True)
        return context.make_tuple(builder, a, [builder.fadd(x, y) for x, y in pairs])

    return a(a, a), codegen


@intrinsic
def sum_lanes(typingctx: Any, rows: Any) -> Any:
    """The vector whose lane r is the sum of the lanes of vector r of a tuple of sixteen.

    Each of four rounds merges two vectors, a0 b0 a1 b1 .., and adds the two halves of the result.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vectors = unpack(builder, args[0])
        while len(vectors) > 1:
            half, merged = len(vectors) // 2, []
            for a, b in zip(vectors[:half], vectors[half:], strict=True):
                parts = []
                for first in (0, LANES // 2):
                    order = [_I32(first + i // 2 + i % 2 * LANES) for i in range(LANES)]
                    parts.append(builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, LANES), order)))
                merged.append(builder.fadd(*parts))
            vectors = merged
        return vectors[0]

    return f32x16(rows), codegen


@intrinsic(prefer_literal=True)
def load_rows(typingctx: Any, array: Any, index: Any, step: Any, rows: Any) -> Any:
    """The tuple of the 16 elements from index, from index + step, ...; ``rows`` is a constant."""
    if not isinstance(rows, types.IntegerLiteral):
        return None
    result = _rows(rows.literal_value)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        found = []
        for row in range(result.count):
            at = _at(builder, args[1], args[2], row)
            pointer = _pointer(context, builder, sig.args[0], args[0], at, types.float32)
            value = builder.load(builder.bitcast(pointer, f32x16.llvm.as_pointer()))
            value.align = 4
            found.append(value)
        return context.make_tuple(builder, result, found)

    return result(array, types.intp, types.intp, rows), codegen


@intrinsic
def store_rows(typingctx: Any, array: Any, index: Any, step: Any, rows: Any) -> Any:
    """Store the vectors of a tuple at index, at index + step, ..."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for row, value in enumerate(unpack(builder, args[3])):
            at = _at(builder, args[1], args[2], row)
            pointer = _target(context, builder, sig.args[0], args[0], at, types.float32)
            instruction = builder.store(value, builder.bitcast(pointer, f32x16.llvm.as_pointer()))
            instruction.align = 4
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, rows), codegen


@intrinsic
def add_rows(typingctx: Any, array: Any, index: Any, step: Any, rows: Any) -> Any:
    """Add the vectors of a tuple to the 16 elements at index, at index + step, ..."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for row, value in enumerate(unpack(builder, args[3])):
            at = _at(builder, args[1], args[2], row)
            pointer = _target(context, builder, sig.args[0], args[0], at, types.float32)
            pointer = builder.bitcast(pointer, f32x16.llvm.as_pointer())
            before = builder.load(pointer)
            before.align = 4
            instruction = builder.store(builder.fadd(before, value), pointer)
            instruction.align = 4
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, rows), codegen


@intrinsic
def zip_rows(typingctx: Any, rows: Any) -> Any:
    """Interleave each vector of the first half with its partner in the second half: a0 b0 a1 b1 ...

    Applied log2(rows) times, this transposes: each time, the highest bit of an element's row becomes the lowest bit of
    its lane.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vectors = unpack(builder, args[0])
        half = len(vectors) // 2
        merged = []
        for a, b in zip(vectors[:half], vectors[half:], strict=True):
            for first in (0, LANES // 2):
                order = [_I32(first + i // 2 + i % 2 * LANES) for i in range(LANES)]
                merged.append(builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, LANES), order)))
        return context.make_tuple(builder, rows, merged)

    return rows(rows), codegen


def _stack(name: str, element: Any) -> Any:
    def stack(typingctx: Any, count: Any) -> Any:
        if not isinstance(count, types.IntegerLiteral):
            return None
        result = types.Array(element, 1, "C")

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            kind = context.get_data_type(element)
            with builder.goto_entry_block():  # numba's own alloca would fill it with zeros, expanded when compiling
                block = builder.alloca(ir.ArrayType(kind, count.literal_value), name=name)
            block.align = 64
            data = builder.bitcast(block, kind.as_pointer())
            return _view(context, builder, result, data, [context.get_constant(types.intp, count.literal_value)])

        return result(count), codegen

    stack.__name__ = name
    stack.__doc__ = f"An uninitialised {element} array of constant size on the stack, aligned to 64 bytes."
    return intrinsic(prefer_literal=True)(stack)


stack_f32 = _stack("stack_f32", types.float32)
stack_i32 = _stack("stack_i32", types.int32)
stack_i64 = _stack("stack_i64", types.int64)


@intrinsic
def never_inline(typingctx: Any) -> Any:
    """The function that calls this is never inlined: it gets all registers, and its loops are optimised alone."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen
