"""One token through one or several transformer layers of the seed's three models, in float32 and in 4 bits."""

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import psutil

from ruvllm.model import Llama
from ruvllm.model.config import PRESETS
from ruvllm.model.random_weights import RandomTensor, RandomWeights


@cache
def _block(columns: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((256, columns), np.float32) * np.float32(columns**-0.5)


class _Repeated(RandomTensor):
    """The same 256 rows again and again: drawing 800 million random numbers would take longer than all else."""

    def _rows(self, block: int) -> np.ndarray:
        return _block(self.shape[1])


class _Weights(RandomWeights):
    def tensor(self, name: str) -> RandomTensor:
        return _Repeated(name, super().tensor(name).shape, 0)


class Layer:
    """Layers that each have memory of their own, hardly a head; the KV cache holds 16 positions.

    Several layers of one model, as in the seed; left out where they would not fit into memory.
    """

    version = "1"
    timeout = 600
    params: Any = (["llama2-7b", "llama3-8b", "mistral-7b"], ["f32", "int4"], [1, 4, 8, 16])
    param_names = ("model", "weights", "layers")
    number = 1
    repeat = (3, 20, 10.0)

    def setup(self, name: str, weights: str, layers: int) -> None:
        if layers > 1 and name != "llama2-7b":
            raise NotImplementedError
        config = dataclasses.replace(
            PRESETS[name], num_hidden_layers=layers, vocab_size=512, tie_word_embeddings=True, bos_token_id=None,
            eos_token_ids=(),
        )  # fmt: skip
        bytes_needed = config.parameter_count() * (4 if weights == "f32" else 0.5625)
        if bytes_needed > 0.8 * psutil.virtual_memory().available:
            raise NotImplementedError
        self.model = Llama(config, _Weights(config), weights)
        self.cache = self.model.new_cache(32)
        self.out = np.empty(512, np.float32)
        self.model.forward(np.arange(16), self.cache)
        self.time_token(name, weights, layers)

    def time_token(self, name: str, weights: str, layers: int) -> None:
        self.cache.truncate(16)
        self.model.forward([1], self.cache, last_only=True, out=self.out)
