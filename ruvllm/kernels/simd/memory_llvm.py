"""Loads, stores and prefetches of SIMD vectors (see simd/vectors.py); nothing checks bounds."""

from typing import Any

from llvmlite import ir
from numba import TypingError, types
from numba.extending import intrinsic

from ruvllm.kernels.jit.private.target import target
from ruvllm.kernels.jit.views import data_of
from ruvllm.kernels.simd.half_llvm import widen
from ruvllm.kernels.simd.vectors_llvm import (
    _I32,
    LANES,
    _call,
    _constant,
    _first_lanes,
    _splat,
    f32x16,
    i32x16,
)


def _pointer(
    context: Any, builder: ir.IRBuilder, array_type: Any, array: ir.Value, index: ir.Value, *elements: Any
) -> ir.Value:
    """The address of a C-contiguous array's element at a flat index.

    Raises TypingError for an array that is not C-contiguous, or whose dtype is none of ``elements``: a user's compiled
    function may call any kernel, and vector loads check nothing when they run.
    """
    if array_type.layout != "C" or (elements and array_type.dtype not in elements):
        kinds = f" of {' or '.join(map(str, elements))}" if elements else ""
        raise TypingError(f"kernels take C-contiguous arrays{kinds}, found {array_type}")
    return builder.gep(data_of(context, builder, array_type, array), [index])


def _target(
    context: Any, builder: ir.IRBuilder, array_type: Any, array: ir.Value, index: ir.Value, *elements: Any
) -> ir.Value:
    """_pointer for a store. Raises TypingError for a read-only array too."""
    if not array_type.mutable:
        raise TypingError(f"kernels write to arrays that can be written, found {array_type}")
    return _pointer(context, builder, array_type, array, index, *elements)


def _load_as(builder: ir.IRBuilder, kind: ir.Type, align: int, pointer: ir.Value) -> ir.Value:
    """The value of an LLVM type at an address that is a multiple of ``align``."""
    value = builder.load(builder.bitcast(pointer, kind.as_pointer()))
    value.align = align
    return value


@intrinsic
def splat_at(typingctx: Any, array: Any, index: Any) -> Any:
    """All lanes equal to the float32 array[index]: one broadcast load, without wraparound of negative indices."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1], types.float32)
        return _splat(builder, builder.load(pointer), LANES)

    return f32x16(array, types.intp), codegen


@intrinsic
def f32_load(typingctx: Any, array: Any, index: Any) -> Any:
    """The 16 elements from a flat index on."""
    return f32x16(array, types.intp), _read_f32


@intrinsic
def f32_store(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Write 16 elements from a flat index on."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _target(context, builder, sig.args[0], args[0], args[1], types.float32)
        instruction = builder.store(args[2], builder.bitcast(pointer, f32x16.llvm.as_pointer()))
        instruction.align = 4
        return context.get_dummy_value()

    return types.void(array, types.intp, f32x16), codegen


@intrinsic
def f32_store_first(typingctx: Any, array: Any, index: Any, value: Any, count: Any) -> Any:
    """Store only the first ``count`` lanes (the ragged end of a row)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _target(context, builder, sig.args[0], args[0], args[1], types.float32)
        if "+avx512f" in target().features:
            _store_masked(builder, pointer, args[2], args[3])
        else:  # AVX2's masked store takes dozens of cycles, NEON has none
            _store_by_halves(builder, pointer, args[2], args[3])
        return context.get_dummy_value()

    return types.void(array, types.intp, f32x16, types.intp), codegen


def _store_masked(builder: ir.IRBuilder, pointer: ir.Value, vector: ir.Value, count: ir.Value) -> None:
    pointer = builder.bitcast(pointer, f32x16.llvm.as_pointer())
    mask = _first_lanes(builder, count)
    _call(builder, f"llvm.masked.store.v{LANES}f32.p0", ir.VoidType(), [vector, pointer, _I32(4), mask])


def _store_by_halves(builder: ir.IRBuilder, pointer: ir.Value, vector: ir.Value, count: ir.Value) -> None:
    """Store 16, 8, 4, 2 and 1 lanes as the bits of ``count`` say, moving the rest of the lanes down each time."""
    zero = count.type(0)
    rest = builder.select(builder.icmp_signed("<", count, zero), zero, count)
    rest = builder.select(builder.icmp_signed(">", rest, count.type(LANES)), count.type(LANES), rest)
    undefined = ir.Constant(f32x16.llvm, ir.Undefined)
    width = LANES
    while width:
        before = builder.block
        with builder.if_then(builder.icmp_unsigned("!=", builder.and_(rest, count.type(width)), zero)):
            stored = ir.VectorType(f32x16.llvm.element, width)
            lanes = ir.Constant(ir.VectorType(_I32, width), list(range(width)))
            instruction = builder.store(
                builder.shuffle_vector(vector, undefined, lanes), builder.bitcast(pointer, stored.as_pointer())
            )
            instruction.align = 4
            order = ir.Constant(i32x16.llvm, [_I32(min(i + width, LANES - 1)) for i in range(LANES)])
            moved, further = builder.shuffle_vector(vector, undefined, order), builder.gep(pointer, [_I32(width)])
            inside = builder.block
        vector, pointer = (
            _either(builder, moved, inside, vector, before),
            _either(builder, further, inside, pointer, before),
        )
        width //= 2


def _either(builder: ir.IRBuilder, a: ir.Value, a_block: ir.Block, b: ir.Value, b_block: ir.Block) -> ir.Value:
    phi = builder.phi(a.type)
    phi.add_incoming(a, a_block)
    phi.add_incoming(b, b_block)
    return phi


@intrinsic
def f32_load_first(typingctx: Any, array: Any, index: Any, count: Any) -> Any:
    """Load the first ``count`` lanes; the others are zero and their memory is not touched."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1], types.float32)
        pointer = builder.bitcast(pointer, f32x16.llvm.as_pointer())
        mask = _first_lanes(builder, args[2])
        arguments = [pointer, _I32(4), mask, _constant(f32x16, 0.0)]
        return _call(builder, f"llvm.masked.load.v{LANES}f32.p0", f32x16.llvm, arguments)

    return f32x16(array, types.intp, types.intp), codegen


# --- 16-bit floats (NumPy has no bfloat16, Numba no float16: uint16 holds float16 bits, int16 bfloat16 bits) ----

_HALVES = ir.VectorType(ir.IntType(16), LANES)


def _load_halves(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return _load_as(builder, _HALVES, 2, _pointer(context, builder, sig.args[0], *args))


def _read_f32(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return _load_as(builder, f32x16.llvm, 4, _pointer(context, builder, sig.args[0], *args, types.float32))


def _read_f16(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return widen(builder, _load_halves(context, builder, sig, args))


def _read_bf16(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    wide = builder.zext(_load_halves(context, builder, sig, args), i32x16.llvm)
    return builder.bitcast(builder.shl(wide, _constant(i32x16, 16)), f32x16.llvm)


def _read_i8(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    value = _load_as(builder, ir.VectorType(ir.IntType(8), LANES), 1, _pointer(context, builder, sig.args[0], *args))
    return builder.sitofp(value, f32x16.llvm)


@intrinsic
def load(typingctx: Any, array: Any, index: Any) -> Any:
    """Sixteen elements as float32, from an array of float32, uint16 (IEEE half), int16 (bfloat16) or int8."""
    readers = {types.float32: _read_f32, types.uint16: _read_f16, types.int16: _read_bf16, types.int8: _read_i8}
    if array.dtype not in readers:
        raise TypingError(f"kernels take arrays of {', '.join(map(str, readers))}, found {array}")
    return f32x16(array, types.intp), readers[array.dtype]


@intrinsic
def f16_load(typingctx: Any, array: Any, index: Any) -> Any:
    """Sixteen IEEE halves from byte ``index`` of a uint8 array on, as float32."""
    return f32x16(array, types.intp), _read_f16


# --- prefetches ------------------------------------------------------------------------------------------------


def _prefetch(name: str, locality: int, doc: str) -> Any:
    def hint(typingctx: Any, array: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            pointer = builder.bitcast(_pointer(context, builder, sig.args[0], *args), ir.IntType(8).as_pointer())
            arguments = [pointer, _I32(0), _I32(locality), _I32(1)]
            _call(builder, "llvm.prefetch.p0", ir.VoidType(), arguments)
            return context.get_dummy_value()

        return types.void(array, types.intp), codegen

    hint.__name__, hint.__doc__ = name, doc
    return intrinsic(hint)


prefetch = _prefetch("prefetch", 3, "Prefetch the cache line of an element into L1; any index is safe.")
prefetch_l2 = _prefetch("prefetch_l2", 2, "Prefetch the cache line of an element into L2; any index is safe.")
# Weights and cached keys and values are read once, in order, and are prefetched into the cache from which a processor
# reads them faster. A Zen 5 reads 4-bit weights at 70 % of its read bandwidth through L2, at 84 % through L1. A Zen 4
# does not track enough misses of L1: 70 % through L1, all of it through L2. Others are treated like a Zen 4.
STREAMS_THROUGH_L1 = target().cpu == "znver5"
prefetch_stream = prefetch if STREAMS_THROUGH_L1 else prefetch_l2
