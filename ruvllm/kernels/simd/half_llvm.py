"""IEEE half floats in LLVM IR: by the CPU's own conversions, or by arithmetic where the target has none.

Without either, LLVM would call functions of the C compiler's runtime library, which may be missing. Both ways give the
same bits, but for the payload of a NaN.
"""

from llvmlite import ir

from ruvllm.kernels.jit.private.target import target

_I16, _I32, _F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()


def has_half_conversions() -> bool:
    """Whether the target converts half floats in hardware: all 64-bit ARM, and x86 with F16C."""
    triple, _, features = target()
    return triple.startswith(("aarch64", "arm64")) or "+f16c" in features.split(",")


def widen(builder: ir.IRBuilder, halves: ir.Value) -> ir.Value:
    """Convert the bits of half floats, an i16 or a vector of them, to float32. Exact."""
    i32, f32 = _like(halves, _I32), _like(halves, _F32)
    if has_half_conversions():
        return builder.fpext(builder.bitcast(halves, _like(halves, ir.HalfType())), f32)
    bits = builder.zext(halves, i32)
    sign = builder.shl(builder.and_(bits, _all(i32, 0x8000)), _all(i32, 16))
    magnitude = builder.shl(builder.and_(bits, _all(i32, 0x7FFF)), _all(i32, 13))
    # As float32 bits, the exponent is too small by 112. The product corrects it, also of subnormal halves.
    value = builder.fmul(builder.bitcast(magnitude, f32), _all(f32, 2.0**112))
    special = builder.icmp_unsigned(">=", magnitude, _all(i32, 0x7C00 << 13))
    magnitude = builder.select(special, builder.or_(magnitude, _all(i32, 0x7F800000)), builder.bitcast(value, i32))
    return builder.bitcast(builder.or_(magnitude, sign), f32)


def narrow(builder: ir.IRBuilder, floats: ir.Value) -> ir.Value:
    """Round float32 values to the nearest half floats (ties to even): their bits, an i16 or a vector of them."""
    i16, i32, f32 = _like(floats, _I16), _like(floats, _I32), _like(floats, _F32)
    if has_half_conversions():
        return builder.bitcast(builder.fptrunc(floats, _like(floats, ir.HalfType())), i16)
    bits = builder.bitcast(floats, i32)
    sign = builder.and_(builder.lshr(bits, _all(i32, 16)), _all(i32, 0x8000))
    magnitude = builder.and_(bits, _all(i32, 0x7FFFFFFF))
    # Normal: subtract 112 from the exponent and drop 13 bits; the addition rounds, and may carry into the exponent.
    odd = builder.and_(builder.lshr(magnitude, _all(i32, 13)), _all(i32, 1))
    normal = builder.add(builder.add(magnitude, odd), _all(i32, 0xFFF - (112 << 23)))
    normal = builder.lshr(normal, _all(i32, 13))
    # Subnormal: the last bit of 0.5 as a float32 is worth 2^-24, so adding 0.5 rounds to multiples of that.
    raised = builder.fadd(builder.bitcast(magnitude, f32), _all(f32, 0.5))
    subnormal = builder.sub(builder.bitcast(raised, i32), _all(i32, 126 << 23))
    result = builder.select(builder.icmp_unsigned("<", magnitude, _all(i32, 113 << 23)), subnormal, normal)
    infinite = builder.icmp_unsigned(">=", magnitude, _all(i32, 143 << 23))
    result = builder.select(infinite, _all(i32, 0x7C00), result)
    nan = builder.icmp_unsigned(">", magnitude, _all(i32, 0x7F800000))
    result = builder.select(nan, _all(i32, 0x7E00), result)
    return builder.trunc(builder.or_(result, sign), i16)


def _like(value: ir.Value, element: ir.Type) -> ir.Type:
    """``element``, or a vector of as many as ``value`` has."""
    return ir.VectorType(element, value.type.count) if isinstance(value.type, ir.VectorType) else element


def _all(kind: ir.Type, number: float) -> ir.Constant:
    """A constant, in every lane of a vector."""
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [ir.Constant(kind.element, number)] * kind.count)
    return ir.Constant(kind, number)
