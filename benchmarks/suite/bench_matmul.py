"""Matrix products: the seed's GEMV and GEMM, and packed and quantised weights for one and for many tokens."""

import numpy as np

from ruvllm.kernels import gemm, gemv
from ruvllm.model.activations import Activations
from ruvllm.model.random_weights import RandomTensor
from ruvllm.model.weights import load_weights


class Gemv:
    """y = A x, n x n."""

    version = "1"
    timeout = 60
    params = ([256, 512, 1024, 2048, 4096],)
    param_names = ("n",)

    def setup(self, n: int) -> None:
        rng = np.random.default_rng(0)
        self.a, self.x = rng.standard_normal((n, n), np.float32), rng.standard_normal(n, np.float32)
        self.out = np.empty(n, np.float32)
        self.time_gemv(n)

    def time_gemv(self, n: int) -> None:
        gemv(self.a, self.x, out=self.out)


class Gemm:
    """C = A B, n x n x n."""

    version = "1"
    timeout = 60
    params = ([128, 256, 512, 1024],)
    param_names = ("n",)

    def setup(self, n: int) -> None:
        self.a, self.b = np.random.default_rng(0).standard_normal((2, n, n), np.float32)
        self.out = np.empty((n, n), np.float32)
        self.time_gemm(n)

    def time_gemm(self, n: int) -> None:
        gemm(self.a, self.b, out=self.out)


class Linear:
    """x W^T for weights (4096, 4096) packed as a model's are; rounding x to 8 bits is part of it."""

    version = "1"
    timeout = 120
    params = (["f32", "f16", "int8", "int4"], [1, 4, 16, 64, 512])
    param_names = ("layout", "tokens")
    _N = 4096

    def setup(self, layout: str, tokens: int) -> None:
        self.weights = load_weights(RandomTensor("bench", (self._N, self._N), 0), layout)
        self.x = np.random.default_rng(0).standard_normal((tokens, self._N), np.float32)
        self.activations = Activations(tokens, self._N)
        self.out = np.empty((tokens, self._N), np.float32)
        self.time_linear(layout, tokens)

    def time_linear(self, layout: str, tokens: int) -> None:
        self.weights.matmul(self.activations.of(self.x), self.out)
