"""The peers of a kernel: NumPy in this process, PyTorch in one of its own, on the same arrays."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ruvllm.kernels import KernelSpec
from ruvllm.report.numpy_peer import OPERATIONS
from ruvllm.report.timing import Call, Engine
from ruvllm.report.worker import Worker

SAME = 1e-2  # relative error up to which a peer computes the same: float32 angles of PyTorch's RoPE are off by 1e-5
_ADDED_TO = ("out", "grad_a", "grad_b")  # arguments that a call changes: each engine has its own

Inputs = dict[str, Any]


class PeerError(Exception):
    """Why there is no figure of a peer."""


def relative_error(found: Any, exact: Any) -> float:
    """sqrt(sum((y - r)^2) / sum(r^2)) over all results of a kernel, against those in float64."""
    founds, exacts = (r if isinstance(r, tuple) else (r,) for r in (found, exact))
    differences = sum(float(np.sum((np.asarray(y, np.float64) - r) ** 2)) for y, r in zip(founds, exacts, strict=True))
    return float(np.sqrt(differences / sum(float(np.sum(np.square(r))) for r in exacts)))


def own_copies(inputs: Inputs) -> Inputs:
    """The arguments, with copies of the arrays that a call adds to."""
    return {name: value.copy() if name in _ADDED_TO else value for name, value in inputs.items()}


class KernelPeer(Protocol):
    """A library that has counterparts of kernels."""

    name: str
    about: str

    def engine(self, spec: KernelSpec, inputs: Inputs, exact: Any, threads: int) -> Engine:
        """The operation ready to be timed, with so many threads. Raises PeerError."""
        ...


class NumPy:
    """NumPy, as its users would write the operation."""

    name = "numpy"
    about = f"NumPy {np.__version__}"

    def engine(self, spec: KernelSpec, inputs: Inputs, exact: Any, threads: int) -> Engine:
        """The operation ready to be timed, with as many threads as BLAS may use now. Raises PeerError."""
        make = OPERATIONS.get(spec.name)
        if make is None:
            raise PeerError("no counterpart in NumPy")
        call = make(**own_copies(inputs))
        _require_same(self.about, relative_error(call(), exact))
        return Call(call)


class Torch:
    """PyTorch in a process of its own. Raises what ``Worker`` does."""

    name = "torch"

    def __init__(self, python: str) -> None:
        self._worker = Worker("torch", python, Path(__file__).with_name("_torch_worker.py"))
        self.about = f"PyTorch {self._worker.hello['version']} ({self._worker.hello['system']})"

    def engine(self, spec: KernelSpec, inputs: Inputs, exact: Any, threads: int) -> Engine:
        """The operation ready to be timed, until the next one is. Raises PeerError."""
        arrays = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
        numbers = {name: value for name, value in inputs.items() if name not in arrays}
        return self.checked(self.prepare("prepare", arrays, threads, kernel=spec.name, numbers=numbers), exact)

    def prepare(self, do: str, arrays: dict[str, np.ndarray], threads: int, **arguments: Any) -> tuple[np.ndarray, ...]:
        """Make ready an operation on the arrays, and return its result. Raises PeerError."""
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
        """What was prepared, if its result is right. Raises PeerError."""
        _require_same(self.about, relative_error(found, exact))
        return _Remote(self._worker)

    def close(self) -> None:
        """End its process."""
        self._worker.close()


class _Remote:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def seconds(self, calls: int) -> float:
        """See Engine."""
        return float(self._worker.call("seconds", calls=calls))

    def settle(self) -> None:
        """See Engine."""
        self._worker.call("settle")


def _require_same(who: str, error: float) -> None:
    if not error < SAME:
        raise PeerError(f"{who} computes something else: relative error {error:.1e}")
