"""The peers of a kernel: NumPy in this process, PyTorch in one of its own, on the same arrays."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ruvllm.kernels import KernelSpec
from ruvllm.measure.numpy_peer import OPERATIONS
from ruvllm.measure.timing import Call, Engine
from ruvllm.measure.workers import Worker

SAME = 1e-2  # largest relative error of the same computation: float32 angles of PyTorch's RoPE are off by 1e-5
_ADDED_TO = ("out", "grad_a", "grad_b")  # arguments that a call changes: each engine gets its own

Inputs = dict[str, Any]


class PeerError(Exception):
    """Why a peer has no figure."""


def relative_error(found: Any, exact: Any) -> float:
    """sqrt(sum((y - r)^2) / sum(r^2)) over all results of a kernel; ``exact`` is in float64."""
    founds, exacts = (r if isinstance(r, tuple) else (r,) for r in (found, exact))
    differences = sum(float(np.sum((np.asarray(y, np.float64) - r) ** 2)) for y, r in zip(founds, exacts, strict=True))
    return float(np.sqrt(differences / sum(float(np.sum(np.square(r))) for r in exacts)))


def own_copies(inputs: Inputs) -> Inputs:
    """The arguments, with copies of the arrays that a call updates."""
    return {name: value.copy() if name in _ADDED_TO else value for name, value in inputs.items()}


class KernelPeer(Protocol):
    """A library with counterparts of kernels."""

    name: str
    about: str

    def engine(self, spec: KernelSpec, inputs: Inputs, exact: Any, threads: int) -> Engine:
        """The operation on ``threads`` threads, checked against ``exact``. Raises PeerError."""
        ...


class NumPy:
    """NumPy, as its users would write the operation."""

    name = "numpy"
    about = f"NumPy {np.__version__}"

    def engine(self, spec: KernelSpec, inputs: Inputs, exact: Any, threads: int) -> Engine:
        """See KernelPeer; it uses the threads that BLAS may use now."""
        make = OPERATIONS.get(spec.name)
        if make is None:
            raise PeerError("no counterpart in NumPy")
        call = make(**own_copies(inputs))
        require_same(self.about, call(), exact, SAME)
        return Call(call)


class Torch:
    """PyTorch in a process of its own. Raises what ``Worker`` does."""

    name = "torch"

    def __init__(self, python: str | None = None) -> None:
        self._worker = Worker("torch", python)
        self.about = f"PyTorch {self._worker.hello['version']} ({self._worker.hello['system']})"

    def engine(self, spec: KernelSpec, inputs: Inputs, exact: Any, threads: int) -> Engine:
        """See KernelPeer; it replaces the previous one."""
        arrays = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
        numbers = {name: value for name, value in inputs.items() if name not in arrays}
        return self.checked(self.prepare("prepare", arrays, threads, kernel=spec.name, numbers=numbers), exact)

    def prepare(self, do: str, arrays: dict[str, np.ndarray], threads: int, **arguments: Any) -> tuple[np.ndarray, ...]:
        """Prepare an operation on the arrays, and return its result. Raises PeerError."""
        with tempfile.TemporaryDirectory() as directory:
            given, result = Path(directory, "arrays.npz"), Path(directory, "result.npz")
            np.savez(given, **arrays)  # type: ignore[arg-type]
            try:
                known = self._worker.call(do, arrays=str(given), threads=threads, result=str(result), **arguments)
            except RuntimeError as error:
                raise PeerError(str(error)) from None
            if not known:
                raise PeerError("no counterpart in PyTorch")
            with np.load(result) as file:
                return tuple(file[name] for name in file.files)

    def checked(self, found: Any, exact: Any) -> Engine:
        """The prepared operation, if its result is right. Raises PeerError."""
        require_same(self.about, found, exact, SAME)
        return self

    def seconds(self, calls: int) -> float:
        """See ``timing.Engine``: of the prepared operation."""
        return float(self._worker.call("seconds", calls=calls))

    def settle(self) -> None:
        """See ``timing.Engine``."""
        self._worker.settle()

    def close(self) -> None:
        """End its process."""
        self._worker.close()


def require_same(who: str, found: Any, exact: Any, tolerance: float) -> None:
    """Raise PeerError unless a peer's result has a relative error below ``tolerance``."""
    error = relative_error(found, exact)
    if not error < tolerance:
        raise PeerError(f"{who} computes something else: relative error {error:.1e}")
