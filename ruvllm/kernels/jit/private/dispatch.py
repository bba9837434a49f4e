"""Numba's dispatchers: their cache and how code is serialised, an option, calls without code, compile events."""

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
    """The function that the tests of the parts compile."""


# --- the cache ----------------------------------------------------------------------------------------------------


class _LookupError(Exception):
    """Raised by a ``_ProbeCache``."""


class _ProbeCache:
    """A cache that raises when code is looked up in it."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        raise _LookupError


def _uses_its_cache(compiled: Any, *arguments: Any) -> bool:
    compiled._cache = _ProbeCache()
    try:
        compiled.compile(*arguments)
    except _LookupError:
        return True
    return False


@part("cache", "compiled kernels are not kept, so each start compiles them again")
def has_cache() -> bool:
    """Whether an object of ours can be the cache of a function, and compile results can be serialised."""
    one = (types.int64,)
    return (
        _uses_its_cache(numba.njit(_nothing), one)
        and _uses_its_cache(CFunc(_nothing, (one, types.void), {}, {"nopython": True}))
        and callable(CompileResult._reduce)
        and callable(CompileResult._rebuild)
    )


def keep_in(dispatcher: Any, cache: Any) -> None:
    """Have a dispatcher load machine code from a cache, and save there what it compiles."""
    if has_cache():
        dispatcher._cache = cache


def c_function(function: Callable, signature: Any, cache: Any) -> Any:
    """numba.cfunc with a cache, as ``keep_in`` does for dispatchers."""
    if not has_cache():
        return numba.cfunc(signature, error_model="numpy")(function)
    options = {"error_model": "numpy"}
    compiled: Any = CFunc(function, (signature.args, signature.return_type), {}, options)
    compiled._cache = cache
    compiled.compile()
    return compiled


def to_bytes(compiled: Any) -> bytes | None:
    """A compile result, serialised; None for code that holds addresses of this process (lifted loops, ctypes)."""
    if any(not lifted.can_cache for lifted in compiled.lifted) or compiled.library.has_dynamic_globals:
        return None
    return bytes(dumps(compiled._reduce()))


def from_bytes(blob: bytes, target_context: Any) -> Any:
    """The compile result that ``to_bytes`` serialised. It unpickles, which runs code: only for trusted bytes."""
    return CompileResult._rebuild(target_context, *pickle.loads(blob))


@part("runtime", "the first kernel takes a tenth of a second longer")
def has_runtime() -> bool:
    """Whether numba's runtime (its memory management) can be initialised without its compiler."""
    rtsys.initialize(cpu_target.target_context)
    return llvm.address_of_symbol("NRT_MemInfo_call_dtor") is not None


def make_ready(target_context: Any) -> None:
    """Initialise numba's runtime for code from the cache, without the compiler, which takes longer."""
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
    """The option of numba.njit for whether a function counts references to the memory of arrays."""
    return {"_nrt": yes} if can_leave_counting() else {}


# --- calls for which there is no code -----------------------------------------------------------------------------


@part("missing_code", "calls for little work take several microseconds longer")
def can_answer_for_missing_code() -> bool:
    """Whether a dispatcher calls the function that ``answer_for_missing_code`` sets."""
    trial = numba.njit(_nothing)
    _answer(trial, lambda *arguments: lambda *again: (arguments, again))
    return bool(trial(7) == ((7,), (7,)))


def answer_for_missing_code(dispatcher: Any, answer: Callable[..., Any]) -> bool:
    """For argument types without compiled code, have the dispatcher call what ``answer(*arguments)`` returns.

    Returns False, and changes nothing, where this numba cannot.
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
