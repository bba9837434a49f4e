"""One token through one or several transformer layers of three models, in float32 and in 4 bits."""

from typing import Any

from ruvllm.model.weights import weight_bytes
from ruvllm.report import layers
from ruvllm.report.bench import lacking_memory


class Layer:
    """Layers, each in its own memory, with a small head; the KV cache holds 16 positions.

    Several layers of one model; skipped where they would not fit into memory.
    """

    version = "1"
    timeout = 600
    params: Any = (["llama2-7b", "llama3-8b", "mistral-7b"], ["f32", "int4"], [1, 4, 8, 16])
    param_names = ("model", "weights", "layers")
    number = 1
    repeat = (3, 20, 10.0)

    def setup(self, name: str, weights: str, count: int) -> None:
        config = layers.layer_config(name, count)
        if (count > 1 and name != "llama2-7b") or lacking_memory(weight_bytes(config, weights)):
            raise NotImplementedError
        self.call = layers.OneToken(layers.layer_model(config, weights))
        self.call()

    def time_token(self, name: str, weights: str, count: int) -> None:
        self.call()
