"""One token through one or several transformer layers of the seed's three models, in float32 and in 4 bits."""

import dataclasses
from typing import Any

import numpy as np

from ruvllm.model import Llama
from ruvllm.model.config import PRESETS


class Layer:
    """Distinct layers, random weights, no head; the KV cache holds 16 positions."""

    version = "1"
    timeout = 300
    params: Any = (["llama2-7b", "llama3-8b", "mistral-7b"], ["f32", "int4"], [1, 4])
    param_names = ("model", "weights", "layers")
    number = 1
    repeat = (3, 20, 10.0)

    def setup(self, name: str, weights: str, layers: int) -> None:
        config = dataclasses.replace(
            PRESETS[name], num_hidden_layers=layers, vocab_size=512, tie_word_embeddings=True, bos_token_id=None,
            eos_token_ids=(),
        )  # fmt: skip
        self.model = Llama(config, layout=weights)
        self.cache = self.model.new_cache(32)
        self.out = np.empty(512, np.float32)
        self.model.forward(np.arange(16), self.cache)
        self.time_token(name, weights, layers)

    def time_token(self, name: str, weights: str, layers: int) -> None:
        self.cache.truncate(16)
        self.model.forward([1], self.cache, last_only=True, out=self.out)
