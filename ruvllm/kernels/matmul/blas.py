"""NumPy's BLAS behind gemm: taken where a short measurement on this host has found it faster than the kernels here.

That is where BLAS reaches units that no compiled loop can, as Accelerate does on Apple Silicon. The measurement, some
tenths of a second, is made when the first product is large enough to repay it, once for each number of threads; it is
kept beside the compiled kernels.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numba.core.registry import cpu_target

from ruvllm.kernels.jit.cache import kernel_cache_directory

BACKENDS = ("auto", "numba", "blas")
SIZES = (256, 1024)  # of the square products that are measured; larger ones are as the last of them
_TURNS = 5
_SECONDS = 0.03  # that each is called again and again: at first its threads may share a core
_ROUNDS = 5  # if BLAS seems so much faster: threads that share a core take a hundred times as long, but not for ever
_FASTER = 1.5  # so much that no disturbance of the measurement decides: BLAS may round differently by its threads

_measuring = threading.Lock()
_speedups: dict[str, list[float]] = {}  # of BLAS over the kernels, for each of SIZES; by number of threads

Multiply = Callable[[np.ndarray, np.ndarray, np.ndarray], None]  # out = a b, in these kernels


def takes_blas(backend: str, macs: int, threads: int, multiply: Multiply) -> bool:
    """Whether a product of so many multiply-adds goes to BLAS.

    Raises ValueError for a backend that there is not.
    """
    if backend == "numba" or (backend == "auto" and macs < SIZES[0] ** 3):
        return False
    if backend == "auto":
        found = speedups(threads) or _measure(threads, multiply)
        return found[0 if macs < SIZES[1] ** 3 else 1] > _FASTER
    if backend != "blas":
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
    return True


def blas_gemm(a: np.ndarray, b: np.ndarray, out: np.ndarray, threads: int) -> None:
    """out = a b in NumPy's BLAS, on so many threads where threadpoolctl is there and knows that BLAS."""
    with _limited(threads):
        np.dot(a, b, out=out)


def speedups(threads: int) -> list[float] | None:
    """Speed of BLAS over that of the kernels for each of SIZES, as measured before, or None."""
    key = str(threads)
    if key not in _speedups:
        path = _path()
        if path is not None:
            with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
                found = json.loads(path.read_text()).get(key)
                if len(found) == len(SIZES):
                    _speedups[key] = [float(value) for value in found]
    return _speedups.get(key)


def _measure(threads: int, multiply: Multiply) -> list[float]:
    with _measuring:
        known = speedups(threads)  # of another Python thread, which was here before
        if known is not None:
            return known
        rng = np.random.default_rng(0)
        found = []
        for n in SIZES:
            a, b = rng.standard_normal((2, n, n), np.float32)
            out = np.empty_like(a)
            ours = theirs = np.inf
            for _ in range(_ROUNDS):
                ours = min(ours, _best_seconds(partial(multiply, a, b, out)))
                theirs = min(theirs, _best_seconds(partial(_blas_on, threads, a, b, out)))
                if ours <= theirs * _FASTER:
                    break
            found.append(ours / theirs)
        _speedups[str(threads)] = found
        _keep()
        return found


def _blas_on(threads: int, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    blas_gemm(a, b, out, threads)


def _best_seconds(call: Callable[[], None]) -> float:
    best, begun = np.inf, time.perf_counter()
    turns = 0
    while turns < _TURNS or time.perf_counter() - begun < _SECONDS:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
        turns += 1
    return best


def _keep() -> None:
    """Write what is known to the file, whole or not at all; where that fails, the next process measures again."""
    path = _path()
    if path is None:
        return
    with contextlib.suppress(OSError):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump(_speedups, file)
        os.replace(temporary, path)


@cache
def _path() -> Path | None:
    """The file for this NumPy, its BLAS and this CPU, in the private directory of compiled kernels."""
    directory = kernel_cache_directory()
    if directory is None:
        return None
    host = f"{np.__version__} {blas_name()} {cpu_target.target_context.codegen().magic_tuple()}"
    return directory / f"blas-{hashlib.sha256(host.encode()).hexdigest()[:16]}.json"


def blas_name() -> str:
    """What NumPy was built with: openblas, accelerate, mkl, ..."""
    config: Any = np.show_config(mode="dicts")
    return str(config.get("Build Dependencies", {}).get("blas", {}).get("name", "unknown"))


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
