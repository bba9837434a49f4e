"""Tokens per second of a model of SmolLM2-135M's shape, with random weights: nothing need be fetched."""

import time
from typing import Any

import numpy as np

from ruvllm.model import Llama
from ruvllm.model.config import PRESETS

_LAYOUTS = ["f32", "f16", "int8", "int4"]


class _Model:
    version = "1"
    timeout = 300

    def setup(self, weights: str, tokens: int) -> None:
        """A model and a cache that has room for the tokens; everything compiled."""
        self.model = Llama(PRESETS["smollm2-135m"], layout=weights)
        self.cache = self.model.new_cache(tokens + 64)
        self.ids = np.random.default_rng(0).integers(0, 49152, tokens)
        self.out = np.empty(49152, np.float32)
        self.model.forward(self.ids[:7], self.cache, last_only=True)
        self.model.forward([1], self.cache, last_only=True)
        self.cache.clear()


class Prefill(_Model):
    """A prompt at once: tokens per second, and the memory that it takes."""

    params: Any = (_LAYOUTS, [32, 512])
    param_names = ("weights", "tokens")
    unit = "tokens/s"

    def track_prefill(self, weights: str, tokens: int) -> float:
        times = []
        for _ in range(5):
            self.cache.clear()
            start = time.perf_counter()
            self.model.forward(self.ids, self.cache, last_only=True, out=self.out)
            times.append(time.perf_counter() - start)
        return tokens / float(np.median(times))

    def peakmem_prefill(self, weights: str, tokens: int) -> None:
        self.model.forward(self.ids, self.cache, last_only=True, out=self.out)


class Decode(_Model):
    """Token by token after so many others: tokens per second."""

    params: Any = (_LAYOUTS, [16, 1024])
    param_names = ("weights", "cached")
    unit = "tokens/s"

    def track_decode(self, weights: str, cached: int) -> float:
        self.model.forward(self.ids, self.cache, last_only=True)
        times = []
        for _ in range(50):
            start = time.perf_counter()
            self.model.forward([1], self.cache, last_only=True, out=self.out)
            times.append(time.perf_counter() - start)
        return 1 / float(np.median(times))


class Drift:
    """Largest error of a logit, against float32 weights: what 16, 8 and 4 bits cost on random weights."""

    version = "1"
    timeout = 300
    params: Any = (["f16", "int8", "int4"],)
    param_names = ("weights",)
    unit = "logits"

    def track_error(self, weights: str) -> float:
        ids = np.random.default_rng(0).integers(0, 49152, 24)
        exact, other = (Llama(PRESETS["smollm2-135m"], layout=layout) for layout in ("f32", weights))
        return float(np.abs(exact.forward(ids, exact.new_cache(24)) - other.forward(ids, other.new_cache(24))).max())
