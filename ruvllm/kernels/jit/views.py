"""Arrays over existing memory, by address or flat, without ``reshape``.

Numba compiles a separate function for each kind of ``reshape``; a forward region with fifty of them took two seconds
longer to compile.
"""

import ctypes
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ruvllm.kernels.jit.decorators import DISABLE_JIT


def unpack(builder: ir.IRBuilder, values: ir.Value) -> list[ir.Value]:
    """The elements of a tuple."""
    return [builder.extract_value(values, i) for i in range(len(values.type.elements))]


def _pack(builder: ir.IRBuilder, values: list[ir.Value]) -> ir.Value:
    """An LLVM array of values of one type."""
    packed: ir.Value = ir.Constant(ir.ArrayType(values[0].type, len(values)), ir.Undefined)
    for i, value in enumerate(values):
        packed = builder.insert_value(packed, value, i)
    return packed


def data_of(context: Any, builder: ir.IRBuilder, array_type: Any, array: ir.Value) -> ir.Value:
    """The address of an array's first element."""
    return context.make_helper(builder, array_type, array).data


def _view(context: Any, builder: Any, result: Any, data: Any, extents: list[ir.Value]) -> ir.Value:
    """A C-contiguous array of numba type ``result`` over the memory at ``data``."""
    array = context.make_helper(builder, result)
    size = context.get_value_type(types.intp)(context.get_abi_sizeof(context.get_data_type(result.dtype)))
    strides = [size]
    for extent in extents[:0:-1]:
        strides.insert(0, builder.mul(strides[0], extent))
    count = context.get_constant(types.intp, 1)
    for extent in extents:
        count = builder.mul(count, extent, flags=["nsw"])
    fields = {"shape": _pack(builder, extents), "strides": _pack(builder, strides), "data": data, "itemsize": size}
    for name, value in (fields | {"nitems": count}).items():
        setattr(array, name, value)
    return array._getvalue()


if TYPE_CHECKING or DISABLE_JIT:

    def array_at(address: Any, shape: Any, dtype: Any) -> Any:
        count = int(np.prod(shape))
        if not count:
            return np.empty(shape, dtype)
        raw = (ctypes.c_uint8 * (count * np.dtype(dtype).itemsize)).from_address(int(address))
        return np.frombuffer(raw, dtype).reshape(shape)

    def address(array: Any) -> Any:
        return array.ctypes.data

    def flat(array: Any) -> Any:
        return array.reshape(-1)

    def integer_loader(groups: tuple[Any, ...]) -> Any:
        def load(address: Any) -> Any:
            size = sum(len(group._fields) if group else 1 for group in groups)
            values = iter(array_at(address, size, np.int64))
            return tuple(group(*(next(values) for _ in group._fields)) if group else next(values) for group in groups)

        return load

else:

    @intrinsic
    def array_at(typingctx: Any, address: Any, shape: Any, dtype: Any) -> Any:
        """A C-contiguous array over the memory at an address; ``shape`` is a count or a tuple.

        ``dtype`` is a NumPy scalar class. The caller keeps the memory alive. So a table of addresses replaces hundreds
        of array arguments.
        """
        axes = list(shape) if isinstance(shape, types.BaseTuple) else [shape]
        result = types.Array(dtype.dtype, len(axes), "C")

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            counts = unpack(builder, args[1]) if isinstance(shape, types.BaseTuple) else [args[1]]
            extents = [context.cast(builder, n, kind, types.intp) for n, kind in zip(counts, axes, strict=True)]
            data = builder.inttoptr(args[0], context.get_data_type(result.dtype).as_pointer())
            return _view(context, builder, result, data, extents)

        return result(types.int64, shape, dtype), codegen

    @intrinsic
    def address(typingctx: Any, array: Any) -> Any:
        """The address of an array's first element: ``array.ctypes.data``."""

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.ptrtoint(data_of(context, builder, array, args[0]), context.get_value_type(types.int64))

        return types.int64(array), codegen

    @intrinsic
    def flat(typingctx: Any, array: Any) -> Any:
        """All elements of a C-contiguous array as one axis: ``array.reshape(-1)``."""
        if array.layout != "C":
            return None
        result = types.Array(array.dtype, 1, "C", readonly=not array.mutable)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            source = context.make_helper(builder, array, args[0])
            return _view(context, builder, result, source.data, [source.nitems])

        return result(array), codegen

    def integer_loader(groups: tuple[Any, ...]) -> Any:
        """A function that loads int64 values from an address on, as a tuple with one element for each group.

        It is a single value for a group None, and an instance for a group that is a class of named tuples. So the
        fields of a table's row become the arguments of a function.
        """

        @intrinsic
        def load(typingctx: Any, address: Any) -> Any:
            kinds = [types.NamedUniTuple(types.int64, len(g._fields), g) if g else types.int64 for g in groups]
            result = types.BaseTuple.from_types(kinds)

            def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
                word = context.get_value_type(types.int64)
                pointer = builder.inttoptr(args[0], word.as_pointer())
                count = itertools.count()

                def load_next(_: Any = None) -> Any:
                    return builder.load(builder.gep(pointer, [ir.Constant(ir.IntType(64), next(count))]))

                values = [
                    context.make_tuple(builder, kind, list(map(load_next, g._fields))) if g else load_next()
                    for g, kind in zip(groups, kinds, strict=True)
                ]
                return context.make_tuple(builder, result, values)

            return result(types.int64), codegen

        return load
