"""A prompt and a token through a model of SmolLM2-135M's shape, with random weights: nothing is fetched."""

from typing import Any

import numpy as np

from ruvllm.model import Llama
from ruvllm.model.presets import PRESETS

_LAYOUTS = ["f32", "f16", "int8", "int4"]


class _Model:
    version = "1"
    timeout = 300

    def setup_cache(self) -> None:
        """Compile in another process, so that the compiler's memory is not counted as the model's."""
        for weights in _LAYOUTS:
            _Model.setup(self, weights, 8)

    def setup(self, weights: str, tokens: int) -> None:
        """A model and a KV cache large enough for the tokens; everything compiled."""
        self.model = Llama(PRESETS["smollm2-135m"], layout=weights)
        self.cache = self.model.new_cache(tokens + 64)
        self.ids = np.random.default_rng(0).integers(0, 49152, tokens)
        self.out = np.empty(49152, np.float32)
        self.model.forward(self.ids[:7], self.cache, last_only=True)
        self.model.forward([1], self.cache, last_only=True)
        self.cache.clear()


class Prefill(_Model):
    """A prompt in one pass: its time and its memory."""

    params: Any = (_LAYOUTS, [32, 512])
    param_names = ("weights", "tokens")

    def time_prompt(self, weights: str, tokens: int) -> None:
        self.cache.clear()
        self.model.forward(self.ids, self.cache, last_only=True, out=self.out)

    def peakmem_prefill(self, weights: str, tokens: int) -> None:
        self.model.forward(self.ids, self.cache, last_only=True, out=self.out)


class Decode(_Model):
    """One token after ``cached`` others."""

    params: Any = (_LAYOUTS, [16, 1024])
    param_names = ("weights", "cached")

    def setup(self, weights: str, cached: int) -> None:
        super().setup(weights, cached)
        self.model.forward(self.ids, self.cache, last_only=True)

    def time_token(self, weights: str, cached: int) -> None:
        self.cache.truncate(cached)
        self.model.forward([1], self.cache, last_only=True, out=self.out)


class Drift:
    """Largest error of a logit, against float32 weights: the cost of 16, 8 and 4 bits on random weights."""

    version = "1"
    timeout = 300
    params: Any = (["f16", "int8", "int4"],)
    param_names = ("weights",)
    unit = "logits"

    def track_error(self, weights: str) -> float:
        ids = np.random.default_rng(0).integers(0, 49152, 24)
        exact, other = (Llama(PRESETS["smollm2-135m"], layout=layout) for layout in ("f32", weights))
        return float(np.abs(exact.forward(ids, exact.new_cache(24)) - other.forward(ids, other.new_cache(24))).max())
