"""Models composed of kernels, in plain Python."""

from ruvllm.model.config import PRESETS, ModelConfig, RopeConfig
from ruvllm.model.kv_cache import KVCache
from ruvllm.model.layer import TransformerLayer
from ruvllm.model.linear import Linear
from ruvllm.model.llama import Llama

__all__ = ["PRESETS", "KVCache", "Linear", "Llama", "ModelConfig", "RopeConfig", "TransformerLayer"]
