"""Rows that time one kernel call: its error, and the times of the call, of the body alone and of the peers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ruvllm.kernels import KERNELS, KernelSpec
from ruvllm.measure.inside import Inside
from ruvllm.measure.peers import Inputs, KernelPeer, PeerError, own_copies, relative_error
from ruvllm.measure.timing import Call, Engine, Timing, alternate
from ruvllm.report.bench import OWN, Bench
from ruvllm.report.results import Result
from ruvllm.report.rows import KernelRow

_INSIDE_BELOW = 1e-3  # seconds per call: in longer ones Python's overhead does not show
_ALLOCATES = ("lora_forward",)  # the Rust report's row allocates its output too
LARGE = 5e9  # operations: from here on float64 takes minutes

# Which function is timed, and its arguments by position, for a kernel's record and its example inputs.
Form = Callable[[KernelSpec, Inputs], tuple[KernelSpec, tuple[Any, ...]]]


def public(spec: KernelSpec, inputs: Inputs) -> tuple[KernelSpec, tuple[Any, ...]]:
    """The public function, with ``out`` where it has one: a call allocates nothing."""
    signature = inspect.signature(spec.function)
    if "out" in signature.parameters and "out" not in inputs and spec.name not in _ALLOCATES:
        inputs = inputs | {"out": spec.function(**inputs)}
    bound = signature.bind(**inputs)
    bound.apply_defaults()
    return spec, bound.args


def measure_kernel(row: KernelRow, bench: Bench, peers: Sequence[KernelPeer], form: Form = public) -> Result:
    """Measure a row. The peers of a large one are compared with the kernel's own result; it has no error."""
    spec = KERNELS[row.kernel]
    inputs = spec.example(np.random.default_rng(0), **row.sizes)
    flops, nbytes = spec.flops(**row.sizes), spec.bytes(**row.sizes)
    timed, arguments = form(spec, own_copies(inputs))
    small = flops < LARGE
    exact = spec.reference(**inputs) if small else spec.function(**own_copies(inputs))
    error = None
    if small:
        _, fresh = form(spec, own_copies(inputs))
        error = relative_error(timed.function(*fresh), exact)
    entries, missing = [], {}
    for threads in bench.peaks:
        with bench.limited(threads):
            engines: dict[str, Engine] = {OWN: Call(partial(timed.function, *arguments))}
            for peer in peers:
                try:
                    engines[peer.name] = peer.engine(spec, inputs, exact, threads)
                except PeerError as why:
                    missing[peer.name] = str(why)
            inside = _inside(timed, arguments, bench) if threads == 1 else None
            entries.append(bench.entry(threads, engines, flops, nbytes, inside=inside))
    return Result(row.id, row.label, row.rust_m4, flops, nbytes, error, spec.tolerance**0.5, tuple(entries), missing)


def _inside(spec: KernelSpec, arguments: tuple[Any, ...], bench: Bench) -> Timing | None:
    """The time of the body alone, if the call is short and makes one compiled call."""
    if Call(partial(spec.function, *arguments)).seconds(1) > _INSIDE_BELOW:
        return None
    try:
        return alternate({OWN: Inside(spec, arguments)}, bench.effort)[OWN]
    except LookupError:
        return None
