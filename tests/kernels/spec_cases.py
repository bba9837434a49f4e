"""Inputs for every kernel's record: the sizes that it names, and odd ones around the SIMD widths.

Run as a program, it tries them in a process of its own (bounds checks, no compiler, another number of threads):
``python spec_cases.py check`` compares with the references at small odd sizes; ``python spec_cases.py digest 1 2``
prints a hash of each kernel's results for each number of threads.
"""

import hashlib
import inspect
import json
import sys
import zlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numba
import numpy as np

from ruvllm.kernels import KERNELS, KernelSpec, reference

LENGTHS = (*range(1, 71), 127, 128, 129, 255, 256, 257, 1023)
FEW = (1, 2, 15, 16, 17, 33)  # for runs without a compiler
# The other axes while one of them takes every length.
SMALL = {
    "rows": 3, "n": 21, "m": 5, "k": 19, "batch": 2, "tokens": 3, "heads": 4, "kv_heads": 2, "dim": 18, "length": 20,
    "rank": 3, "block_size": 4, "bits": 4, "experts": 3,
}  # fmt: skip
# Axes that are counts, not lengths of vectors: a few values are enough.
COUNTS = {
    "block_size": (1, 3, 16, 40),
    "bits": (4, 8),
    "experts": (1, 5),
    "rows": (1, 2, 7),
    "batch": (1, 3),
    "heads": (2, 6),
    "kv_heads": (1, 4),
    "tokens": (1, 2, 5, 6, 7, 13),
}
EVEN = {"apply_rope", "apply_rope_tables"}  # head_dim is a number of pairs, times two
IN_PLACE = {
    "kv_append": ("keys", "values"), "lora_accumulate_grad": ("grad_a", "grad_b"), "lora_forward_add": ("out",),
    "adamw": ("parameters", "m", "v"), "add_rms_norm": ("residual",), "apply_repetition_penalty": ("logits",),
}  # fmt: skip
# Their sums follow the register width: other last bits on other processors.
BY_WIDTH = frozenset({
    "add_rms_norm", "cross_entropy", "dot", "gemv", "layer_norm", "log_softmax", "lora_accumulate_grad", "lora_forward",
    "lora_forward_add", "rms", "rms_norm", "rms_norm_backward", "softmax",
})  # fmt: skip


def attention_backward_of_the_seen(
    q: Any, k: Any, v: Any, do: Any, starts: Any = None, window: int | None = None, scale: float | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """attention_backward query by query from the keys that it sees: masked keys are not even multiplied by zero."""
    q, k, v, do = (np.asarray(array, np.float64) for array in (q, k, v, do))
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    tokens, heads, dim = q.shape
    factor = dim**-0.5 if scale is None else scale
    for a, b in pairwise([0, tokens] if starts is None else starts):
        for t in range(a, b):
            seen = slice(max(a, t + 1 - (window or tokens)), t + 1)
            for h in range(heads):
                kv = h // (heads // k.shape[1])
                p = reference.softmax(factor * k[seen, kv] @ q[t, h])
                dp = v[seen, kv] @ do[t, h]
                ds = factor * p * (dp - p @ dp)
                dq[t, h] = ds @ k[seen, kv]
                dk[seen, kv] += np.outer(ds, q[t, h])
                dv[seen, kv] += np.outer(p, do[t, h])
    return dq, dk, dv


def odd_sizes(spec: KernelSpec, lengths: tuple[int, ...] = LENGTHS) -> Iterator[dict[str, int]]:
    """Each axis in turn takes every length while the others stay small."""
    for axis in spec.axes:
        for value in COUNTS.get(axis, lengths):
            if spec.name in EVEN and axis == "dim":
                value *= 2
            yield {a: value if a == axis else SMALL[a] for a in spec.axes}


class Clipped(np.random.Generator):
    """Normally distributed numbers that have the same bits on every processor.

    NumPy makes float32 beyond 3.654 with a logarithm whose last bit may differ: one number in many millions does.
    """

    def standard_normal(self, *arguments: Any, **more: Any) -> Any:
        drawn = super().standard_normal(*arguments, **more)
        return np.clip(drawn, -3.65, 3.65, out=drawn if isinstance(drawn, np.ndarray) else None)


def example(spec: KernelSpec, sizes: dict[str, int]) -> dict[str, Any]:
    """The record's example, the same in every process."""
    seed = zlib.crc32(f"{spec.name}{sizes}".encode())
    return spec.example(Clipped(np.random.PCG64(seed)), **sizes)


def results(value: Any) -> tuple[np.ndarray, ...]:
    """What a kernel returned, as arrays."""
    return tuple(np.asarray(v) for v in (value if isinstance(value, tuple) else (value,)))


def run(spec: KernelSpec, arguments: dict[str, Any], **more: Any) -> tuple[np.ndarray, ...]:
    """Call the kernel; arrays that it changes in place are copied first."""
    copies = {name: arguments[name].copy() for name in IN_PLACE.get(spec.name, ())}
    return results(spec.function(**{**arguments, **copies, **more}))


def arrays(arguments: dict[str, Any]) -> dict[str, np.ndarray]:
    """The float32 arrays among the arguments."""
    return {k: v for k, v in arguments.items() if isinstance(v, np.ndarray) and v.dtype == np.float32}


def takes_out(spec: KernelSpec) -> bool:
    """Whether the kernel has ``out`` and overwrites it."""
    return "out" in inspect.signature(spec.function).parameters and spec.name not in IN_PLACE


def assert_close(spec: KernelSpec, arguments: dict[str, Any], got: tuple[np.ndarray, ...], sizes: Any) -> None:
    """The normalised mean squared error of every result is within the record's tolerance."""
    expected = results(spec.reference(**arguments))
    assert len(got) == len(expected), (spec.name, sizes)
    for y, r in zip(got, expected, strict=True):
        assert y.shape == r.shape, (spec.name, sizes, y.shape, r.shape)
        error, size = np.sum((y - r) ** 2), np.sum(np.float64(r) ** 2)
        assert error <= spec.tolerance * size, (spec.name, sizes, float(error / size))


def digest() -> dict[str, str]:
    """A hash of the results at the record's example sizes (many of them large enough for threads).

    Without BLAS, which rounds in its own way: "auto" measures for each number of threads which products it gets.
    """
    hashes = {}
    for spec in KERNELS.values():
        state = hashlib.sha256()
        own = {"backend": "numba"} if "backend" in inspect.signature(spec.function).parameters else {}
        for sizes in (*spec.examples, *odd_sizes(spec, (1, 70))):
            for array in run(spec, example(spec, sizes) | own):
                state.update(array.tobytes())
        hashes[spec.name] = state.hexdigest()
    return hashes


if __name__ == "__main__":
    if sys.argv[1] == "check":
        for spec in KERNELS.values():
            for sizes in odd_sizes(spec, FEW):
                arguments = example(spec, sizes)
                assert_close(spec, arguments, run(spec, arguments), sizes)
        print("every kernel agrees")
    else:
        found = {}
        for threads in map(int, sys.argv[2:]):
            numba.set_num_threads(threads)
            found[threads] = digest()
        print(json.dumps(found))
