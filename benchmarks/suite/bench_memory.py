"""Memory: read bandwidth, appending to the KV cache, the needs of a model of 7B parameters."""

import dataclasses
from typing import Any

import numpy as np

from ruvllm.kernels import read_bandwidth
from ruvllm.kernels.attention.kv import append
from ruvllm.model import KVCache
from ruvllm.model.presets import PRESETS


class Bandwidth:
    """Reading 256 MB, and buffers that fit into the caches."""

    version = "1"
    timeout = 60
    params: Any = ([256, 512, 1024, 2048, 4096, 262144], [1, 2])
    param_names = ("KB", "threads")
    unit = "GB/s"

    def setup(self, kilobytes: int, threads: int) -> None:
        self.repeats = 5 if kilobytes > 4096 else 200
        read_bandwidth(kilobytes << 10, 1, threads)

    def track_read(self, kilobytes: int, threads: int) -> float:
        return read_bandwidth(kilobytes << 10, self.repeats, threads) / 1e9


class KVAppend:
    """Keys and values of s tokens into one layer's cache: LLaMA-2-7B, 32 heads of size 128."""

    version = "1"
    timeout = 60
    params: Any = (["f32", "f16"], [1, 256, 512, 1024, 2048])
    param_names = ("kv", "tokens")

    def setup(self, kv: str, tokens: int) -> None:
        config = PRESETS["llama2-7b"]
        cache = KVCache(dataclasses.replace(config, num_hidden_layers=1), 2048, kv)
        cache.reserve(2048)
        self.cache = cache.of_layer(0)
        self.k, self.v = np.random.default_rng(0).standard_normal((2, tokens, 32, 128), np.float32)
        self.positions = np.arange(tokens)
        self.time_append(kv, tokens)

    def time_append(self, kv: str, tokens: int) -> None:
        append(self.k, self.v, self.cache, self.positions)


class Estimate:
    """Memory of a model's weights, grouped-query attention and scales counted."""

    version = "1"
    params: Any = (["llama2-7b", "llama2-13b", "llama3-8b", "mistral-7b"], ["fp16", "int8", "int4"])
    param_names = ("model", "precision")
    unit = "GB"

    def track_weights(self, model: str, precision: str) -> float:
        return float(getattr(PRESETS[model].memory_estimate(), precision)) / 1e9
