"""ruvllm: LLM inference kernels in readable Python, compiled by Numba, and the models made of them.

    import ruvllm
    llm = ruvllm.load("smollm2-135m")
    print(llm.chat([{"role": "user", "content": "Why is the sky blue?"}]))

Importing compiles nothing and loads nothing large: each name is fetched when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ruvllm import container, spinning

spinning.shorten()
container.limit_pool()

__version__ = "0.2.0"

if TYPE_CHECKING:
    from ruvllm.checkpoint.hub import pull
    from ruvllm.compiling import warmup
    from ruvllm.errors import (
        ContextFullError,
        DownloadError,
        InsufficientMemoryError,
        ModelFormatError,
        RankError,
        RuvllmError,
    )
    from ruvllm.llm import LLM
    from ruvllm.loading import load
    from ruvllm.model import KVCache, Llama, ModelConfig
    from ruvllm.model.sampling.options import Dry, Mirostat, Sampling, Xtc
    from ruvllm.quantizing import quantize
    from ruvllm.streaming import Generation

_HOMES = {
    "load": "ruvllm.loading",
    "warmup": "ruvllm.compiling",
    "LLM": "ruvllm.llm",
    "Generation": "ruvllm.streaming",
    "pull": "ruvllm.checkpoint.hub",
    "quantize": "ruvllm.quantizing",
    "KVCache": "ruvllm.model",
    "Llama": "ruvllm.model",
    "ModelConfig": "ruvllm.model",
    "Sampling": "ruvllm.model.sampling.options",
    "Dry": "ruvllm.model.sampling.options",
    "Xtc": "ruvllm.model.sampling.options",
    "Mirostat": "ruvllm.model.sampling.options",
    "RuvllmError": "ruvllm.errors",
    "ModelFormatError": "ruvllm.errors",
    "ContextFullError": "ruvllm.errors",
    "DownloadError": "ruvllm.errors",
    "RankError": "ruvllm.errors",
    "InsufficientMemoryError": "ruvllm.errors",
}
_PACKAGES = ("kernels", "model", "checkpoint")

__all__ = [
    "LLM", "ContextFullError", "DownloadError", "Dry", "Generation", "InsufficientMemoryError", "KVCache", "Llama",
    "Mirostat", "ModelConfig", "ModelFormatError", "RankError", "RuvllmError", "Sampling", "Xtc", "load", "pull",
    "quantize", "warmup",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _PACKAGES:
        return import_module(f"ruvllm.{name}")
    raise AttributeError(f"module 'ruvllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, *_PACKAGES])
