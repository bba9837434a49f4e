"""Numba's dispatchers: where they look for machine code, what they ask for more, and how code is written down."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm
import numba
from numba import types
from numba.core import event
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult, Flags
from numba.core.registry import cpu_target
from numba.core.runtime.nrt import rtsys
from numba.core.serialize import dumps

from ruvllm.kernels.jit.private.parts import part


def _nothing(x: Any) -> None:
    """What the tests make dispatchers of."""


# --- the cache ----------------------------------------------------------------------------------------------------


class _WasAskedError(Exception):
    """What looks for code in a ``_Question``."""


class _Question:
    """A cache that tells that somebody looks into it."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        raise _WasAskedError


def _asks_its_cache(compiled: Any, *arguments: Any) -> bool:
    compiled._cache = _Question()
    try:
        compiled.compile(*arguments)
    except _WasAskedError:
        return True
    return False


@part("cache", "compiled kernels are not kept, so each start compiles them again")
def has_cache() -> bool:
    """Whether another object than numba's can be the cache of a function, and results of compiling be written down."""
    one = (types.int64,)
    return (
        _asks_its_cache(numba.njit(_nothing), one)
        and _asks_its_cache(CFunc(_nothing, (one, types.void), {}, {"nopython": True}))
        and callable(CompileResult._reduce)
        and callable(CompileResult._rebuild)
    )


def keep_in(dispatcher: Any, cache: Any) -> None:
    """Have a dispatcher look for machine code in a cache, and put there what it compiles."""
    if has_cache():
        dispatcher._cache = cache


def c_function(function: Callable, signature: Any, cache: Any) -> Any:
    """numba.cfunc with a cache as keep_in gives it to dispatchers."""
    if not has_cache():
        return numba.cfunc(signature, error_model="numpy")(function)
    options = {"error_model": "numpy"}
    compiled: Any = CFunc(function, (signature.args, signature.return_type), {}, options)
    compiled._cache = cache
    compiled.compile()
    return compiled


def to_bytes(compiled: Any) -> bytes | None:
    """A result of compiling, to be written down; None for code that holds addresses of this process.

    (Lifted loops and ctypes pointers do.)
    """
    if any(not lifted.can_cache for lifted in compiled.lifted) or compiled.library.has_dynamic_globals:
        return None
    return bytes(dumps(compiled._reduce()))


def from_bytes(blob: bytes, target_context: Any) -> Any:
    """What to_bytes was given. It runs what is in a pickle."""
    return CompileResult._rebuild(target_context, *pickle.loads(blob))


@part("runtime", "the first kernel takes a tenth of a second longer")
def has_runtime() -> bool:
    """Whether numba's memory management can be started alone."""
    rtsys.initialize(cpu_target.target_context)
    return llvm.address_of_symbol("NRT_MemInfo_call_dtor") is not None


def make_ready(target_context: Any) -> None:
    """Start what loaded code needs of numba, without all that compiling needs."""
    if not has_runtime():
        target_context.refresh()


# --- options ------------------------------------------------------------------------------------------------------


@part("counting", "tiles of matrix products take longer")
def can_leave_counting() -> bool:
    """Whether a function can be compiled without counting references to arrays."""
    flags: Any = Flags()
    cpu_target.options.parse_as_flags(flags, {"_nrt": False})
    return flags.nrt is False


def counting(yes: bool) -> dict[str, bool]:
    """The option of numba.njit by which a function counts references to the memory of arrays, or does not."""
    return {"_nrt": yes} if can_leave_counting() else {}


# --- calls for which there is no code -----------------------------------------------------------------------------


@part("missing_code", "calls for little work take several microseconds longer")
def can_answer_for_missing_code() -> bool:
    """Whether a dispatcher asks what ``answer_for_missing_code`` gives it."""
    trial = numba.njit(_nothing)
    _answer(trial, lambda *arguments: lambda *again: (arguments, again))
    return bool(trial(7) == ((7,), (7,)))


def answer_for_missing_code(dispatcher: Any, answer: Callable[..., Any]) -> bool:
    """Have ``answer(*arguments)`` give what to call where there is no code for arguments of such types.

    Returns False, with nothing done, where numba cannot.
    """
    if can_answer_for_missing_code():
        _answer(dispatcher, answer)
        return True
    return False


def _answer(dispatcher: Any, answer: Callable[..., Any]) -> None:
    dispatcher._compile_for_args = answer  # looked up by numba's C


# --- progress -----------------------------------------------------------------------------------------------------


@contextmanager
def _on_each_compilation(call: Callable[[], Any]) -> Iterator[None]:
    class Listener(event.Listener):
        def on_start(self, event: Any) -> None:
            """A function begins."""

        def on_end(self, event: Any) -> None:
            """A function is ready."""
            call()

    with event.install_listener("numba:compile", Listener()):
        yield


@part("events", "progress bars stand still while kernels are compiled")
def has_events() -> bool:
    """Whether numba tells when it has compiled a function."""
    seen: list[None] = []
    with _on_each_compilation(lambda: seen.append(None)), event.trigger_event("numba:compile"):
        pass
    return len(seen) == 1


@contextmanager
def on_each_compilation(call: Callable[[], Any]) -> Iterator[None]:
    """Inside the block ``call`` is called after each function that numba has compiled."""
    if not has_events():
        yield
        return
    with _on_each_compilation(call):
        yield
