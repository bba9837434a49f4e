"""PyTorch as a worker (see ``workers``): our kernels' operations as a PyTorch user would write them.

Run with any Python that has torch. An operation gets the same arrays as our kernel, runs once for its result, which is
compared with the float64 reference, and is then timed.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
from serve import serve  # type: ignore[import-not-found]  # in this program's directory, not in a package


def _heads_first(t: Any) -> Any:
    """(S, KV, D) as a contiguous (1, KV, S, D): the layout in which attention is fastest."""
    return t.transpose(0, 1).contiguous()[None]


class Operations:
    """One method per kernel, named as in KERNELS: takes tensors, returns a function without arguments."""

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
        # The query heads that share a kv head become several queries of it: no key is read twice.
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


class Layer:
    """One LLaMA layer with its embedding, head and KV cache, as a PyTorch user would write it.

    weights: matrices (outputs, inputs) and vectors by name; cos, sin (S, D/2).
    """

    def __init__(self, torch: Any, weights: dict[str, Any], heads: int, kv_heads: int, eps: float) -> None:
        self.torch, self.f, self.w = torch, torch.nn.functional, weights
        self.heads, self.kv_heads, self.eps = heads, kv_heads, eps
        positions, half = weights["cos"].shape
        self.keys = torch.zeros(1, kv_heads, positions, 2 * half)
        self.values = torch.zeros(1, kv_heads, positions, 2 * half)

    def __call__(self, ids: Any, start: int) -> Any:
        """Logits after the last of ids (T,), at positions start, start + 1 ..."""
        f, w, end = self.f, self.w, start + len(ids)
        x = w["embed"][ids]
        h = f.rms_norm(x, x.shape[-1:], w["attn_norm"], self.eps)
        q = self._rotated(f.linear(h, w["q"]).view(len(ids), self.heads, -1), start)
        self.keys[:, :, start:end] = self._rotated(f.linear(h, w["k"]).view(len(ids), self.kv_heads, -1), start)
        self.values[:, :, start:end] = f.linear(h, w["v"]).view(len(ids), self.kv_heads, -1).transpose(0, 1)[None]
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        attended = f.scaled_dot_product_attention(q, keys, values, is_causal=start == 0, enable_gqa=True)
        x = x + f.linear(attended[0].transpose(0, 1).reshape(len(ids), -1), w["o"])
        h = f.rms_norm(x, x.shape[-1:], w["mlp_norm"], self.eps)
        x = x + f.linear(f.silu(f.linear(h, w["gate"])) * f.linear(h, w["up"]), w["down"])
        return f.linear(f.rms_norm(x[-1], x.shape[-1:], w["norm"], self.eps), w["embed"])

    def _rotated(self, x: Any, start: int) -> Any:
        """(T, H, D) rotated by its positions, as (1, H, T, D)."""
        half = x.shape[-1] // 2
        cos, sin = (self.w[name][start : start + len(x), None] for name in ("cos", "sin"))
        a, b = x[..., :half], x[..., half:]
        return self.torch.cat((a * cos - b * sin, b * cos + a * sin), -1).transpose(0, 1)[None]


class Worker:
    """The operation prepared last."""

    def __init__(self) -> None:
        self.torch: Any = import_module("torch")
        self.operations = Operations(self.torch)
        self.operation: Callable[[], Any] | None = None

    def hello(self) -> dict[str, str]:
        """PyTorch's version, and the instruction set it chose."""
        return {"version": self.torch.__version__, "system": self.torch.backends.cpu.get_cpu_capability()}

    def prepare(self, kernel: str, arrays: str, numbers: dict[str, float], threads: int, result: str) -> bool:
        """Prepare one operation on the arrays of an .npz file; its first result is written to another.

        False if there is no such operation.
        """
        self.operation = None
        make = getattr(self.operations, kernel, None)
        if make is None:
            return False
        self.operation = make(**self._tensors(arrays, threads), **numbers)
        self._keep_result(result)
        return True

    def prepare_layer(
        self, arrays: str, shapes: dict[str, list[int]], ids: list[int], heads: int, kv_heads: int, eps: float,
        threads: int, result: str,
    ) -> bool:  # fmt: skip
        """Prepare the last of ids in one layer, after the others; matrices repeat the rows of block{columns}."""
        self.operation = None  # frees its weights before others are allocated
        given = self._tensors(arrays, threads)
        weights = {name.rsplit(".", 1)[-1]: tensor for name, tensor in given.items()}
        for name, (rows, columns) in shapes.items():
            block = given[f"block{columns}"]
            weights[name] = block.repeat(-(-rows // len(block)), 1)[:rows].clone()
        layer, tokens, last = Layer(self.torch, weights, heads, kv_heads, eps), self.torch.tensor(ids), len(ids) - 1
        with self.torch.inference_mode():
            layer(tokens[:last], 0)
        self.operation = lambda: layer(tokens[last:], last)
        self._keep_result(result)
        return True

    def _tensors(self, arrays: str, threads: int) -> dict[str, Any]:
        """The arrays of a file; sets the number of threads."""
        self.torch.set_num_threads(threads)
        with np.load(arrays) as file:
            return {name: self.torch.from_numpy(file[name]) for name in file.files}

    def _keep_result(self, path: str) -> None:
        assert self.operation is not None
        with self.torch.inference_mode():
            found = self.operation()
        found = found if isinstance(found, tuple) else (found,)
        np.savez(path, *(t.numpy() for t in found))

    def seconds(self, calls: int) -> float:
        """Seconds of ``calls`` calls, after one that wakes threads and warms caches."""
        assert self.operation is not None
        with self.torch.inference_mode():
            self.operation()
            return timeit.Timer(self.operation).timeit(calls)


if __name__ == "__main__":
    serve(Worker)
