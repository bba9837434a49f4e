"""explain(kernel): how the compiler translated a kernel's loops, for this processor or another."""

from __future__ import annotations

import linecache
import pickle
import platform
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np

from ruvllm.brief import brief
from ruvllm.display import as_html, as_text, axis
from ruvllm.kernels import KERNELS, KernelSpec
from ruvllm.kernels.jit.decorators import COMPILED, DISABLE_JIT
from ruvllm.kernels.jit.private.target import Target
from ruvllm.kernels.jit.private.target import target as host_target
from ruvllm.lab.assembly import Loop, called, defined, innermost_loops
from ruvllm.lab.calls import Call, calls_of_kernel, calls_of_models
from ruvllm.lab.cross import Body, Compiled, compile_bodies

_FOREIGN = {
    "apple-m4": Target("arm64-apple-macosx14.0.0", "apple-m4", "+dotprod"),
    "haswell": Target("x86_64-unknown-linux-gnu", "haswell", "+avx2,+f16c,+fma"),
    "znver4": Target("x86_64-unknown-linux-gnu", "znver4", "+avx2,+f16c,+fma,+avx512f,+avx512vnni"),
}
TARGETS = ("host", *_FOREIGN)
_REMARK = re.compile(r"remark: (.*?):(\d+):\d+: loop not vectorized: (.*)")
_HARMLESS = frozenset({"memset", "memcpy", "memmove", "bzero", "NRT_incref", "NRT_decref"})  # per array
_SOURCE_COLUMNS = 76


@dataclass(frozen=True)
class Remark:
    """Why the compiler did not vectorise a loop."""

    file: str
    line: int
    text: str


@dataclass(frozen=True)
class Explanation:
    """How a kernel's bodies were compiled. print() it, or let a notebook show it.

    loops: the innermost loops, in the order of the code. calls: functions that are called from compiled code, with how
    many calls there are. defined: functions whose code is included. remarks: why loops were not vectorised.
    assembly: all of it.
    """

    name: str
    target: str
    bodies: tuple[str, ...]
    loops: tuple[Loop, ...]
    calls: Counter[str]
    defined: frozenset[str]
    remarks: tuple[Remark, ...]
    assembly: str

    __repr__ = brief

    @property
    def width(self) -> int:
        """Bits of the widest vector arithmetic in any loop, 0 if there is none."""
        return max((loop.width for loop in self.loops), default=0)

    @property
    def scalar_loops(self) -> tuple[Loop, ...]:
        """Loops with scalar float arithmetic, except the remainder loops of a vector loop on the same lines."""
        wide = {(x.file, x.line) for loop in self.loops if loop.width for x in loop.assembly}
        return tuple(
            loop
            for loop in self.loops
            if loop.scalar_math and not loop.width and not wide & {(x.file, x.line) for x in loop.assembly}
        )

    @property
    def scalar_calls(self) -> tuple[str, ...]:
        """Functions called from loops, one element at a time; not those whose own loops are included."""
        harmless = {*_HARMLESS, *self.defined}
        return tuple(dict.fromkeys(name for loop in self.loops for name in loop.calls if name not in harmless))

    @property
    def vectorized(self) -> bool:
        """Whether there is vector arithmetic, and no loop computes on single floats or calls a function."""
        return bool(self.width) and not self.scalar_loops and not self.scalar_calls

    @property
    def moved(self) -> int:
        """Bits of the widest load or store in any loop, 0 if there is none."""
        return max((loop.moved for loop in self.loops), default=0)

    @property
    def moves_only(self) -> bool:
        """Whether its loops only copy, several elements at a time, without arithmetic or calls."""
        copies = any(loop.stores and loop.moved >= 64 for loop in self.loops)
        return copies and not self.width and not self.scalar_loops and not self.scalar_calls

    def annotated(self, loop: int | None = None) -> str:
        """Assembly of one loop (or of all), each instruction to the right of the source line that it comes from."""
        chosen = range(len(self.loops)) if loop is None else (loop,)
        return "\n\n".join(f"loop {i}\n{_side_by_side(self.loops[i])}" for i in chosen)

    def heading(self) -> str:
        """One line: what was compiled, for what, and whether it vectorised."""
        what = f"{self.name} ({', '.join(self.bodies)})" if self.bodies != (self.name,) else self.name
        return f"{what} for {self.target}: {self._verdict()}"

    def rows(self) -> list[tuple[str, ...]]:
        """A table of the loops, as text; the first row has the headings."""
        found: list[tuple[str, ...]] = [
            ("loop", "at", "bits", "fma", "int dot", "scalar", "spills", "lines per element", "instructions", "calls")
        ]
        for i, x in enumerate(self.loops):
            per = f"{x.lines_per_element:.3f} per {x.element}" if x.elements else "-"
            found.append(
                (
                    str(i), f"{Path(x.file).name}:{x.line}", str(x.width or "-"), str(x.fma), str(x.dot),
                    str(x.scalar_math), str(x.spills), per, str(len(x.assembly)), ", ".join(x.calls) or "-",
                )
            )  # fmt: skip
        return found

    def __str__(self) -> str:
        return "\n".join([as_text(self.heading(), self.rows()), *self._notes()])

    def _repr_html_(self) -> str:
        notes = "".join(as_html(note, ()) for note in self._notes())
        return as_html(self.heading(), self.rows()) + notes

    def plot(self, ax: Any = None) -> Any:
        """Bars of what each loop's instructions are; returns the matplotlib axis.

        Raises:
            ImportError: matplotlib is not installed.
        """
        ax = axis(ax)
        labels = [f"{i}  {Path(loop.file).name}:{loop.line}" for i, loop in enumerate(self.loops)]
        left = np.zeros(len(labels))
        for name, counts in (
            ("multiply-add", [x.fma for x in self.loops]),
            ("integer dot", [x.dot for x in self.loops]),
            ("spill", [x.spills for x in self.loops]),
            ("scalar float", [x.scalar_math for x in self.loops]),
            ("call", [len(x.calls) for x in self.loops]),
        ):
            ax.barh(labels, counts, left=left, label=name)
            left += counts
        rest = [max(0, len(x.assembly) - int(n)) for x, n in zip(self.loops, left, strict=True)]
        ax.barh(labels, rest, left=left, label="other", color="0.85")
        ax.invert_yaxis()
        ax.set_xlabel("instructions per iteration")
        ax.set_title(f"{self.name} for {self.target}")
        ax.legend(frameon=False)
        return ax

    def _verdict(self) -> str:
        if not self.loops:
            return "no loop left"
        if self.vectorized:
            return f"vectorised, {self.width} bits"
        if self.moves_only:
            return f"moves memory, up to {self.moved} bits at a time, and computes nothing"
        if not self.width:
            return "not vectorised" + (f", calls in loops: {', '.join(self.scalar_calls)}" if self.scalar_calls else "")
        parts = [f"{len(self.scalar_loops)} scalar loops"] if self.scalar_loops else []
        parts += [f"calls in loops: {', '.join(self.scalar_calls)}"] if self.scalar_calls else []
        return f"vectorised in part, {self.width} bits; {'; '.join(parts)}"

    def _notes(self) -> list[str]:
        outside = [f"{n} x{count}" for n, count in self.calls.items() if n not in {*self.scalar_calls, *_HARMLESS}]
        notes = [f"calls outside of loops: {', '.join(outside)}"] if outside else []
        return notes + [f"{Path(r.file).name}:{r.line}: not vectorised: {r.text}" for r in self.remarks]


def explain(kernel: str | KernelSpec | Any, *arguments: Any, target: str = "host") -> Explanation:
    """How the loops of a kernel were compiled: width of vectors, multiply-adds, dot products, spills, calls.

    Args:
        kernel: the name or record of a public kernel, the name of a body that models call ("quant_matmul"), or any
            function that Numba compiled, including your own.
        arguments: for a function, those of a call: their types decide what is compiled. Nothing is run.
        target: "host", or a processor of TARGETS, whichever this machine has.

    Raises:
        ValueError: no kernel has this name, or unknown target.
        TypeError: a function that is not compiled, or without arguments.
        RuntimeError: NUMBA_DISABLE_JIT is set, or the function cannot be compiled for these types.
    """
    name, calls = _calls(kernel, arguments)
    return _explain({name: calls}, (target,))[name, target]


def explain_all(kernels: Iterable[str], targets: Iterable[str]) -> dict[tuple[str, str], Explanation]:
    """``explain`` for every kernel and target at once, by (kernel, target): much faster than one by one."""
    return _explain(dict(_calls(kernel, ()) for kernel in kernels), tuple(targets))


def _calls(kernel: Any, arguments: tuple[Any, ...]) -> tuple[str, list[Call]]:
    """A name, and the bodies to compile, with the types to compile them for."""
    if DISABLE_JIT:
        raise RuntimeError("NUMBA_DISABLE_JIT=1: kernels run as plain Python, there is nothing to explain")
    if isinstance(kernel, str) and kernel in KERNELS:
        kernel = KERNELS[kernel]
    if isinstance(kernel, KernelSpec):
        return kernel.name, calls_of_kernel(kernel)
    if isinstance(kernel, str):
        if kernel not in calls_of_models():
            known = ", ".join(sorted({*KERNELS, *calls_of_models()}))
            raise ValueError(f"no kernel {kernel!r}: expected one of {known}")
        return kernel, [calls_of_models()[kernel]]
    if not hasattr(kernel, "py_func"):
        raise TypeError(f"kernel: expected a name, a KernelSpec or a function compiled by Numba, found {kernel!r}")
    if not arguments:
        raise TypeError("arguments: found none, expected those of a call, whose types decide what is compiled")
    return kernel.py_func.__name__, [(kernel, tuple(numba.typeof(argument) for argument in arguments))]


def _explain(kernels: dict[str, list[Call]], targets: tuple[str, ...]) -> dict[tuple[str, str], Explanation]:
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"target: expected one of {', '.join(TARGETS)}, found {target!r}")
    keys = {(id(body), signature): (body, signature) for calls in kernels.values() for body, signature in calls}
    bodies = [_portable(body, signature) for body, signature in keys.values()]
    explanations = {}
    for target, compiled in zip(targets, compile_bodies(bodies, [_target(name) for name in targets]), strict=True):
        by_key = dict(zip(keys, compiled, strict=True))
        for name, calls in kernels.items():
            names = tuple(dict.fromkeys(body.py_func.__name__ for body, _ in calls))
            found = [by_key[id(body), signature] for body, signature in calls]
            explanations[name, target] = _explanation(name, target, names, found)
    return explanations


def _explanation(name: str, target: str, bodies: tuple[str, ...], compiled: list[Compiled]) -> Explanation:
    loops = tuple(loop for each in compiled for loop in innermost_loops(each.assembly))
    calls = sum((called(each.assembly) for each in compiled), Counter[str]())
    slow = [x for x in loops if x.calls or (x.scalar_math and not x.width)]
    remarks = dict.fromkeys(
        remark
        for each in compiled
        for match in _REMARK.finditer(each.remarks)
        if any(_within(remark := Remark(match[1], int(match[2]), match[3]), loop) for loop in slow)
    )
    assembly = "\n".join(each.assembly for each in compiled)
    names = frozenset().union(*(defined(each.assembly) for each in compiled))
    return Explanation(name, _described(target), bodies, loops, calls, names, tuple(remarks), assembly)


@cache
def _file_name(path: str) -> str:
    return Path(path).name


def _within(remark: Remark, loop: Loop) -> bool:
    """Whether a remark is about this loop: it names one of its lines, and the file without its directory."""
    lines = [x.line for x in loop.assembly if _file_name(x.file) == _file_name(remark.file)]
    return bool(lines) and min(lines) <= remark.line <= max(lines)


def _portable(body: Any, signature: tuple[Any, ...]) -> Body:
    """How another process finds the same function: by module and name, or in a pickle if no module holds it."""
    function = body.py_func
    pickled = None if any(body is known for known in COMPILED) else pickle.dumps(body)
    return Body(function.__module__, function.__name__, signature, pickled)


def _target(name: str) -> Target:
    if name in _FOREIGN:
        return _FOREIGN[name]
    return host_target()


def _described(target: str) -> str:
    return f"this machine ({_target('host').cpu}, {platform.machine()})" if target == "host" else target


def _side_by_side(loop: Loop) -> str:
    """Source lines to the left, instructions to the right; a line is written where it changes."""
    lines, before = [], None
    for x in loop.assembly:
        source = ""
        if (x.file, x.line) != before:
            source = f"{Path(x.file).name}:{x.line}  {linecache.getline(x.file, x.line).strip()}"
            before = (x.file, x.line)
        if len(source) > _SOURCE_COLUMNS:
            source = source[: _SOURCE_COLUMNS - 1] + "…"
        lines.append(f"{source:<{_SOURCE_COLUMNS}}  {x.text.expandtabs(12)}")
    return "\n".join(lines)
