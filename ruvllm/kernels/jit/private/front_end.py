"""Numba's front end (IR and type inference) without work that kernels do not need.

- Numba resolves each call of an operator, an intrinsic or a built-in function twice, when it infers types and when it
  writes LLVM IR, by trying up to a hundred signatures. Here what was found is kept: nine of ten calls have been seen
  before, in this function or another.
- Two passes look for overloads to inline and for expressions of whole arrays. Overloads can be called, and serial
  kernels cannot have such expressions: they own no memory.
"""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from numba import types
from numba.core.compiler_machinery import PassManager
from numba.core.registry import cpu_target

from ruvllm.kernels.jit.private.parts import part

_UNNEEDED = frozenset({"inline_overloads", "nopython_rewrites"})  # passes
_resolve: Any = types.Function.get_call_type
# Signatures by function and argument types. A function that gets more overloads is another one from then on.
_resolved: dict[tuple[Any, Any], Any] = {}


def _resolve_once(function: Any, context: Any, arguments: Any, keywords: Any) -> Any:
    if keywords:
        return _resolve(function, context, arguments, keywords)
    key = function, arguments
    if key not in _resolved:
        _resolved[key] = _resolve(function, context, arguments, keywords)
    return _resolved[key]


@contextmanager
def _resolving_once() -> Iterator[None]:
    if "get_call_type" in vars(types.Function):  # a kernel is compiled while its caller is
        yield
        return
    setattr(types.Function, "get_call_type", _resolve_once)  # noqa: B010  of the base class, to mypy
    try:
        yield
    finally:
        del types.Function.get_call_type


@contextmanager
def resolving_once() -> Iterator[None]:
    """Inside the block, which holds numba's lock of the compiler, no call is resolved twice."""
    if not can_shorten():
        yield
        return
    with _resolving_once():
        yield


def shortened(pipeline: Any) -> Any:
    """A pipeline of passes without those that serial kernels do not need."""
    if not can_shorten():
        return pipeline
    short = PassManager(pipeline.pipeline_name)
    for step, description in pipeline.passes:
        if step.name() not in _UNNEEDED:
            short.add_pass(step, description)
    short.finalize()
    return short


@part("front_end", "the first start takes a few seconds longer")
def can_shorten() -> bool:
    """Whether numba resolves a call where it does now, and finds the same when it is told not to do so twice."""
    context, two = cpu_target.typing_context, (types.int32, types.float32)
    context.refresh()
    expected = context.resolve_function_type(operator.add, two, {})
    with _resolving_once():
        first, again = (context.resolve_function_type(operator.add, two, {}) for _ in range(2))
    return bool(first == expected and first is again)
