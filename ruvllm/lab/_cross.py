"""Compiles kernel bodies to assembly for any processor; nothing of it is ever run.

``compile_bodies`` has a process of its own do it for each processor (``answer``): there Numba's code generator gets
another target machine, and stops before machine code.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any, NamedTuple

from ruvllm.kernels.threads.pool import physical_cores


class Body(NamedTuple):
    """A compiled function: module and name, or a pickle of it where no module can be imported; its numba types."""

    module: str
    name: str
    signature: tuple[Any, ...]
    pickled: bytes | None = None


class Target(NamedTuple):
    """A processor, as LLVM names it and its features."""

    triple: str
    cpu: str
    features: str


# By the magic tuple kernels choose their integer dot products, and, as they are imported, their tiles.
_PROGRAM = """
import sys
from numba.core.registry import cpu_target
cpu_target.target_context.codegen().magic_tuple = lambda: tuple(sys.argv[1:])
from ruvllm.lab._cross import answer
answer()
"""


class Compiled(NamedTuple):
    """Assembly with LLVM's comments, and what its loop vectoriser had to say."""

    assembly: str
    remarks: str


def compile_bodies(bodies: Sequence[Body], targets: Sequence[Target]) -> list[list[Compiled]]:
    """What becomes of the bodies on each of the targets: one list a target.

    Raises:
        RuntimeError: a body cannot be compiled for these types.
    """

    def compiled(target: Target) -> list[Compiled]:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, *target],
            input=pickle.dumps((target, bodies)), env={**os.environ, "NUMBA_DISABLE_JIT": "0"},
            capture_output=True, check=False,
        )  # fmt: skip
        if done.returncode:
            names = ", ".join(body.name for body in bodies)
            why = _reason(done.stderr.decode(errors="replace")) or f"exit code {done.returncode}"
            raise RuntimeError(f"{names}: could not be compiled for {target.cpu}: {why}")
        return [Compiled(*texts) for texts in pickle.loads(done.stdout)]

    with ThreadPoolExecutor(physical_cores()) as pool:
        return list(pool.map(compiled, targets))


def _reason(trace: str) -> str:
    """What numba says is wrong: the lines after the error's name and its "Failed in nopython mode"; else the last."""
    lines = [line.strip() for line in trace.splitlines() if line.strip()]
    for at, line in enumerate(lines):
        if line.startswith("numba.core.errors."):
            told = [text for text in lines[at:] if not text.startswith(("numba.core.errors.", "Failed in", "During:"))]
            return " ".join(told[:2]) or line
    return lines[-1] if lines else ""


# --- the other process --------------------------------------------------------------------------------------------


def answer() -> None:
    """Read a request, write assembly and remarks for each body."""
    gc.disable()  # a tenth of the time, in a process that soon ends
    stdout, sys.stdout = sys.stdout, sys.stderr  # numba may print
    target, bodies = pickle.load(sys.stdin.buffer)
    for body in bodies:
        if not body.pickled:
            import_module(body.module)  # before _retarget, which changes the kernels that there are
    _retarget(target)
    with _remarks() as remarks:
        found = [(_assembly(body), remarks()) for body in bodies]
    stdout.buffer.write(pickle.dumps(found))


def _retarget(target: Target) -> None:
    """Have Numba make assembly for the target instead of machine code of this process, with line numbers, uncached."""
    import llvmlite.binding as llvm
    from numba.core.caching import NullCache
    from numba.core.codegen import JITCodeLibrary
    from numba.core.compiler_lock import global_compiler_lock
    from numba.core.registry import cpu_target
    from numba.core.runtime.nrt import rtsys
    from numba.core.runtime.nrtdynmod import compile_nrt_functions

    from ruvllm.kernels.jit.decorators import COMPILED
    from ruvllm.kernels.jit.private import not_callable

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, codemodel="jitdefault", jit=True,
        reloc="static" if target.triple.startswith("x86") else "default",
    )  # fmt: skip
    machine.set_asm_verbosity(True)  # LLVM then says where loops are, and what is a spill
    cpu_target.typing_context.refresh()  # what numba needs for itself is made for this machine
    cpu_target.target_context.refresh()
    codegen = cpu_target.target_context.codegen()
    codegen._tm, codegen._data_layout = machine, str(machine.target_data)
    empty_module = codegen._create_empty_module

    def module_for_target(name: str) -> Any:
        module = empty_module(name)
        module.triple = target.triple
        return module

    def to_assembly(library: Any) -> None:
        # The code generator changes the IR, which then is linked into other kernels: as in numba's own process.
        text = machine._emit_to_memory(library._final_module, use_object=False)
        library.assembly = text.decode(errors="replace")
        library._finalize_dynamic_globals()
        library._finalized = True

    codegen._create_empty_module = module_for_target
    setattr(JITCodeLibrary, "_finalize_final_module", to_assembly)  # noqa: B010  mypy sees no method there
    cpu_target.target_context.get_executable = lambda library, fndesc, env: not_callable()
    with global_compiler_lock:
        rtsys._library = compile_nrt_functions(cpu_target.target_context)  # reference counts: linked into kernels
    for dispatcher in COMPILED:
        dispatcher._cache = NullCache()
        dispatcher._compiler.pipeline_class = _with_line_numbers(dispatcher._compiler.pipeline_class)


def _with_line_numbers(compiler: Any) -> Any:
    """A compiler that also says from which source line code comes, and makes no wrappers for Python."""

    class LineNumbers(compiler):
        def __init__(
            self, typingctx: Any, targetctx: Any, library: Any, args: Any, return_type: Any, flags: Any, locals: Any
        ) -> None:
            flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
            # Line numbers alone: debug=True would add checks of bounds, and keep variables longer.
            flags.debuginfo = flags.dbg_directives_only = True
            super().__init__(typingctx, targetctx, library, args, return_type, flags, locals)

    return LineNumbers


def _assembly(body: Body) -> str:
    """Assembly of a body and of all that is not inlined into it."""
    from numba.core.compiler_lock import global_compiler_lock

    dispatcher = pickle.loads(body.pickled) if body.pickled else getattr(import_module(body.module), body.name)
    if body.pickled:
        dispatcher._compiler.pipeline_class = _with_line_numbers(dispatcher._compiler.pipeline_class)
    dispatcher.compile(body.signature)
    library = dispatcher.overloads[body.signature].library
    with global_compiler_lock:
        library._ensure_finalized()
    return str(library.assembly)


@contextlib.contextmanager
def _remarks() -> Iterator[Callable[[], str]]:
    """A function that gives what LLVM has written to stderr since it was last called: remarks of the vectoriser."""
    import llvmlite.binding as llvm

    for option in ("-pass-remarks-missed=loop-vectorize", "-pass-remarks-analysis=loop-vectorize"):
        llvm.set_option("ruvllm", option)
    with tempfile.TemporaryFile() as file:
        stderr, read = os.dup(2), 0
        os.dup2(file.fileno(), 2)

        def since() -> str:
            nonlocal read
            text = os.pread(2, 1 << 24, read)
            read += len(text)
            return text.decode(errors="replace")

        try:
            yield since
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
