"""Rows that are one call of a public kernel: its error, its time, that of its body alone, and of its peers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from ruvllm.kernels import KERNELS, KernelSpec
from ruvllm.report.bench import OWN, Bench
from ruvllm.report.inside import Inside
from ruvllm.report.peers import Inputs, KernelPeer, PeerError, own_copies, relative_error
from ruvllm.report.results import Result
from ruvllm.report.rows import KernelRow
from ruvllm.report.timing import Call, Engine, Timing, alternate

_INSIDE_BELOW = 1e-4  # seconds of a call: in longer ones Python's part does not show
_ALLOCATES = ("lora_forward",)  # the seed's row allocates its output too


def measure_kernel(row: KernelRow, bench: Bench, peers: Sequence[KernelPeer]) -> Result:
    """Measure a row."""
    spec = KERNELS[row.kernel]
    inputs = spec.example(np.random.default_rng(0), **row.sizes)
    exact = spec.reference(**inputs)
    flops, nbytes = spec.flops(**row.sizes), spec.bytes(**row.sizes)
    error = relative_error(spec.function(**own_copies(inputs)), exact)
    arguments = _arguments(spec, own_copies(inputs))
    entries, missing = [], {}
    for threads in bench.peaks:
        with bench.limited(threads):
            engines: dict[str, Engine] = {OWN: Call(partial(spec.function, *arguments))}
            for peer in peers:
                try:
                    engines[peer.name] = peer.engine(spec, inputs, exact, threads)
                except PeerError as why:
                    missing[peer.name] = str(why)
            inside = _inside(spec, arguments, bench) if threads == 1 else None
            entries.append(bench.entry(threads, engines, flops, nbytes, inside=inside))
    return Result(row.id, row.label, row.seed, flops, nbytes, error, spec.tolerance**0.5, tuple(entries), missing)


def _arguments(spec: KernelSpec, inputs: Inputs) -> tuple[Any, ...]:
    """The arguments by position, with ``out`` where the function takes one: nothing is allocated in a call."""
    signature = inspect.signature(spec.function)
    if "out" in signature.parameters and "out" not in inputs and spec.name not in _ALLOCATES:
        inputs = inputs | {"out": spec.function(**inputs)}
    bound = signature.bind(**inputs)
    bound.apply_defaults()
    return bound.args


def _inside(spec: KernelSpec, arguments: tuple[Any, ...], bench: Bench) -> Timing | None:
    """The time of the body alone, if the call is short and is one of a compiled function."""
    if Call(partial(spec.function, *arguments)).seconds(1) > _INSIDE_BELOW:
        return None
    try:
        return alternate({OWN: Inside(spec, arguments)}, bench.effort)[OWN]
    except LookupError:
        return None
