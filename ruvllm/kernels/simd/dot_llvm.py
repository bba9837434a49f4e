"""Integer dot products as Numba intrinsics, with the instructions that each CPU has for them.

A *weight vector* ``u8x64`` is 16 rows x 4 columns of bytes; a *quad* is four int8 activations in one int32. One *step*
adds to 16 int32 accumulators, one for each row, the dot product of the row's four bytes with the quad:

- x86 with VNNI: ``vpdpbusd``, one instruction.
- x86 with AVX2: ``vpmaddubsw`` into 16-bit pair sums, which are added at the end. Pair sums are exact as long as
  steps x 2 x largest weight x 127 < 2^15: 8 steps of 4-bit, 4 of 5-bit weights.
- ARM with dot product: ``sdot``; elsewhere plain widening arithmetic, which LLVM vectorises.

All give the same integers. The choice follows the features of the compilation target, so that other CPUs than the host
can be tried with NUMBA_CPU_NAME and NUMBA_CPU_FEATURES.
"""

from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ruvllm.kernels.jit.private.target import target
from ruvllm.kernels.jit.views import unpack
from ruvllm.kernels.simd.memory_llvm import _load_as, _pointer, _target
from ruvllm.kernels.simd.vectors_llvm import (
    Vector,
    _call,
    _constant,
    _reduce,
    _splat,
    f32x16,
    i32x16,
)

_I8, _I16, _I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
_BYTES = ir.VectorType(_I8, 64)

u8x64 = Vector("u8x64", _I8, 64)


def _all_bytes(value: int) -> ir.Constant:
    return ir.Constant(_BYTES, [_I8(value)] * 64)


_SUM_OF_PRODUCTS = """
declare <4 x i32> @llvm.vector.partial.reduce.add.v4i32.v16i32(<4 x i32>, <16 x i32>)
define <4 x i32> @f(<4 x i32> %a, <16 x i8> %b, <16 x i8> %c) {
  %x = sext <16 x i8> %b to <16 x i32>
  %y = sext <16 x i8> %c to <16 x i32>
  %m = mul <16 x i32> %x, %y
  %r = call <4 x i32> @llvm.vector.partial.reduce.add.v4i32.v16i32(<4 x i32> %a, <16 x i32> %m)
  ret <4 x i32> %r
}
"""


@cache
def has_sdot(triple: str, cpu: str, features: str) -> bool:
    """Whether an ARM processor has the dot product of 8-bit integers.

    LLVM knows it by the processor's name; the list of features need not contain it (on Linux it does not). So this
    compiles a sum of products and looks for ``sdot``: 2 ms, once in a process.
    """
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=2)
    return "sdot" in machine.emit_assembly(llvm.parse_assembly(_SUM_OF_PRODUCTS))


def target_kind() -> str:
    """The instructions to use: "vnni512", "vnni256", "avx2", "neon" or "generic", by the target's features."""
    have = set(target().features.split(","))
    if target().triple.startswith(("aarch64", "arm64")):
        return "neon" if has_sdot(*target()) else "generic"
    if "+avx512vnni" in have:
        return "vnni512"
    if "+avxvnni" in have:
        return "vnni256"
    return "avx2" if "+avx2" in have else "generic"


def _slice(builder: ir.IRBuilder, vector: ir.Value, start: int, count: int) -> ir.Value:
    indices = ir.Constant(ir.VectorType(_I32, count), list(range(start, start + count)))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), indices)


def _join(builder: ir.IRBuilder, parts: list[ir.Value]) -> ir.Value:
    while len(parts) > 1:
        lanes = 2 * parts[0].type.count
        order = ir.Constant(ir.VectorType(_I32, lanes), list(range(lanes)))
        parts = [builder.shuffle_vector(a, b, order) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _by_parts(builder: ir.IRBuilder, parts: int, operate: Any, *vectors: ir.Value) -> ir.Value:
    """Apply ``operate`` to equal parts of the vectors: registers of the width that an instruction takes."""
    counts = [v.type.count // parts for v in vectors]
    results = [
        operate(*(_slice(builder, v, i * n, n) for v, n in zip(vectors, counts, strict=True))) for i in range(parts)
    ]
    return _join(builder, results)


def _vnni(builder: ir.IRBuilder, kind: str, acc: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    """acc + the four products of unsigned x signed bytes, in each of 16 lanes."""
    if kind == "vnni512":
        return _call(builder, "llvm.x86.avx512.vpdpbusd.512", i32x16.llvm, [acc, unsigned, signed])

    def part(a: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
        return _call(builder, "llvm.x86.avx512.vpdpbusd.256", ir.VectorType(_I32, 8), [a, u, s])

    return _by_parts(builder, 2, part, acc, unsigned, signed)


def _sdot(builder: ir.IRBuilder, acc: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    def part(c: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
        return _call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", ir.VectorType(_I32, 4), [c, x, y])

    return _by_parts(builder, 4, part, acc, a, b)


def _widening(builder: ir.IRBuilder, acc: ir.Value, w: ir.Value, x: ir.Value, signed: bool) -> ir.Value:
    """_vnni by plain arithmetic, for unsigned or signed w: byte j of each lane, j = 0..3, widened to int32."""
    words, quads = builder.bitcast(w, i32x16.llvm), builder.bitcast(x, i32x16.llvm)
    for j in range(4):
        up = _constant(i32x16, 24 - 8 * j)
        shift = builder.ashr if signed else builder.lshr
        weight = shift(builder.shl(words, up), _constant(i32x16, 24))
        value = builder.ashr(builder.shl(quads, up), _constant(i32x16, 24))
        acc = builder.add(acc, builder.mul(weight, value))
    return acc


def _pairs(builder: ir.IRBuilder, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    """The sum of each two adjacent products, as <32 x i16> (AVX2)."""

    def part(u: ir.Value, s: ir.Value) -> ir.Value:
        return _call(builder, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(_I16, 16), [u, s])

    return _by_parts(builder, 2, part, unsigned, signed)


def _add_pairs(builder: ir.IRBuilder, pairs: ir.Value) -> ir.Value:
    """The sum of each two adjacent 16-bit sums, as i32x16 (AVX2)."""
    ones = ir.Constant(ir.VectorType(_I16, 16), [_I16(1)] * 16)

    def part(p: ir.Value) -> ir.Value:
        return _call(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(_I32, 8), [p, ones])

    return _by_parts(builder, 2, part, pairs)


@intrinsic
def u8_load(typingctx: Any, array: Any, index: Any) -> Any:
    """64 bytes of a uint8 array."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _load_as(builder, _BYTES, 1, _pointer(context, builder, sig.args[0], *args))

    return u8x64(array, types.intp), codegen


@intrinsic
def quad_at(typingctx: Any, array: Any, index: Any) -> Any:
    """Four int8 activations from ``index`` on, a quad, broadcast to every lane."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _splat(builder, _load_as(builder, _I32, 1, _pointer(context, builder, sig.args[0], *args)), 16)

    return i32x16(array, types.intp), codegen


def _each(context: Any, builder: Any, kind: Any, value: Any, operate: Any) -> Any:
    """``operate`` on a vector, or on each of a tuple of them."""
    if not isinstance(kind, types.UniTuple):
        return operate(value)
    return context.make_tuple(builder, kind, [operate(v) for v in unpack(builder, value)])


@intrinsic
def low_nibbles(typingctx: Any, v: Any) -> Any:
    """The low four bits of each byte, 0..15, of a vector or of each of a tuple."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _each(context, builder, sig.args[0], args[0], lambda x: builder.and_(x, _all_bytes(15)))

    return v(v), codegen


@intrinsic
def high_nibbles(typingctx: Any, v: Any) -> Any:
    """The high four bits of each byte, 0..15, of a vector or of each of a tuple."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _each(context, builder, sig.args[0], args[0], lambda x: builder.lshr(x, _all_bytes(4)))

    return v(v), codegen


@intrinsic
def with_fifth_bit(typingctx: Any, nibbles: Any, bits: Any, j: Any) -> Any:
    """nibbles + 16 x bit j of each byte of ``bits``: two vectors, or two tuples of as many."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        nibbles, bits, j = args
        shift = _splat(builder, builder.trunc(j, _I8), 64)

        def sixteens(x: ir.Value) -> ir.Value:
            return builder.shl(builder.and_(builder.lshr(x, shift), _all_bytes(1)), _all_bytes(4))

        bits = _each(context, builder, sig.args[1], bits, sixteens)
        if not isinstance(sig.args[0], types.UniTuple):
            return builder.or_(nibbles, bits)
        pairs = zip(unpack(builder, nibbles), unpack(builder, bits), strict=True)
        return context.make_tuple(builder, sig.args[0], [builder.or_(a, b) for a, b in pairs])

    return nibbles(nibbles, bits, types.intp), codegen


@intrinsic
def bytes_to_f32(typingctx: Any, v: Any, j: Any) -> Any:
    """Byte j of each lane's four, signed, as float32: 16 rows of column j."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        words, up = builder.bitcast(args[0], i32x16.llvm), builder.trunc(args[1], _I32)
        up = _splat(builder, builder.sub(_I32(24), builder.mul(up, _I32(8))), 16)
        byte = builder.ashr(builder.shl(words, up), _constant(i32x16, 24))
        return builder.sitofp(byte, f32x16.llvm)

    return f32x16(u8x64, types.intp), codegen


@intrinsic
def bits_at(typingctx: Any, v: Any, first: Any, count: Any) -> Any:
    """``count`` bits of each lane's 32, from bit ``first`` on, as 16 integers."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        v, first, count = args
        words = builder.lshr(builder.bitcast(v, i32x16.llvm), _splat(builder, builder.trunc(first, _I32), 16))
        mask = builder.sub(builder.shl(_I32(1), builder.trunc(count, _I32)), _I32(1))
        return builder.and_(words, _splat(builder, mask, 16))

    return i32x16(u8x64, types.intp, types.intp), codegen


@intrinsic
def dot_begin(typingctx: Any) -> Any:
    """An accumulator for ``dot_add``, which only ``dot_end`` can read."""
    return i32x16(), lambda context, builder, sig, args: _constant(i32x16, 0)


@intrinsic
def dot_add(typingctx: Any, acc: Any, w: Any, quad: Any) -> Any:
    """One step with unsigned weights below 128."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return add_unsigned(builder, target_kind(), *args)

    return i32x16(i32x16, u8x64, i32x16), codegen


@intrinsic
def dot_end(typingctx: Any, acc: Any) -> Any:
    """The 16 sums that an accumulator holds."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if target_kind() != "avx2":
            return args[0]
        return _add_pairs(builder, builder.bitcast(args[0], ir.VectorType(_I16, 32)))

    return i32x16(i32x16), codegen


def add_unsigned(builder: ir.IRBuilder, kind: str, acc: ir.Value, w: ir.Value, quad: ir.Value) -> ir.Value:
    """One step with unsigned weights below 128. On AVX2 ``acc`` holds 32 sums of pairs in 16 bits."""
    x = builder.bitcast(quad, _BYTES)
    if kind == "avx2":
        halves = ir.VectorType(_I16, 32)
        return builder.bitcast(builder.add(builder.bitcast(acc, halves), _pairs(builder, w, x)), i32x16.llvm)
    if kind == "neon":
        return _sdot(builder, acc, w, x)
    if kind == "generic":
        return _widening(builder, acc, w, x, signed=False)
    return _vnni(builder, kind, acc, w, x)


def add_signed(builder: ir.IRBuilder, kind: str, acc: ir.Value, w: ir.Value, quad: ir.Value) -> ir.Value:
    """One step with signed weights, plus 128 where the instruction takes unsigned ones (``adds_128``)."""
    x = builder.bitcast(quad, _BYTES)
    if kind == "neon":
        return _sdot(builder, acc, w, x)
    if kind == "generic":
        return _widening(builder, acc, w, x, signed=True)
    if kind == "avx2":
        # |w| x (x with the sign of w): a pair is at most 2 x 128 x 127, which 16 bits hold.
        def signed(a: ir.Value, b: ir.Value) -> ir.Value:
            return _call(builder, "llvm.x86.avx2.psign.b", ir.VectorType(_I8, 32), [a, b])

        magnitude = _call(builder, "llvm.abs.v64i8", _BYTES, [w, ir.IntType(1)(0)])
        pairs = _pairs(builder, magnitude, _by_parts(builder, 2, signed, x, w))
        return builder.add(acc, _add_pairs(builder, pairs))
    return _vnni(builder, kind, acc, builder.xor(w, _all_bytes(-128)), x)


def adds_128(kind: str) -> bool:
    """Whether ``add_signed`` adds 128 to each weight: the caller then subtracts 128 times the activations' sum."""
    return kind.startswith("vnni")


@intrinsic
def i8_store(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Store 16 int32 lanes, each within -128..127, as int8."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        narrow = ir.VectorType(_I8, 16)
        pointer = _target(context, builder, sig.args[0], args[0], args[1], types.int8, types.uint8)
        pointer = builder.bitcast(pointer, narrow.as_pointer())
        instruction = builder.store(builder.trunc(args[2], narrow), pointer)
        instruction.align = 1
        return context.get_dummy_value()

    return types.void(array, types.intp, i32x16), codegen


@intrinsic
def largest_magnitude(typingctx: Any, a: Any, b: Any) -> Any:
    """The largest |x| of 32 float32 lanes; infinity counts as larger than any number, and NaN as larger still.

    The bits of non-negative floats, as integers, are in the same order, and the maximum of integers is one instruction
    of x86, that of floats (with NaN) three.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def larger(x: Any, y: Any) -> Any:
            return _call(builder, f"llvm.smax.v{x.type.count}i32", x.type, [x, y])

        unsigned = _constant(i32x16, 0x7FFFFFFF)
        bits = larger(*(builder.and_(builder.bitcast(x, i32x16.llvm), unsigned) for x in args))
        return builder.bitcast(_reduce(builder, bits, larger), ir.FloatType())

    return types.float32(a, b), codegen


@intrinsic
def find_magnitude(typingctx: Any, v: Any, magnitude: Any) -> Any:
    """The first of 16 float32 lanes with |v| = magnitude; 16 if there is none."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.and_(builder.bitcast(args[0], i32x16.llvm), _constant(i32x16, 0x7FFFFFFF))
        equal = builder.icmp_signed("==", bits, _splat(builder, builder.bitcast(args[1], _I32), 16))
        mask = builder.or_(builder.zext(builder.bitcast(equal, ir.IntType(16)), _I32), _I32(1 << 16))
        return builder.zext(_call(builder, "llvm.cttz.i32", _I32, [mask, ir.IntType(1)(1)]), ir.IntType(64))

    return types.intp(v, types.float32), codegen


@intrinsic
def without_lane(typingctx: Any, v: Any, i: Any) -> Any:
    """v with lane i set to 0; v itself if i is outside 0..15."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lanes = ir.Constant(i32x16.llvm, [_I32(lane) for lane in range(16)])
        chosen = builder.icmp_signed("==", lanes, _splat(builder, builder.trunc(args[1], _I32), 16))
        return builder.select(chosen, ir.Constant(args[0].type, [ir.FloatType()(0.0)] * 16), args[0])

    return v(v, types.intp), codegen


@intrinsic
def i32_hsum(typingctx: Any, v: Any) -> Any:
    """The sum of the 16 integer lanes."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _reduce(builder, args[0], lambda x, y: builder.add(x, y))

    return types.int32(i32x16), codegen
