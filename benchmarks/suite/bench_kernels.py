"""Every kernel by its record: how far it is from float64, and how long a first call compiles."""

import os
import subprocess
import sys
import tempfile

import numpy as np

from ruvllm.kernels import KERNELS

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
    """On the first of the sizes that its record names. A commit that has no such kernel skips it."""

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
