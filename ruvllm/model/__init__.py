"""Models composed of kernels, in plain Python."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ruvllm.model.config import ModelConfig, RopeConfig
    from ruvllm.model.kv_cache import KVCache
    from ruvllm.model.layer import TransformerLayer
    from ruvllm.model.linear import Linear
    from ruvllm.model.llama import Llama
    from ruvllm.model.lora import LoraAdapter, LoraConfig, MicroLora
    from ruvllm.model.presets import PRESETS

# Fetched when first used: a configuration can be read without loading the compiler.
_HOMES = {
    "PRESETS": "presets", "ModelConfig": "config", "RopeConfig": "config", "KVCache": "kv_cache",
    "TransformerLayer": "layer", "Linear": "linear", "Llama": "llama", "LoraAdapter": "lora", "LoraConfig": "lora",
    "MicroLora": "lora",
}  # fmt: skip

__all__ = [
    "PRESETS", "KVCache", "Linear", "Llama", "LoraAdapter", "LoraConfig", "MicroLora", "ModelConfig", "RopeConfig",
    "TransformerLayer",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"ruvllm.model.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'ruvllm.model' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
