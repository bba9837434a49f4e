"""Linear layers: packed and quantised weights, for one and for many tokens."""

import numpy as np

from ruvllm.model.activations import Activations
from ruvllm.model.random_weights import RandomTensor
from ruvllm.model.weights import load_weights


class Linear:
    """x W^T for weights (4096, 4096) packed as in a model; includes rounding x to 8 bits."""

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
