"""swap(rms_norm=mine): another implementation of a kernel, checked against the reference, then used by real models."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ruvllm.kernels import KERNELS, KernelSpec
from ruvllm.lab._calls import replaced
from ruvllm.lab._display import as_html, as_text, axis
from ruvllm.model.llama import Llama


@dataclass
class Swapped:
    """What stands in for a kernel: its error at each example size, and the calls and seconds so far."""

    name: str
    sizes: list[dict[str, int]] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    kernel_errors: list[float] = field(default_factory=list)
    calls: int = 0
    seconds: float = 0.0


@dataclass
class Swap:
    """The kernels that are swapped; print() it, or let a notebook show it."""

    kernels: dict[str, Swapped]

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

    def __str__(self) -> str:
        return as_text(self.heading(), self.rows())

    def _repr_html_(self) -> str:
        return as_html(self.heading(), self.rows())

    def plot(self, ax: Any = None) -> Any:
        """Errors of each kernel at its example sizes, beside the library's; returns the matplotlib axis."""
        ax = axis(ax)
        labels = [f"{name} {at}" for name, at, *_ in self.rows()[1:]]
        places = np.arange(len(labels))
        for shift, color, what in ((-0.2, "C1", "errors"), (0.2, "C0", "kernel_errors")):
            errors = [e for x in self.kernels.values() for e in getattr(x, what)]
            label = "swapped in" if what == "errors" else "the library's"
            ax.barh(places + shift, np.maximum(errors, 1e-20), 0.4, color=color, label=label)
        ax.set_yticks(places, labels)
        ax.set_xscale("log")
        ax.invert_yaxis()
        ax.set_xlabel("normalised mean squared error against float64")
        ax.legend(frameon=False)
        return ax


@contextmanager
def swap(tolerance: float | None = None, **functions: Callable[..., Any]) -> Iterator[Swap]:
    """Use other functions in place of kernels inside the block, everywhere in the library and in all threads.

    Each is first called on its kernel's example inputs and compared with the float64 reference. Models then walk their
    layers in Python (``model.fused`` reads False): of the kernels by name they call ``rms_norm``,
    ``apply_rope_tables`` and ``silu_mul``.

    Args:
        tolerance: the largest normalised mean squared error sum((y - r)^2) / sum(r^2); None: that of each kernel.
        functions: by the kernel's name. A function takes the kernel's arguments; one without ``out`` returns its
            result, which is copied to where the caller wants it.

    Yields:
        The errors, and the calls as they are made.

    Raises:
        ValueError: no kernel has this name, or a result is not that of the reference; nothing is swapped.
        TypeError: a value that cannot be called.
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
        stack.enter_context(replaced(lambda kernel: callers[id(kernel)], lambda value: id(value) in callers))
        stack.enter_context(readable_path())
        yield Swap(swapped)


@contextmanager
def readable_path() -> Iterator[None]:
    """All models walk their layers in Python inside the block; what ``fused`` is set to there holds after it."""

    class Never:
        def __get__(self, model: Any, owner: Any = None) -> bool:
            return False

        def __set__(self, model: Any, value: bool) -> None:
            model.__dict__["fused"] = value

    nested = "fused" in vars(Llama)
    if not nested:
        setattr(Llama, "fused", Never())  # noqa: B010  a class has it only here: an instance's own would come first
    try:
        yield
    finally:
        if not nested:
            delattr(Llama, "fused")


def _as_kernel(spec: KernelSpec, function: Callable[..., Any], record: Swapped) -> Callable[..., Any]:
    """The function with the kernel's way of being called: ``out`` is filled and returned."""
    parameters = inspect.signature(getattr(function, "py_func", function)).parameters
    takes_out = "out" in parameters
    has_out = "out" in inspect.signature(spec.function).parameters

    def call(*arguments: Any, **named: Any) -> Any:
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
    for sizes in spec.sizes:
        expected = _arrays(spec.reference(**_example(spec, sizes)))
        got = _arrays(call(**_example(spec, sizes)))
        usual = _arrays(spec.function(**_example(spec, sizes)))
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


def _arrays(value: Any) -> list[np.ndarray]:
    return [np.asarray(v, np.float64) for v in (value if isinstance(value, tuple) else (value,))]


def _error(y: np.ndarray, r: np.ndarray) -> float:
    return float(np.sum((y - r) ** 2) / max(float(np.sum(r**2)), 1e-300))
