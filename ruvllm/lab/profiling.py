"""profile(llm, prompt): where the time of a real generation goes, by operation and by layer, beside the limits."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np

import ruvllm.kernels as K
from ruvllm.lab._display import as_html, as_text, axis
from ruvllm.lab.peaks import Peaks, measured_peaks
from ruvllm.lab.swapping import readable_path
from ruvllm.llm import LLM, Prompt
from ruvllm.model import layer as layer_module
from ruvllm.model.activations import Activations
from ruvllm.model.generate import Sampling, generate
from ruvllm.model.layer import TransformerLayer
from ruvllm.model.linear import Linear
from ruvllm.model.llama import Llama
from ruvllm.model.weights import INTEGER_LAYOUTS


@dataclass(frozen=True)
class Operation:
    """One call: what, in which layer (-1: before or after all), for how many tokens, from when to when, its work.

    limit: the seconds that the machine's limits ask for it at least.
    """

    name: str
    layer: int
    tokens: int
    step: int
    start: float
    end: float
    flops: float
    nbytes: float
    limit: float


@dataclass(frozen=True)
class Profile:
    """A generation on the readable path, operation by operation.

    steps: (start, end, tokens) of each forward pass. overhead: seconds that the profile itself added, as measured on
    empty operations. decode: tokens/s of the readable path under the profile. fused: tokens/s of the same generation
    on the fused path, without a profile.
    """

    operations: tuple[Operation, ...]
    steps: tuple[tuple[float, float, int], ...]
    overhead: float
    decode: float
    fused: float
    peaks: Peaks

    def heading(self) -> str:
        """One line: the speeds, and what measuring cost."""
        total = sum(end - start for start, end, _ in self.steps)
        return (
            f"readable path under the profile: {self.decode:.1f} tokens/s; fused path, without: {self.fused:.1f}; "
            f"{len(self.operations)} operations in {total:.3f} s, the profile itself {self.overhead / total:.1%} of it"
        )

    def table(self, decode: bool = True, by: str = "name") -> list[tuple[str, ...]]:
        """Time and rates of each operation (``by="name"``) or layer (``by="layer"``); the first row has the headings.

        decode: of the passes of one token; False: of those of several.
        """
        groups: dict[Any, list[Operation]] = defaultdict(list)
        for operation in self.operations:
            if (operation.tokens == 1) == decode:
                groups[getattr(operation, by)].append(operation)
        passes = sum(end - start for start, end, tokens in self.steps if (tokens == 1) == decode)
        order = sorted(groups) if by == "layer" else sorted(groups, key=lambda n: -_seconds(groups[n]))
        found: list[tuple[str, ...]] = [(by, "calls", "ms", "share", "GB/s", "GFLOP/s", "of limit")]
        for key in order:
            x = groups[key]
            seconds = _seconds(x)
            label = str(key) if by == "name" else f"layer {key}" if key >= 0 else "before and after"
            found.append(
                (
                    label, str(len(x)), f"{seconds * 1e3:.2f}", f"{seconds / passes:.1%}",
                    f"{sum(o.nbytes for o in x) / seconds / 1e9:.1f}", f"{sum(o.flops for o in x) / seconds / 1e9:.1f}",
                    f"{sum(o.limit for o in x) / seconds:.0%}",
                )
            )  # fmt: skip
        if passes:
            rest = passes - sum(_seconds(x) for x in groups.values())
            found.append(("Python between them", "", f"{rest * 1e3:.2f}", f"{rest / passes:.1%}", "-", "-", "-"))
        return found

    def rows(self) -> list[tuple[str, ...]]:
        """The table of decoding, by operation."""
        return self.table()

    def __str__(self) -> str:
        return "\n\n".join([self.heading(), *(as_text(title, rows) for title, rows in self._tables())])

    def _repr_html_(self) -> str:
        return as_html(self.heading(), ()) + "".join(as_html(title, rows) for title, rows in self._tables())

    def plot(self, ax: Any = None, step: int = -1) -> Any:
        """The timeline of one forward pass (-1: the last token): a lane for each operation. Returns the axis."""
        ax = axis(ax)
        step = step % len(self.steps)
        start, end, tokens = self.steps[step]
        chosen = [x for x in self.operations if x.step == step]
        lanes = [name for name, _ in Counter({x.name: 1 for x in chosen}).items()]
        for lane, name in enumerate(lanes):
            bars = [((x.start - start) * 1e3, (x.end - x.start) * 1e3) for x in chosen if x.name == name]
            ax.broken_barh(bars, (lane - 0.4, 0.8), facecolors=f"C{lane % 10}")
        ax.set_yticks(range(len(lanes)), lanes)
        ax.invert_yaxis()
        ax.set_xlim(0, (end - start) * 1e3)
        ax.set_xlabel(f"ms of the pass of {tokens} token{'s' * (tokens > 1)}")
        return ax

    def _tables(self) -> list[tuple[str, list[tuple[str, ...]]]]:
        found = []
        for title, decode in (("prompt", False), ("decoding", True)):
            rows = self.table(decode)
            if len(rows) > 1:
                found.append((f"{title}, by operation", rows))
        found.append(("decoding, by layer", self.table(by="layer")))
        return found


def profile(llm: LLM, prompt: Prompt, max_tokens: int = 16, peaks: Peaks | None = None) -> Profile:
    """Generate greedily on the readable path and time each operation.

    The fused path is one compiled call, which nothing can look into; the readable path computes the same bits with the
    same kernels. Nothing is patched outside of this call, so a profile that is not taken costs nothing. Products of
    integers are compared with the integer peak, others with the float32 peak, reads with the bandwidth of memory, or
    of the smallest cache that holds what an operation touches.

    Args:
        llm: a loaded model.
        prompt: as for ``LLM.generate``.
        max_tokens: how many tokens to generate, at least 2.
        peaks: limits; None measures those of this machine, once in a process (three seconds).

    Raises:
        ValueError: max_tokens < 2, or an empty prompt.
    """
    if max_tokens < 2:
        raise ValueError(f"max_tokens: expected at least 2, found {max_tokens}")
    peaks = peaks or measured_peaks(llm.model.threads)
    ids = llm._ids(prompt)
    for fused in (True, False):  # compiles and warms
        with readable_path() if not fused else ExitStack():
            _tokens_per_second(llm, ids, 2)
    fused_speed = _tokens_per_second(llm, ids, max_tokens)
    recorder = _Recorder(llm, peaks)
    with readable_path(), recorder.installed():
        speed = _tokens_per_second(llm, ids, max_tokens)
    overhead = len(recorder.operations) * _cost_of_recording(llm, peaks)
    return Profile(tuple(recorder.operations), tuple(recorder.steps), overhead, speed, fused_speed, peaks)


def _tokens_per_second(llm: LLM, ids: np.ndarray, max_tokens: int) -> float:
    """Speed of the tokens after the first, whether or not the model would have ended."""
    tokens = generate(llm.model, llm.new_cache(len(ids) + max_tokens), ids, Sampling(), max_tokens)
    next(tokens)
    start = time.perf_counter()
    return sum(1 for _ in tokens) / (time.perf_counter() - start)


class _Recorder:
    """Wraps the operations of the readable path; work and bytes follow from their arguments."""

    def __init__(self, llm: LLM, peaks: Peaks) -> None:
        self.operations: list[Operation] = []
        self.steps: list[tuple[float, float, int]] = []
        self.peaks = peaks
        self.layer, self.tokens = -1, 0
        self.names = {id(x): name.rsplit(".", 1)[-1] for name, x in llm.model.linears().items()}
        self.names[id(llm.model.head)] = "head"
        self.model_bytes = llm.model.nbytes

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Operations are timed inside the block."""
        with ExitStack() as stack:
            for owner, attribute, wrap in (
                (K, "rms_norm", self._plain("rms_norm", lambda x, weight, *_: (4.0 * x.size, 8.0 * x.size))),
                (K, "apply_rope_tables", self._plain("rope", lambda x, *_: (3.0 * x.size, 8.0 * x.size))),
                (K, "silu_mul", self._plain("silu_mul", lambda gate, *_: (5.0 * gate.size, 12.0 * gate.size))),
                (layer_module, "append", self._plain("kv_append", lambda k, *_: (0.0, 16.0 * k.size))),
                (layer_module, "cached_attention", self._plain("attention", _attention_work)),
                (Activations, "rounded", self._rounding),
                (Linear, "__call__", self._linear),
                (TransformerLayer, "__call__", self._in_layer),
                (Llama, "_walk", self._step),
            ):
                stack.enter_context(patch.object(owner, attribute, wrap(getattr(owner, attribute))))
            yield

    def _plain(self, name: str, work: Callable[..., tuple[float, float]]) -> Callable[..., Any]:
        def wrap(function: Any) -> Any:
            def timed(*arguments: Any, **named: Any) -> Any:
                start = time.perf_counter()
                result = function(*arguments, **named)
                end = time.perf_counter()
                flops, nbytes = work(*arguments)
                self._record(name, start, end, flops, nbytes, self.peaks.fma, nbytes)
                return result

            return timed

        return wrap

    def _rounding(self, function: Any) -> Any:
        def timed(activations: Any) -> Any:
            if activations._rounded is not None:
                return function(activations)
            start = time.perf_counter()
            result = function(activations)
            x = activations.x
            end = time.perf_counter()
            self._record("round to 8 bits", start, end, 4.0 * x.size, 5.0 * x.size, self.peaks.fma, x.nbytes)
            return result

        return timed

    def _linear(self, function: Any) -> Any:
        def timed(linear: Any, x: Any, out: Any = None) -> Any:
            integer = linear.layout in INTEGER_LAYOUTS
            if integer and isinstance(x, Activations):
                x.rounded()  # an operation of its own
            start = time.perf_counter()
            result = function(linear, x, out)
            end = time.perf_counter()
            tokens = len(result)
            nbytes = linear.nbytes + 4.0 * tokens * (linear.rows + linear.columns)
            peak = self.peaks.int8_dot if integer else self.peaks.fma
            # Between two uses of a matrix all others are read: it comes from where the whole model fits.
            self._record(
                self.names.get(id(linear), "linear"), start, end, 2.0 * tokens * linear.rows * linear.columns,
                nbytes, peak, self.model_bytes,
            )  # fmt: skip
            return result

        return timed

    def _in_layer(self, function: Any) -> Any:
        def entered(layer: Any, step: Any, cache: Any, i: int) -> None:
            self.layer = i
            function(layer, step, cache, i)
            self.layer = -1

        return entered

    def _step(self, function: Any) -> Any:
        def timed(model: Any, ids: Any, *arguments: Any) -> None:
            self.tokens = len(ids)
            start = time.perf_counter()
            function(model, ids, *arguments)
            self.steps.append((start, time.perf_counter(), len(ids)))

        return timed

    def _record(
        self, name: str, start: float, end: float, flops: float, nbytes: float, peak: float, held: float
    ) -> None:
        limit = max(flops / peak, nbytes / self.peaks.bandwidth(held))
        self.operations.append(
            Operation(name, self.layer, self.tokens, len(self.steps), start, end, flops, nbytes, limit)
        )


def _attention_work(q: Any, keys: Any, values: Any, positions: Any, window: Any, *_: Any) -> tuple[float, float]:
    """Products of q with each visible position, twice; keys and values read once."""
    visible = np.minimum(positions + 1, window or np.inf)
    kv_heads = keys.shape[0]
    nbytes = 2.0 * visible.max() * kv_heads * q.shape[2] * keys.itemsize
    return 4.0 * q.shape[1] * q.shape[2] * float(visible.sum()), float(nbytes) + 8.0 * q.size


def _seconds(operations: list[Operation]) -> float:
    return sum(x.end - x.start for x in operations)


def _cost_of_recording(llm: LLM, peaks: Peaks) -> float:
    """Seconds that timing and recording one operation take."""
    timed = _Recorder(llm, peaks)._plain("nothing", lambda x: (0.0, 0.0))(lambda x: x)
    nothing = np.empty(1)
    start = time.perf_counter()
    for _ in range(1000):
        timed(nothing)
    return (time.perf_counter() - start) / 1000
