"""swap(rms_norm=mine): another implementation of a kernel, checked against the reference, then used by models."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ruvllm.brief import brief
from ruvllm.display import Table, axis
from ruvllm.kernels import KERNELS, KernelSpec
from ruvllm.measure.replacing import replaced
from ruvllm.model.ops.swapped import SWAPPED

_changing = threading.Lock()


@dataclass
class Swapped:
    """A replacement of a kernel: its error at each example size, its calls and seconds so far."""

    name: str
    sizes: list[dict[str, int]] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    kernel_errors: list[float] = field(default_factory=list)
    calls: int = 0
    seconds: float = 0.0

    __repr__ = brief


@dataclass
class Swap(Table):
    """The swapped kernels; print() it, or let a notebook show it."""

    kernels: dict[str, Swapped]

    __repr__ = brief

    def __getitem__(self, name: str) -> Swapped:
        return self.kernels[name]

    def heading(self) -> str:
        """One line: which kernels, and how often they were called."""
        parts = [f"{x.name} ({x.calls} calls, {x.seconds * 1e3:.1f} ms)" for x in self.kernels.values()]
        return f"swapped: {', '.join(parts)}"

    def rows(self) -> list[tuple[str, ...]]:
        """Normalised mean squared errors against float64, as text; the first row has the headings."""
        found: list[tuple[str, ...]] = [("kernel", "sizes", "its error", "the library's error")]
        for x in self.kernels.values():
            for sizes, error, usual in zip(x.sizes, x.errors, x.kernel_errors, strict=True):
                at = ", ".join(f"{axis} {n}" for axis, n in sizes.items())
                found.append((x.name, at, f"{error:.1e}", f"{usual:.1e}"))
        return found

    def plot(self, ax: Any = None) -> Any:
        """Errors of each kernel at its example sizes, next to the library's; returns the matplotlib axis."""
        fresh, ax = ax is None, axis(ax)
        labels = [f"{name} {at}" for name, at, *_ in self.rows()[1:]]
        if fresh:
            ax.figure.set_figheight(max(3.0, 1 + 0.22 * len(labels)))
        ticks = np.arange(len(labels))
        for shift, color, what in ((-0.2, "C1", "errors"), (0.2, "C0", "kernel_errors")):
            errors = [e for x in self.kernels.values() for e in getattr(x, what)]
            label = "swapped in" if what == "errors" else "the library's"
            ax.barh(ticks + shift, np.maximum(errors, 1e-20), 0.4, color=color, label=label)
        ax.set_yticks(ticks, labels)
        ax.set_xscale("log")
        ax.tick_params(axis="x", which="minor", labelbottom=False)
        ax.invert_yaxis()
        ax.set_xlabel("normalised mean squared error against float64")
        ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
        return ax


@contextmanager
def swap(tolerance: float | None = None, **functions: Callable[..., Any]) -> Iterator[Swap]:
    """Use other functions in place of kernels inside the block, everywhere in the library and in all threads.

    Each is first called on its kernel's example inputs and compared with the float64 reference. Models call it on both
    paths: the parallel region is left for it, with ``model.fused = False`` it is one of the calls from Python. The
    kernels that layers are made of are ``rms_norm``, ``apply_rope_tables``, ``silu_mul``, and in some models
    ``gelu_mul``, ``clamped_swiglu``, ``scale`` and ``softcap``; others are swapped where Python calls them.

    Args:
        tolerance: the largest normalised mean squared error sum((y - r)^2) / sum(r^2); None: that of each kernel.
        functions: by the kernel's name. A function takes the kernel's arguments by name; one without ``out`` returns
            its result, which is copied to the caller's array. It must not change arguments that the kernel leaves
            alone. If it calls the kernel itself, it gets the library's.

    Yields:
        The errors, and the calls as they are made.

    Raises:
        ValueError: no kernel has this name, it is swapped already, a result differs from the reference, or the
            function changes its arguments; nothing is swapped.
        TypeError: a value that cannot be called like the kernel, or whose result is not numeric.
    """
    if not functions:
        raise ValueError("functions: expected at least one, such as rms_norm=my_function")
    swapped, callers = {}, {}
    for name, function in functions.items():
        if name not in KERNELS:
            raise ValueError(f"no kernel {name!r}: expected one of {', '.join(sorted(KERNELS))}")
        if not callable(function):
            raise TypeError(f"{name}: expected a function, found {function!r}")
        spec = KERNELS[name]
        record = Swapped(name)
        callers[id(spec.function)] = _as_kernel(spec, function, record)
        _check(spec, callers[id(spec.function)], record, spec.tolerance if tolerance is None else tolerance)
        record.calls, record.seconds = 0, 0.0
        swapped[name] = record
    with ExitStack() as stack:
        stack.enter_context(_only_here(swapped))
        stack.enter_context(replaced(lambda kernel: callers[id(kernel)], lambda value: id(value) in callers))
        yield Swap(swapped)


@contextmanager
def _only_here(names: Iterable[str]) -> Iterator[None]:
    """Inside the block nobody else can swap these kernels."""
    with _changing:
        for name in names:
            if name in SWAPPED:
                raise ValueError(f"{name}: swapped already; leave that block first")
        SWAPPED.update(names)
    try:
        yield
    finally:
        with _changing:
            SWAPPED.difference_update(names)


def _as_kernel(spec: KernelSpec, function: Callable[..., Any], record: Swapped) -> Callable[..., Any]:
    """The function with the kernel's calling convention: ``out`` is filled and returned."""
    signature = inspect.signature(getattr(function, "py_func", function))
    takes_out = "out" in signature.parameters
    has_out = "out" in inspect.signature(spec.function).parameters
    try:
        signature.bind(**_example(spec, spec.sizes[0]))
    except TypeError as error:
        raise TypeError(
            f"{spec.name}: expected a function of ({', '.join(_example(spec, spec.sizes[0]))}), "
            f"found one of {signature} ({error})"
        ) from None
    inside = threading.local()

    def call(*arguments: Any, **named: Any) -> Any:
        if getattr(inside, "now", False):  # the function itself calls the kernel
            return spec.function(*arguments, **named)
        inside.now = True
        try:
            return run(*arguments, **named)
        finally:
            inside.now = False

    def run(*arguments: Any, **named: Any) -> Any:
        out = named.pop("out", None) if has_out else None
        started = time.perf_counter()
        if takes_out and out is not None:
            result = function(*arguments, **named, out=out)
        else:
            result = function(*arguments, **named)
        if out is not None and result is not out:
            out[...] = result
            result = out
        record.calls += 1
        record.seconds += time.perf_counter() - started
        return result

    return call


def _check(spec: KernelSpec, call: Callable[..., Any], record: Swapped, tolerance: float) -> None:
    """Compare with the reference at the kernel's example sizes."""
    for sizes in spec.examples:
        expected = _arrays(spec.name, spec.reference(**_example(spec, sizes)))
        result, changed = _called(call, spec, sizes)
        got = _arrays(spec.name, result)
        usual_result, usually_changed = _called(spec.function, spec, sizes)
        usual = _arrays(spec.name, usual_result)
        if spoilt := changed - usually_changed:
            raise ValueError(f"{spec.name}: the function changes its arguments: {', '.join(sorted(spoilt))}")
        shapes, wanted = [y.shape for y in got], [r.shape for r in expected]
        if shapes != wanted:
            raise ValueError(f"{spec.name}: expected results of shape {wanted} at {sizes}, found {shapes}")
        error = max(_error(y, r) for y, r in zip(got, expected, strict=True))
        if not error <= tolerance:
            raise ValueError(
                f"{spec.name}: at {sizes} the normalised mean squared error is {error:.2e}, "
                f"more than {tolerance:.0e}: not swapped (tolerance= allows more)"
            )
        record.sizes.append(sizes)
        record.errors.append(error)
        record.kernel_errors.append(max(_error(y, r) for y, r in zip(usual, expected, strict=True)))


def _example(spec: KernelSpec, sizes: dict[str, int]) -> dict[str, Any]:
    """New arrays each time: some kernels change their arguments."""
    return spec.example(np.random.default_rng(0), **sizes)


def _called(call: Callable[..., Any], spec: KernelSpec, sizes: dict[str, int]) -> tuple[Any, set[str]]:
    """Its result for the example, and the names of the arguments that it changed."""
    given = _example(spec, sizes)
    result = call(**given)
    fresh = _example(spec, sizes).items()
    return result, {name for name, value in fresh if not np.array_equal(value, given[name])}


def _arrays(name: str, value: Any) -> list[np.ndarray]:
    found = []
    for part in value if isinstance(value, tuple) else (value,):
        array = np.asarray(part)
        if array.dtype.kind not in "fiu":
            what = type(part).__name__ if array.dtype == object or not array.ndim else f"an array of {array.dtype}"
            raise TypeError(f"{name}: expected a result of real numbers, found {what}")
        found.append(array.astype(np.float64))
    return found


def _error(y: np.ndarray, r: np.ndarray) -> float:
    return float(np.sum((y - r) ** 2) / max(float(np.sum(r**2)), 1e-300))
