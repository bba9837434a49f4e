"""Hashes of the results of kernels and models, as a program for processes with separate caches.

``python bits_cases.py kernels 1 2`` prints them for each number of threads, and how many functions were compiled;
``python bits_cases.py sums 2`` prints hashes of the code of the sums.
"""

import hashlib
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from ruvllm.kernels import cross_entropy, dot, layer_norm, rms_norm, rms_norm_backward, softmax
from ruvllm.kernels.jit.decorators import COMPILED
from ruvllm.kernels.jit.small_calls import SMALL
from ruvllm.model import Llama, ModelConfig

# Kernels with sums or exponentials; x (rows, n), w (n,).
CALLS: dict[str, Callable[[Any, Any], np.ndarray]] = {
    "dot": lambda x, w: dot(x, x * w),
    "rms_norm": lambda x, w: rms_norm(x, w),
    "layer_norm": lambda x, w: layer_norm(x, w, w),
    "softmax": lambda x, w: softmax(x),
    "cross_entropy": lambda x, w: cross_entropy(x, np.zeros(len(x), np.int64))[1],
    "rms_norm_backward": lambda x, w: rms_norm_backward(x, w, x * w),
}
CONFIG = ModelConfig(
    vocab_size=300, hidden_size=160, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=40,
)  # fmt: skip


def of_kernels() -> dict[str, str]:
    """Many rows at once, enough for threads, and each row alone, through a small call where there is one."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((96, 1003), np.float32), rng.standard_normal(1003, np.float32)
    found = {}
    for name, call in CALLS.items():
        found[f"{name}, together"] = _hash(call(x, w))
        found[f"{name}, alone"] = _hash(np.concatenate([call(row[None], w) for row in x]))
    return found


def of_a_model() -> dict[str, str]:
    """The logits of a prompt and of single tokens."""
    model = Llama(CONFIG, layout="int4", seed=0)
    cache = model.new_cache(max_tokens=32)
    return {"logits": _hash(np.concatenate([model.forward(ids, cache) for ids in (range(20), [7], [8], [9])]))}


def of_sums() -> dict[str, list[str]]:
    """LLVM's code of each of our functions that several kernels call, once for each of them."""
    of_kernels()
    found = defaultdict(list)
    for kernel in (*COMPILED, *SMALL.values()):
        for module in kernel.inspect_llvm().values():
            for name, code in re.findall(r"^define linkonce_odr [^@]*@(_ZN6ruvllm\w+)(.*?)^}", module, re.M | re.S):
                found[name].append(_hash(np.frombuffer(re.sub(r"[!#]\d+", "", code).encode(), np.uint8)))
    return {name: codes for name, codes in found.items() if len(codes) > 1}


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


if __name__ == "__main__":
    computed = {}
    for threads in map(int, sys.argv[2:]):
        numba.set_num_threads(threads)
        computed[threads] = {"kernels": of_kernels, "model": of_a_model, "sums": of_sums}[sys.argv[1]]()
    print(json.dumps({"hashes": computed, "compiled": sum(sum(f.stats.cache_misses.values()) for f in COMPILED)}))
