"""PyTorch in a process of its own (see ``worker``): our kernels' operations as a PyTorch user would write them.

Run with any Python that has torch; it imports nothing of ruvllm. An operation gets the arrays that our kernel gets,
runs once for its result, which is compared with the float64 reference, and is then timed.
"""

from __future__ import annotations

import json
import os
import sys
import timeit
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np


def _heads_first(t: Any) -> Any:
    """(S, KV, D) as a contiguous (1, KV, S, D): the layout that attention is fastest in."""
    return t.transpose(0, 1).contiguous()[None]


class Operations:
    """One method a kernel, named as in KERNELS: arguments as tensors in, a function without arguments out."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self.f = torch.nn.functional

    def gemv(self, a: Any, x: Any) -> Callable[[], Any]:
        out = self.torch.empty(len(a))
        return lambda: self.torch.mv(a, x, out=out)

    def gemm(self, a: Any, b: Any) -> Callable[[], Any]:
        out = self.torch.empty(len(a), b.shape[1])
        return lambda: self.torch.mm(a, b, out=out)

    def gemm_nt(self, a: Any, b: Any) -> Callable[[], Any]:
        return lambda: self.f.linear(a, b)

    def buffer_sum(self, x: Any) -> Callable[[], Any]:
        return lambda: x.sum()

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Callable[[], Any]:
        return lambda: self.f.rms_norm(x, weight.shape, weight, eps)

    def layer_norm(self, x: Any, weight: Any, bias: Any, eps: float) -> Callable[[], Any]:
        return lambda: self.f.layer_norm(x, weight.shape, weight, bias, eps)

    def softmax(self, x: Any) -> Callable[[], Any]:
        return lambda: self.torch.softmax(x, -1)

    def silu_mul(self, gate: Any, up: Any) -> Callable[[], Any]:
        return lambda: self.f.silu(gate) * up

    def softmax_attention(self, q: Any, k: Any, v: Any) -> Callable[[], Any]:
        query, keys, values = q[None, None, None], k[None, None], v[None, None]
        return lambda: self.f.scaled_dot_product_attention(query, keys, values)[0, 0, 0]

    def grouped_query_attention(self, q: Any, k: Any, v: Any) -> Callable[[], Any]:
        # The query heads that share a kv head are so many queries of it: no key is read twice.
        kv_heads = k.shape[1]
        query, keys, values = q.reshape(1, kv_heads, len(q) // kv_heads, -1), _heads_first(k), _heads_first(v)
        return lambda: self.f.scaled_dot_product_attention(query, keys, values).reshape(q.shape)

    def flash_attention(self, q: Any, k: Any, v: Any) -> Callable[[], Any]:
        query, keys, values = _heads_first(q), _heads_first(k), _heads_first(v)

        def call() -> Any:
            return self.f.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)

        return lambda: call()[0].transpose(0, 1)

    def apply_rope(self, x: Any, positions: Any, inv_freq: Any) -> Callable[[], Any]:
        inv_freq = inv_freq.float()

        def call() -> Any:
            angles = positions[:, None] * inv_freq
            return self._rotate(x, angles.cos(), angles.sin())

        return call

    def apply_rope_tables(self, x: Any, cos: Any, sin: Any) -> Callable[[], Any]:
        return lambda: self._rotate(x, cos, sin)

    def _rotate(self, x: Any, cos: Any, sin: Any) -> Any:
        half = x.shape[-1] // 2
        a, b, cos, sin = x[..., :half], x[..., half:], cos[:, None], sin[:, None]
        return self.torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def lora_forward(self, x: Any, a: Any, b: Any, scaling: float) -> Callable[[], Any]:
        return lambda: (x @ a @ b).mul_(scaling)

    def lora_forward_add(self, x: Any, a: Any, b: Any, scaling: float, out: Any) -> Callable[[], Any]:
        return lambda: out.addmm_(x @ a, b, alpha=scaling)

    def lora_accumulate_grad(
        self, x: Any, dy: Any, a: Any, b: Any, scaling: float, grad_a: Any, grad_b: Any
    ) -> Callable[[], Any]:
        def call() -> Any:
            grad_a.addmm_(x.T, dy @ b.T, alpha=scaling)
            grad_b.addmm_((x @ a).T, dy, alpha=scaling)
            return grad_a, grad_b

        return call


class Worker:
    """The operation that was prepared last."""

    def __init__(self) -> None:
        self.torch: Any = import_module("torch")
        self.operations = Operations(self.torch)
        self.operation: Callable[[], Any] | None = None

    def hello(self) -> dict[str, str]:
        """Version and the instruction set that it chose."""
        return {"version": self.torch.__version__, "system": self.torch.backends.cpu.get_cpu_capability()}

    def prepare(self, kernel: str, arrays: str, numbers: dict[str, float], threads: int, result: str) -> bool:
        """Make ready one operation on the arrays of an .npz file; its first result goes to another, in order.

        False if there is no such operation.
        """
        self.operation = None
        make = getattr(self.operations, kernel, None)
        if make is None:
            return False
        self.torch.set_num_threads(threads)
        with np.load(arrays) as file:
            tensors = {name: self.torch.from_numpy(file[name]) for name in file.files}
        self.operation = make(**tensors, **numbers)
        with self.torch.inference_mode():
            found = self.operation()
        found = found if isinstance(found, tuple) else (found,)
        np.savez(result, *(t.numpy() for t in found))
        return True

    def seconds(self, calls: int) -> float:
        """Seconds of so many calls, after one that wakes threads and caches."""
        assert self.operation is not None
        with self.torch.inference_mode():
            self.operation()
            return timeit.Timer(self.operation).timeit(calls)


def main() -> None:
    """Answer requests until stdin ends."""
    # What torch itself prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("do")
        try:
            worker = worker or Worker()
            answer = {"result": getattr(worker, name)(**request)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}", "missing": isinstance(error, ImportError)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
