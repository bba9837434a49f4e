"""A few kernels and a small model, for processes that do without internals of numba (see test_private.py).

``python -m tests.kernels.private_cases [model]`` checks the results of kernels, and of a model if asked. Prints which
parts may be used, and how many functions came from the compile cache.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from ruvllm.kernels import KERNELS
from ruvllm.kernels.jit.decorators import COMPILED
from ruvllm.kernels.jit.private import cross  # noqa: F401  every part is known
from ruvllm.kernels.jit.private.parts import PARTS
from tests.kernels import spec_cases
from tests.model import tiny
from tests.model.model_cases import load, logits

# Sums and independent loops, vectors, threads; small calls and others.
SIZES = (
    ("rms_norm", {"rows": 1, "n": 300}), ("rms_norm", {"rows": 300, "n": 300}), ("softmax", {"rows": 1, "n": 300}),
    ("gemv", {"m": 9, "k": 300}),
)  # fmt: skip


def check_kernels() -> None:
    for name, sizes in SIZES:
        spec = KERNELS[name]
        arguments = spec_cases.example(spec, sizes)
        spec_cases.assert_close(spec, arguments, spec_cases.run(spec, arguments), sizes)


def check_in_place() -> None:
    x = np.linspace(-3, 3, 1000, dtype=np.float32).reshape(2, 1, 500)
    expected = x / (1 + np.exp(-x.astype(np.float64))) * x
    KERNELS["silu_mul"].function(x, x.copy(), x)
    np.testing.assert_allclose(x, expected, rtol=1e-5)


def check_model() -> None:
    """As transformers computes it."""
    ids, expected = tiny.golden("llama3_scaled_gqa")
    assert np.abs(logits(load(tiny.directory("llama3_scaled_gqa"), "f32"), ids) - expected).max() <= 2e-4


if __name__ == "__main__":
    check_kernels()
    check_in_place()
    if "model" in sys.argv[1:]:
        check_model()
    usable = sorted(name for name, is_usable in PARTS.items() if is_usable())
    hits = sum(sum(function.stats.cache_hits.values()) for function in COMPILED)
    misses = sum(sum(function.stats.cache_misses.values()) for function in COMPILED)
    print(json.dumps({"usable": usable, "loaded": hits, "compiled": misses}))
