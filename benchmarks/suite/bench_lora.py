"""MicroLoRA: the adapter's forward pass and the accumulation of its gradients."""

from typing import Any

import numpy as np

from ruvllm.kernels import lora_accumulate_grad, lora_forward, lora_forward_add


class Lora:
    """One token through an adapter of a square matrix, dim x dim."""

    version = "1"
    timeout = 60
    params: Any = ([768, 2048, 4096], [1, 2, 8, 64])
    param_names = ("dim", "rank")

    def setup(self, dim: int, rank: int) -> None:
        rng = np.random.default_rng(0)
        self.x, self.dy, self.out = rng.standard_normal((3, 1, dim), np.float32)
        self.a, self.b = rng.standard_normal((dim, rank), np.float32), rng.standard_normal((rank, dim), np.float32)
        self.grad_a, self.grad_b = np.zeros_like(self.a), np.zeros_like(self.b)
        self.time_forward(dim, rank)
        self.time_forward_add(dim, rank)
        self.time_accumulate_grad(dim, rank)

    def time_forward(self, dim: int, rank: int) -> None:
        """Its output is allocated."""
        lora_forward(self.x, self.a, self.b, 1e-3)

    def time_forward_add(self, dim: int, rank: int) -> None:
        lora_forward_add(self.x, self.a, self.b, 1e-3, self.out)

    def time_accumulate_grad(self, dim: int, rank: int) -> None:
        lora_accumulate_grad(self.x, self.dy, self.a, self.b, 1e-3, self.grad_a, self.grad_b)
