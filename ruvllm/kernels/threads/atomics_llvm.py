"""Atomic operations, pauses and calls of C functions as Numba intrinsics, for team.py, regions.py and cores.py."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ruvllm.kernels.jit.private.target import target
from ruvllm.kernels.simd.memory_llvm import _pointer
from ruvllm.kernels.simd.vectors_llvm import _call


@intrinsic
def atomic_add(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Add to array[index] (int64), with acquire and release order, and return the value before."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1])
        return builder.atomic_rmw("add", pointer, args[2], "acq_rel")

    return types.int64(array, types.intp, types.int64), codegen


@intrinsic
def atomic_load(typingctx: Any, array: Any, index: Any) -> Any:
    """array[index] (int64), with acquire order: what its writer wrote before it is visible after this load."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(context, builder, sig.args[0], *args), "acquire", 8)

    return types.int64(array, types.intp), codegen


@intrinsic
def atomic_store(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] = value (int64), with release order: visible to others after all that this thread wrote before."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1])
        builder.store_atomic(args[2], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), codegen


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tell the core that this thread spins (x86 ``pause``, ARM ``yield``)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        triple = target().triple
        if triple.startswith(("x86_64", "i386", "i686")):
            _call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        elif triple.startswith(("aarch64", "arm64")):
            _call(builder, "llvm.aarch64.hint", ir.VoidType(), [ir.IntType(32)(1)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def yield_core(typingctx: Any) -> Any:
    """Let another thread have this core, if one waits for it; on Windows nothing is done."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if "windows" not in target().triple:
            _call(builder, "sched_yield", ir.IntType(32), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call_address(typingctx: Any, address: Any, argument: Any) -> Any:
    """Call the C function ``void f(int64_t)`` at an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        signature = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
        builder.call(builder.inttoptr(args[0], signature.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def call_operation(typingctx: Any, address: Any, table: Any, row: Any, rank: Any, size: Any) -> Any:
    """Call the C function ``void f(int64_t, int64_t, int64_t, int64_t)`` at an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = ir.IntType(64)
        signature = ir.FunctionType(ir.VoidType(), [word] * 4)
        builder.call(builder.inttoptr(args[0], signature.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def time_stamp(typingctx: Any) -> Any:
    """The processor's time stamp counter, in ticks of a constant rate; 0 where programs cannot read one."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(builder, "llvm.readcyclecounter", ir.IntType(64), [])

    return types.int64(), codegen


@intrinsic
def call_without_arguments(typingctx: Any, address: Any) -> Any:
    """Call the C function ``int f(void)`` at an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        signature = ir.FunctionType(ir.IntType(32), [])
        return builder.sext(builder.call(builder.inttoptr(args[0], signature.as_pointer()), []), ir.IntType(64))

    return types.int64(types.int64), codegen


@intrinsic
def call_affinity(typingctx: Any, address: Any, size: Any, mask: Any) -> Any:
    """Call sched_getaffinity or sched_setaffinity, at ``address``, for this thread with ``size`` bytes at ``mask``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        i32, i64 = ir.IntType(32), ir.IntType(64)
        function = builder.inttoptr(args[0], ir.FunctionType(i32, [i32, i64, i64]).as_pointer())
        return builder.sext(builder.call(function, [i32(0), args[1], args[2]]), i64)

    return types.int64(types.int64, types.int64, types.int64), codegen
