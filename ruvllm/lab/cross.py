"""Compiles kernel bodies to assembly for any processor; the code is never run.

``compile_bodies`` starts a process for each processor (``answer``). There Numba's code generator gets another target
machine, and stops before machine code.
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

from ruvllm.kernels.jit.decorators import COMPILED
from ruvllm.kernels.jit.private.cross import assembly_of, retarget, to_assembly, with_line_numbers
from ruvllm.kernels.jit.private.target import FOREIGN, Target
from ruvllm.kernels.threads.pool import physical_cores


class Body(NamedTuple):
    """A compiled function: module and name, or a pickle of it where no module can be imported; its numba types."""

    module: str
    name: str
    signature: tuple[Any, ...]
    pickled: bytes | None = None


_PROGRAM = "from ruvllm.lab.cross import answer; answer()"


class Compiled(NamedTuple):
    """Assembly with LLVM's comments, and the remarks of its loop vectoriser."""

    assembly: str
    remarks: str


def compile_bodies(bodies: Sequence[Body], targets: Sequence[Target]) -> list[list[Compiled]]:
    """The bodies compiled for each target: one list per target.

    Raises:
        RuntimeError: a body cannot be compiled for these types.
    """

    def compiled(target: Target) -> list[Compiled]:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM], input=pickle.dumps((target, bodies)),
            env={**os.environ, "NUMBA_DISABLE_JIT": "0", FOREIGN: " ".join(target)},
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
    """Numba's message, without the error's name and "Failed in nopython mode"; else the last line."""
    lines = [line.strip() for line in trace.splitlines() if line.strip()]
    for at, line in enumerate(lines):
        if line.startswith("numba.core.errors."):
            told = [text for text in lines[at:] if not text.startswith(("numba.core.errors.", "Failed in", "During:"))]
            return " ".join(told[:2]) or line
    return lines[-1] if lines else ""


# --- the other process --------------------------------------------------------------------------------------------


def answer() -> None:
    """Read a request, write assembly and remarks for each body."""
    gc.disable()  # it would take a tenth of the time, in a process that soon ends
    stdout, sys.stdout = sys.stdout, sys.stderr  # numba may print
    target, bodies = pickle.load(sys.stdin.buffer)
    for body in bodies:
        if not body.pickled:
            import_module(body.module)
    retarget(target, to_assembly)
    for kernel in COMPILED:
        with_line_numbers(kernel)
    with _remarks() as remarks:
        found = [(_assembly(body), remarks()) for body in bodies]
    stdout.buffer.write(pickle.dumps(found))


def _assembly(body: Body) -> str:
    dispatcher = pickle.loads(body.pickled) if body.pickled else getattr(import_module(body.module), body.name)
    if body.pickled:
        with_line_numbers(dispatcher)
    return assembly_of(dispatcher, body.signature)


@contextlib.contextmanager
def _remarks() -> Iterator[Callable[[], str]]:
    """A function that returns what LLVM wrote to stderr since its last call: the remarks of the vectoriser."""
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
