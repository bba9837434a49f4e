"""Every kernel by its record: the time of a call at each size, the error, and how long a first call compiles."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import numpy as np

from ruvllm.kernels import KERNELS, KernelSpec

_FIRST_CALL = (
    "import sys, time, numpy as np\n"
    "from ruvllm.kernels import KERNELS\n"
    "spec = KERNELS[sys.argv[1]]\n"
    "inputs = spec.example(np.random.default_rng(0), **spec.sizes[0])\n"
    "start = time.perf_counter()\n"
    "spec.function(**inputs)\n"
    "print(time.perf_counter() - start)\n"
)


class Kernel:
    """At the first size of its record. A commit without the kernel skips it."""

    version = "1"
    timeout = 300
    params = (sorted(KERNELS),)
    param_names = ("kernel",)

    def setup(self, kernel: str) -> None:
        if kernel not in KERNELS:
            raise NotImplementedError

    def track_error(self, kernel: str) -> float:
        """sqrt(sum((y - r)^2) / sum(r^2)) against the reference."""
        spec = KERNELS[kernel]
        inputs = spec.example(np.random.default_rng(0), **spec.sizes[0])
        exact = spec.reference(**inputs)
        found = spec.function(**inputs)
        pairs = zip(*((r if isinstance(r, tuple) else (r,)) for r in (found, exact)), strict=True)
        squares = [(np.sum((y - r) ** 2, dtype=np.float64), np.sum(np.square(r))) for y, r in pairs if r is not None]
        return float(np.sqrt(sum(d for d, _ in squares) / sum(r for _, r in squares)))

    track_error.unit = "relative error"  # type: ignore[attr-defined]

    def track_first_call(self, kernel: str) -> float:
        """Seconds of the first call in a process of its own, with an empty cache."""
        with tempfile.TemporaryDirectory() as directory:
            environment = {**os.environ, "RUVLLM_CACHE": directory}
            command = [sys.executable, "-c", _FIRST_CALL, kernel]
            said = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
            return float(said.stdout)

    track_first_call.unit = "s"  # type: ignore[attr-defined]


def _timed(spec: KernelSpec, sizes: dict[str, int]) -> Callable[[], None]:
    """A benchmark of one call at one size, its output allocated beforehand."""
    call: list[Callable[[], Any]] = []

    def setup() -> None:
        inputs = spec.example(np.random.default_rng(0), **sizes)
        result = spec.function(**inputs)
        if "out" in signature(spec.function).parameters and "out" not in inputs:
            inputs["out"] = result
        call[:] = [partial(spec.function, **inputs)]

    def benchmark() -> None:
        call[0]()

    benchmark.__name__ = "_".join([f"time_{spec.name}", *(f"{axis}{n}" for axis, n in sizes.items())])
    vars(benchmark).update(setup=setup, timeout=120, version="1")
    return benchmark


# A function for each size, not a parameter: asv matches parameters of two commits by position, functions by name.
globals().update({made.__name__: made for spec in KERNELS.values() for made in (_timed(spec, s) for s in spec.sizes)})
