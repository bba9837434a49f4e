"""roofline(): kernels under the limits of this machine: arithmetic against bytes, at measured speeds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ruvllm.brief import brief
from ruvllm.display import Table, axis
from ruvllm.kernels import KERNELS
from ruvllm.kernels.threads.pool import limited_to
from ruvllm.lab.labelling import label_points
from ruvllm.measure.peaks import Peaks, measured_peaks
from ruvllm.measure.timing import Effort, median_seconds
from ruvllm.model.activations import Activations
from ruvllm.model.linear import Linear
from ruvllm.model.random_weights import RandomTensor
from ruvllm.model.weights import INTEGER_LAYOUTS

_EFFORT = Effort(turns=9, seconds=1e-3, longest=0.05)


@dataclass(frozen=True)
class Point:
    """A kernel at one size: its work, compulsory bytes, and median seconds; integer: its work is on int8."""

    name: str
    sizes: str
    flops: float
    nbytes: float
    seconds: float
    integer: bool

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.nbytes

    def limit(self, peaks: Peaks) -> float:
        """Least seconds: of its arithmetic, or of reading its bytes from the cache that holds them."""
        return peaks.least_seconds(self.flops, self.nbytes, self.integer)[0]


@dataclass(frozen=True)
class Roofline(Table):
    """Kernels against the limits of ``peaks.threads`` threads."""

    peaks: Peaks
    points: tuple[Point, ...]

    __repr__ = brief

    def heading(self) -> str:
        """One line: on how many threads."""
        return f"{len(self.points)} kernels on {self.peaks.threads} thread{'s' * (self.peaks.threads > 1)}"

    def rows(self) -> list[tuple[str, ...]]:
        """A table of the kernels, as text; the first row has the headings."""
        found: list[tuple[str, ...]] = [
            ("kernel", "sizes", "us", "op per byte", "Gop/s", "GB/s", "of limit", "limited by")
        ]
        for x in self.points:
            least, bound = self.peaks.least_seconds(x.flops, x.nbytes, x.integer)
            found.append(
                (
                    x.name, x.sizes, f"{x.seconds * 1e6:.1f}", f"{x.intensity:.2f}", f"{x.flops / x.seconds / 1e9:.1f}",
                    f"{x.nbytes / x.seconds / 1e9:.1f}", f"{least / x.seconds:.0%}",
                    "arithmetic" if bound in ("FMA", "int8 dot") else "bytes",
                )
            )  # fmt: skip
        return found

    def plot(self, ax: Any = None) -> Any:
        """Roofs of each level of memory and of arithmetic, kernels as points; returns the matplotlib axis."""
        fresh, ax = ax is None, axis(ax)
        if fresh:
            ax.figure.set_size_inches(8 + 0.05 * len(self.points), 5 + 0.05 * len(self.points))
        low = min((x.intensity for x in self.points), default=0.1) / 2
        high = max([10 * self.peaks.int8_dot / self.peaks.memory, *(2 * x.intensity for x in self.points)])
        along = np.geomspace(low, high, 200)
        for i, level in enumerate(self.peaks.levels):
            ax.plot(
                along, np.minimum(along * level.bandwidth, self.peaks.int8_dot) / 1e9, color=f"C{i}", lw=1,
                label=f"read, {level.name}: {level.bandwidth / 1e9:.0f} GB/s",
            )  # fmt: skip
        for value, name in ((self.peaks.fma, "float32 multiply-add"), (self.peaks.int8_dot, "int8 dot product")):
            ax.axhline(value / 1e9, color="0.4", lw=1, ls="--")
            ax.annotate(f"{name}: {value / 1e9:.0f}", (high, value / 1e9), ha="right", va="bottom", fontsize=8)
        for x in self.points:
            ax.plot(x.intensity, x.flops / x.seconds / 1e9, "s" if x.integer else "o", color="k", ms=4)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("operations per byte")
        ax.set_ylabel("Gop/s")
        ax.set_title(self.heading())
        ax.legend(frameon=False, fontsize=8, loc="lower right")
        places = [(x.intensity, x.flops / x.seconds / 1e9) for x in self.points]
        label_points(ax, places, [x.name for x in self.points])
        return ax


def roofline(*kernels: str, threads: int = 1, peaks: Peaks | None = None) -> Roofline:
    """Measure kernels at their largest example size, and matrices of models as "linear int4".

    Args:
        kernels: names in KERNELS, "linear f32", "linear int8", "linear int4" (2048 x 2048; one token, and 96); none
            for all.
        threads: how many threads a kernel may use.
        peaks: limits at this number of threads; None measures them, once in a process (three seconds).

    Raises:
        ValueError: no kernel has this name, or ``threads`` are more than the pool has.
    """
    linears = [f"linear {layout}" for layout in ("f32", "int8", "int4")]
    for name in kernels:
        if name not in KERNELS and name not in linears:
            raise ValueError(f"no kernel {name!r}: expected some of {', '.join([*sorted(KERNELS), *linears])}")
    peaks = peaks or measured_peaks(threads)
    points: list[Point] = []
    with limited_to(threads):
        for name in kernels or [*KERNELS, *linears]:
            points.extend(_linear(name.split()[1]) if name in linears else [_kernel(name)])
    return Roofline(peaks, tuple(points))


def _kernel(name: str) -> Point:
    spec = KERNELS[name]
    sizes = max(spec.examples, key=lambda s: spec.flops(**s))
    arguments = spec.example(np.random.default_rng(0), **sizes)
    seconds = median_seconds(lambda: spec.function(**arguments), _EFFORT)
    text = ", ".join(f"{axis} {n}" for axis, n in sizes.items())
    return Point(name, text, spec.flops(**sizes), spec.bytes(**sizes), seconds, False)


def _linear(layout: str) -> Iterable[Point]:
    n = 2048
    linear = Linear.load(RandomTensor("linear", (n, n), 0), layout)
    for tokens in (1, 96):
        x = Activations(tokens, n).of(np.random.default_rng(0).standard_normal((tokens, n), np.float32))
        out = np.empty((tokens, n), np.float32)
        seconds = median_seconds(partial(linear, x, out), _EFFORT)
        nbytes = linear.nbytes + 8.0 * tokens * n
        yield Point(
            f"linear {layout} x{tokens}", f"tokens {tokens}, {n} x {n}", 2.0 * tokens * n * n, nbytes, seconds,
            layout in INTEGER_LAYOUTS,
        )  # fmt: skip
