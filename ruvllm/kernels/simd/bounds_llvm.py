"""Bounds and powers of two of float32 scalars and SIMD vectors, for exp: one or two instructions each."""

from typing import Any

from numba import types
from numba.extending import intrinsic

from ruvllm.kernels.simd.vectors_llvm import _I32, LANES, _constant, _lanes_of, _splat, _widest, f32x16, i32x16

__all__ = ["at_most", "power_of_two", "zero_below"]


@intrinsic
def power_of_two(typingctx: Any, v: Any) -> Any:
    """2**n for v = 1.5 2**23 + n, n in -127..128: n is in the low bits of v. 2**-127 is 0, and 2**128 is infinity."""
    kind, takes, _ = _widest(v)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], i32x16.llvm if kind == f32x16 else _I32)
        exponent = builder.shl(bits, _lanes_of(builder, kind, _I32(23)))
        return builder.bitcast(builder.add(exponent, _lanes_of(builder, kind, _I32(127 << 23))), args[0].type)

    return kind(*takes), codegen


@intrinsic
def at_most(typingctx: Any, v: Any, limit: Any) -> Any:
    """The smaller of v and limit; NaN stays NaN. One instruction of x86, where fmin takes three."""
    kind, takes, _ = _widest(v, limit)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        v, limit = (_lanes_of(builder, kind, value) for value in args)
        return builder.select(builder.fcmp_ordered(">", v, limit), limit, v)

    return kind(*takes), codegen


@intrinsic
def zero_below(typingctx: Any, x: Any, limit: Any, y: Any) -> Any:
    """Lane by lane: 0 where x < limit, else y."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        below = builder.fcmp_ordered("<", args[0], _splat(builder, args[1], LANES))
        return builder.select(below, _constant(f32x16, 0.0), args[2])

    return f32x16(f32x16, types.float32, f32x16), codegen
