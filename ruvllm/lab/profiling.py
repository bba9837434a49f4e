"""profile(llm, prompt): the time of a generation by operation, layer and thread, against the machine's limits."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ruvllm.brief import brief
from ruvllm.display import as_html, as_text, axis
from ruvllm.kernels import tape as t
from ruvllm.lab.loaded import require_loaded
from ruvllm.lab.work import work_of
from ruvllm.llm import LLM
from ruvllm.measure.peaks import Peaks, measured_peaks
from ruvllm.model.generate import generate
from ruvllm.model.kv_size import key_value_bytes
from ruvllm.model.llama import Llama
from ruvllm.model.ops.schedule import Step
from ruvllm.model.ops.tape import Tape
from ruvllm.model.replay import Working
from ruvllm.model.sampling.options import Sampling
from ruvllm.model.weights import INTEGER_LAYOUTS
from ruvllm.prompt import Prompt

WAIT = "wait at barrier"


@dataclass(frozen=True)
class Operation:
    """One row of the tape in one pass: what, in which layer (-1: before or after all), for how many tokens, its work.

    starts, ends: when each thread ran it; NaN for one that joined later. limit: the least seconds by the machine's
    limits, on all threads. ``wait at barrier`` is an operation too: there threads wait for the slowest.
    """

    name: str
    layer: int
    tokens: int
    step: int
    starts: tuple[float, ...]
    ends: tuple[float, ...]
    flops: float
    nbytes: float
    limit: float

    @property
    def start(self) -> float:
        """When thread 0 began."""
        return self.starts[0]

    @property
    def end(self) -> float:
        """When thread 0 was done."""
        return self.ends[0]

    @property
    def each(self) -> list[float]:
        """Seconds of each thread that took part."""
        return [b - a for a, b in zip(self.starts, self.ends, strict=True) if a == a]

    @property
    def seconds(self) -> float:
        """Mean of these threads."""
        return sum(self.each) / len(self.each)

    @property
    def excess(self) -> float:
        """Seconds that the slowest of them takes longer than the mean."""
        return max(self.each) - self.seconds


@dataclass(frozen=True)
class Profile:
    """A generation, operation by operation, as the parallel region ran it.

    steps: (start, end, tokens) of each forward pass. decode: tokens/s with time stamps; untimed: without.
    """

    operations: tuple[Operation, ...]
    steps: tuple[tuple[float, float, int], ...]
    threads: int
    decode: float
    untimed: float
    peaks: Peaks

    __repr__ = brief

    def heading(self) -> str:
        """One line: the speeds, with and without time stamps."""
        total = sum(end - start for start, end, _ in self.steps)
        return (
            f"{self.untimed:.1f} tokens/s on {self.threads} thread{'s' * (self.threads > 1)}, "
            f"{self.decode:.1f} with time stamps; {len(self.operations)} operations in {total:.3f} s"
        )

    def table(self, decode: bool = True, by: str = "name") -> list[tuple[str, ...]]:
        """Time and rates of each operation (``by="name"``) or layer (``by="layer"``); the first row has the headings.

        decode: passes of one token; False: passes of several. Times are means of the threads; imbalance: by how much
        the slowest thread of each call takes longer than that.
        """
        groups: dict[Any, list[Operation]] = defaultdict(list)
        for operation in self.operations:
            if (operation.tokens == 1) == decode:
                groups[getattr(operation, by)].append(operation)
        passes = sum(end - start for start, end, tokens in self.steps if (tokens == 1) == decode)  # seconds
        order = sorted(groups) if by == "layer" else sorted(groups, key=lambda n: -_seconds(groups[n]))
        found: list[tuple[str, ...]] = [(by, "calls", "ms", "share", "imbalance", "GB/s", "GFLOP/s", "of limit")]
        for key in order:
            x = groups[key]
            seconds = max(_seconds(x), 1e-12)
            label = str(key) if by == "name" else f"layer {key}" if key >= 0 else "before and after"
            found.append(
                (
                    label, str(len(x)), f"{seconds * 1e3:.2f}", f"{seconds / passes:.1%}",
                    "-" if key == WAIT else f"{sum(o.excess for o in x) / seconds:.0%}",
                    f"{sum(o.nbytes for o in x) / seconds / 1e9:.1f}", f"{sum(o.flops for o in x) / seconds / 1e9:.1f}",
                    f"{sum(o.limit for o in x) / seconds:.0%}",
                )
            )  # fmt: skip
        if passes:
            rest = passes - sum(_seconds(x) for x in groups.values())
            found.append(("between operations", "", f"{rest * 1e3:.2f}", f"{rest / passes:.1%}", "-", "-", "-", "-"))
        return found

    def by_thread(self, decode: bool = True) -> list[tuple[str, ...]]:
        """What each thread does with its time: it computes, waits at barriers, or is outside of operations."""
        chosen = [x for x in self.operations if (x.tokens == 1) == decode]
        passes = sum(end - start for start, end, tokens in self.steps if (tokens == 1) == decode)
        found: list[tuple[str, ...]] = [("thread", "computes, ms", "waits, ms", "waits", "else, ms")]
        for thread in range(self.threads if passes else 0):
            spent = {False: 0.0, True: 0.0}
            for x in chosen:
                if x.starts[thread] == x.starts[thread]:
                    spent[x.name == WAIT] += x.ends[thread] - x.starts[thread]
            computes, waits = spent[False], spent[True]
            cells = (f"{s * 1e3:.2f}" for s in (computes, waits, passes - computes - waits))
            first, second, rest = cells
            found.append((f"thread {thread}", first, second, f"{waits / passes:.1%}", rest))
        return found

    def rows(self) -> list[tuple[str, ...]]:
        """The table of decoding, by operation."""
        return self.table()

    def __str__(self) -> str:
        return "\n\n".join([self.heading(), *(as_text(title, rows) for title, rows in self._tables())])

    def _repr_html_(self) -> str:
        return as_html(self.heading(), ()) + "".join(as_html(title, rows) for title, rows in self._tables())

    def plot(self, ax: Any = None, step: int = -1, layer: int | None = None) -> Any:
        """The timeline of a forward pass: a lane for each operation, in it a line for each thread. Returns the axis.

        step: of ``steps``; -1: the last token. layer: this one alone; None: the whole pass.
        """
        ax = axis(ax)
        step = step % len(self.steps)
        start, end, tokens = self.steps[step]
        chosen = [x for x in self.operations if x.step == step and layer in (None, x.layer)]
        if not chosen:
            raise ValueError(f"layer: expected one of the model's, found {layer!r}")
        lanes = {name: lane for lane, name in enumerate(dict.fromkeys(x.name for x in chosen))}
        height = 0.8 / self.threads
        for thread in range(self.threads):
            bars: dict[int, list[tuple[float, float]]] = defaultdict(list)
            for x in chosen:
                if x.starts[thread] == x.starts[thread]:
                    begin, seconds = x.starts[thread] - start, x.ends[thread] - x.starts[thread]
                    bars[lanes[x.name]].append((begin * 1e3, seconds * 1e3))
            for lane, spans in bars.items():
                label = f"thread {thread}" if lane == min(bars) else None
                ax.broken_barh(spans, (lane - 0.4 + thread * height, height), facecolors=f"C{thread % 10}", label=label)
        ax.set_yticks(range(len(lanes)), list(lanes))
        ax.invert_yaxis()
        if layer is None:
            ax.set_xlim(0, (end - start) * 1e3)
        else:
            ax.margins(x=0.01)
        where = "" if layer is None else f", layer {layer}"
        ax.set_xlabel(f"ms of the pass of {tokens} token{'s' * (tokens > 1)}{where}")
        if self.threads > 1:
            ax.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
        return ax

    def _tables(self) -> list[tuple[str, list[tuple[str, ...]]]]:
        found = []
        for title, decode in (("prompt", False), ("decoding", True)):
            rows = self.table(decode)
            if len(rows) > 1:
                found.append((f"{title}, by operation", rows))
                found.append((f"{title}, by thread", self.by_thread(decode)))
        found.append(("decoding, by layer", self.table(by="layer")))
        return found


def profile(llm: LLM, prompt: Prompt, max_tokens: int = 16, peaks: Peaks | None = None) -> Profile:
    """Generate greedily and time each operation inside the parallel region, on each thread.

    The parallel region of every generation can read the processor's time stamp counter before and after each row of
    its tape: the same compiled code, which otherwise skips three reads a row. Products of integers are compared with
    the integer peak, others with the float32 peak, reads with the bandwidth of memory, or of the smallest cache that
    holds what an operation touches.

    Args:
        llm: a loaded model.
        prompt: as for ``LLM.generate``.
        max_tokens: how many tokens to generate, at least 2.
        peaks: limits; None measures those of this machine, once in a process (three seconds).

    Raises:
        ValueError: max_tokens < 2, or an empty prompt.
        TypeError: llm is a path or a name: load it first.
    """
    require_loaded(llm)
    if max_tokens < 2:
        raise ValueError(f"max_tokens: expected at least 2, found {max_tokens}")
    peaks = peaks or measured_peaks(llm.model.threads)
    ids = llm._ids(prompt)
    _tokens_per_second(llm.model, ids, 2)  # compiles and warms
    untimed = _tokens_per_second(llm.model, ids, max_tokens)
    timed, runner = copy.copy(llm.model), _Timed()  # shares the weights
    timed.fused, timed.runner = True, runner
    timed.weights_changed()
    _tokens_per_second(timed, ids, 2)  # records its tapes
    runner.runs.clear()
    decode = _tokens_per_second(timed, ids, max_tokens)
    reader = _Reader(llm.model, peaks)
    reader.read(runner.runs)
    return Profile(tuple(reader.operations), tuple(reader.passes), timed.threads, decode, untimed, peaks)


def _tokens_per_second(model: Llama, ids: np.ndarray, max_tokens: int) -> float:
    """Speed of the tokens after the first, past the end of the answer too."""
    tokens = generate(model, model.new_cache(len(ids) + max_tokens), ids, Sampling(), max_tokens)
    next(tokens)
    start = time.perf_counter()
    return sum(1 for _ in tokens) / (time.perf_counter() - start)


@dataclass
class _Run:
    """One entry of the region: rows from ``first`` on of a tape, and the time stamps of each thread."""

    tape: Tape
    first: int
    start: float
    stop: float
    header: np.ndarray
    positions: np.ndarray
    times: np.ndarray  # (threads, rows, 3) ticks: before the barrier, after it, after the operation


@dataclass
class _Timed:
    """A runner that lets the region take time stamps."""

    runs: list[_Run] = field(default_factory=list)

    def run(self, tape: Tape, working: Working) -> None:
        """See ``replay.Runner``."""
        header = working.header
        times = np.zeros((header[t.THREADS], header[t.END], 3), np.int64)  # no thread writes next to another
        header[t.TIMES] = times.ctypes.data
        start = time.perf_counter()
        t.replay.run(working.address, int(header[t.THREADS]))
        stop = time.perf_counter()
        header[t.TIMES] = 0
        positions = working.positions[: header[t.TOKENS]].copy()
        self.runs.append(_Run(tape, int(header[t.FIRST]), start, stop, header.copy(), positions, times))


class _Reader:
    """Turns time stamps into operations."""

    def __init__(self, model: Llama, peaks: Peaks) -> None:
        self.peaks, self.model_bytes = peaks, model.nbytes
        self.linears = model.linears()
        self.matrices: dict[Hashable, float] = {name: x.weights.nbytes for name, x in self.linears.items()}
        if model.adapters is not None:
            for name, x in model.adapters.matrices.items():
                self.matrices |= {(name, "down"): x.down.nbytes, (name, "up"): x.up.nbytes}
        self.key_value = key_value_bytes(model.config)
        self.operations: list[Operation] = []
        self.passes: list[tuple[float, float, int]] = []

    def read(self, runs: list[_Run]) -> None:
        """The operations of all runs, in order; a pass begins where a run begins with the tape's first row."""
        rate = _ticks_per_second(runs)
        for run in runs:
            tokens = int(run.header[t.TOKENS])
            if run.first == 0:
                self.passes.append((run.start, run.stop, tokens))
            self.passes[-1] = (self.passes[-1][0], run.stop, tokens)
            times = run.times[:, run.first :]
            seconds = (times - times[0, 0, 0]) / rate
            for i, step in enumerate(run.tape.steps[run.first : run.times.shape[1]]):
                before, begin, end = np.where(times[:, i, 2] > 0, seconds[:, i].T, np.nan)  # late threads have none yet
                if run.tape.rows[run.first + i, t.FLAGS] & t.MEET:
                    self._add(WAIT, step, run, (before, begin))
                if run.header[step.count]:
                    self._add_operation(step, run, (begin, end))

    def _add_operation(self, step: Step, run: _Run, times: tuple[np.ndarray, np.ndarray]) -> None:
        work = work_of(step, int(run.header[step.count]), run.positions, self.matrices, self.key_value)
        name, peak, source = step.label.rsplit(".", 1)[-1], self.peaks.fma, work.nbytes
        linear = self.linears.get(step.label)
        if linear is not None:
            # Between two uses of a matrix all others are read: it comes from the level that holds the whole model.
            source = float(self.model_bytes)
            peak = self.peaks.int8_dot if linear.layout in INTEGER_LAYOUTS else peak
            name = "head" if step.layer < 0 else name
        limit = max(work.flops / peak, work.nbytes / self.peaks.bandwidth(source))
        self._add(name, step, run, times, (work.flops, work.nbytes, limit))

    def _add(
        self, name: str, step: Step, run: _Run, times: tuple[np.ndarray, np.ndarray],
        costs: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ) -> None:  # fmt: skip
        """An operation, or the wait before it. times: begins and ends by thread; costs: flops, bytes, least seconds."""
        begin, end = (tuple((run.start + at).tolist()) for at in times)
        tokens = int(run.header[t.TOKENS])
        self.operations.append(Operation(name, step.layer, tokens, len(self.passes) - 1, begin, end, *costs))


def _ticks_per_second(runs: list[_Run]) -> float:
    """Rate of the time stamps, from the first and the last run: each began a moment after its Python call."""
    (first, *_, last) = runs
    ticks = int(last.times[0, last.first, 0]) - int(first.times[0, first.first, 0])
    if ticks <= 0:
        raise RuntimeError("this processor has no time stamp counter that programs may read")
    return ticks / (last.start - first.start)


def _seconds(operations: list[Operation]) -> float:
    return sum(x.seconds for x in operations)
