"""RMSNorm, LayerNorm, softmax and SiLU·mul of one row and of many."""

from typing import Any

import numpy as np

from ruvllm.kernels import layer_norm, rms_norm, silu_mul, softmax


class Rows:
    """Kernels that work row by row; the seed's rows are those with one row."""

    version = "1"
    timeout = 60
    params: Any = (["rms_norm", "layer_norm", "softmax", "silu_mul"], [1, 64], [768, 1024, 2048, 4096, 8192])
    param_names = ("kernel", "rows", "n")

    def setup(self, kernel: str, rows: int, n: int) -> None:
        rng = np.random.default_rng(0)
        x, y = rng.standard_normal((2, rows, n), np.float32)
        weight, bias = rng.standard_normal((2, n), np.float32)
        out = np.empty_like(x)
        self.call = {
            "rms_norm": lambda: rms_norm(x, weight, out=out),
            "layer_norm": lambda: layer_norm(x, weight, bias, out=out),
            "softmax": lambda: softmax(x, out=out),
            "silu_mul": lambda: silu_mul(x, y, out=out),
        }[kernel]
        self.call()

    def time_rows(self, kernel: str, rows: int, n: int) -> None:
        self.call()
