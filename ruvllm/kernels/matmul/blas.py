"""NumPy's BLAS behind gemm: used where a short measurement on this host found it clearly faster than our kernels.

That happens where BLAS reaches units that compiled loops cannot, as Accelerate does on Apple Silicon. The measurement
takes some tenths of a second. It is made with the first product that is large enough to repay it, once for each number
of threads, and kept with the compiled kernels, for this processor, its cores, this NumPy and its BLAS.
``ruvllm info --calibrate`` repeats it.
"""

import contextlib
import hashlib
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ruvllm.kernels.jit.cache import kernel_cache_directory
from ruvllm.kernels.jit.private.target import target
from ruvllm.kernels.threads.pool import physical_cores

BACKENDS = ("auto", "numba", "blas")
SIZES = (256, 1024)  # sizes of the square products that are measured; larger ones count as the last
_TURNS = 9  # turns of each side, alternating, so that a busy machine slows both
_TURN_SECONDS = 0.004  # a turn is at least two calls, of which the best counts: the first wakes threads
_PAUSE = 0.004  # seconds before a turn: idle threads of the other side stop spinning meanwhile
_ROUNDS = (0.0, 0.1, 0.2, 0.4)  # seconds to wait before more turns, as long as BLAS seems that much faster: our
# threads may share a core for a while, and take ten times as long
_FASTER = 1.5  # a large factor, because BLAS may round differently with other numbers of threads


class Speedup(NamedTuple):
    """The time of our kernels divided by that of BLAS: value at the best of each, between low and high.

    low: our best turn over the median of BLAS; high: our median over the best turn of BLAS.
    """

    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether half of the turns of BLAS are that much faster than our best."""
        return self.low > _FASTER


_first, _measuring = threading.Lock(), threading.Lock()
_speedups: dict[str, list[Speedup]] = {}  # for each of SIZES; by number of threads

Multiply = Callable[[np.ndarray, np.ndarray, np.ndarray], None]  # out = a b, by our kernels


def takes_blas(backend: str, macs: int, threads: int, multiply: Multiply) -> bool:
    """Whether a product of so many multiply-adds goes to BLAS. Raises ValueError for an unknown backend."""
    if backend == "numba" or (backend == "auto" and macs < SIZES[0] ** 3):
        return False
    if backend == "auto":
        found = speedups(threads) or _measure_once(threads, multiply)
        return found[0 if macs < SIZES[1] ** 3 else 1].clear
    if backend != "blas":
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
    return True


def blas_gemm(a: np.ndarray, b: np.ndarray, out: np.ndarray, threads: int) -> None:
    """out = a b in NumPy's BLAS, on so many threads if threadpoolctl is installed and knows that BLAS."""
    with _limited(threads):
        np.dot(a, b, out=out)


def speedups(threads: int) -> list[Speedup] | None:
    """What was measured before, for each of SIZES, or None."""
    key = str(threads)
    if key not in _speedups and (found := _kept().get(key)) is not None:
        _speedups[key] = found
    return _speedups.get(key)


def measure(threads: int, multiply: Multiply) -> list[Speedup]:
    """Measure on so many threads and keep the result; ``multiply`` uses as many."""
    with _measuring:
        rng = np.random.default_rng(0)
        found = []
        for n in SIZES:
            a, b = rng.standard_normal((2, n, n), np.float32)
            out = np.empty_like(a)
            ours, theirs = partial(multiply, a, b, out), partial(blas_gemm, a, b, out, threads)
            turns: list[tuple[float, float]] = []
            for seconds in _ROUNDS:
                time.sleep(seconds)
                turns += [(_best_seconds(ours), _best_seconds(theirs)) for _ in range(_TURNS)]
                if not _speedup(turns).clear:
                    break
            found.append(_speedup(turns))
        _speedups[str(threads)] = found
        _keep()
        return found


def _measure_once(threads: int, multiply: Multiply) -> list[Speedup]:
    with _first:
        return speedups(threads) or measure(threads, multiply)  # by another Python thread meanwhile


def _speedup(turns: list[tuple[float, float]]) -> Speedup:
    best, usual = np.min(turns, axis=0), np.median(turns, axis=0)
    return Speedup(float(best[0] / best[1]), float(best[0] / usual[1]), float(usual[0] / best[1]))


def _best_seconds(call: Callable[[], None]) -> float:
    time.sleep(_PAUSE)
    best, begun, calls = np.inf, time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - begun < _TURN_SECONDS:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
        calls += 1
    return best


def _keep() -> None:
    """Replace the file atomically; if that fails, the next process measures again."""
    path = _path()
    if path is None:
        return
    known = _kept() | _speedups  # other processes may have measured other numbers of threads
    with contextlib.suppress(OSError):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump(known, file)
        os.replace(temporary, path)


def _kept() -> dict[str, list[Speedup]]:
    """The valid entries of the file."""
    sound: dict[str, list[Speedup]] = {}
    path = _path()
    if path is not None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            for threads, found in json.loads(path.read_text()).items():
                with contextlib.suppress(ValueError, TypeError):
                    each = [Speedup(*map(float, numbers)) for numbers in found]
                    if len(each) == len(SIZES):
                        sound[threads] = each
    return sound


@cache
def _path() -> Path | None:
    """The file for this machine, this NumPy and its BLAS, in the private kernel cache."""
    directory = kernel_cache_directory()
    if directory is None:
        return None
    return directory / f"blas-{hashlib.sha256(_host().encode()).hexdigest()[:16]}.json"


def _host() -> str:
    """What the measurement depends on: if any of it changes, it is repeated."""
    compiled_for = tuple(target())
    cores = f"{physical_cores()} of {os.cpu_count()}"
    return f"{np.__version__} {blas_name()} {cpu_name()} {cores} {compiled_for}"


def cpu_name() -> str:
    """The processor's name as the system states it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def blas_name() -> str:
    """The BLAS that NumPy was built with, and its version: openblas, accelerate, mkl, ..."""
    config: Any = np.show_config(mode="dicts")
    blas = config.get("Build Dependencies", {}).get("blas", {})
    return " ".join(str(blas[key]) for key in ("name", "version") if blas.get(key)) or "unknown"


@cache
def _controller() -> Any:
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:  # kernels need numpy and numba alone
        return None
    return ThreadpoolController()


@contextlib.contextmanager
def _limited(threads: int) -> Iterator[None]:
    controller = _controller()
    if controller is None:
        yield
    else:
        with controller.limit(limits=threads, user_api="blas"):
            yield
