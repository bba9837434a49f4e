"""How large a KV cache is. Nothing here loads the compiler: `ruvllm memory` answers at once."""

from __future__ import annotations

from collections.abc import Iterable

from ruvllm.model.config import ModelConfig

PREFILL_TOKENS = 126  # most tokens per forward pass, whole tiles of six
FEW_TOKENS = 12  # most tokens of a pass in which every thread computes norms and the like of all rows: one token block
BLOCK = 16  # positions whose keys are interleaved, elements to which a value is padded: LANES of the kernels
CHUNK = 256  # positions per step of attention: CHUNK of the kernels

_NUMBER_BYTES = {"f32": 4, "f16": 2, "int8": 1}
KV_TYPES = tuple(_NUMBER_BYTES)
_SCALES_BYTES = {"f32": 0, "f16": 0, "int8": 8}  # of a key and of a value


def chosen_kv(kv: str, layouts: Iterable[str]) -> str:
    """The precision of a KV cache: "auto" is float32 where all matrices of the model are, else 16 bits."""
    if kv != "auto":
        return kv
    return "f32" if all(layout == "f32" for layout in layouts) else "f16"


def capacities(config: ModelConfig, max_tokens: int) -> list[int]:
    """Positions that each layer stores: all, or of a windowed layer those that any pass can see."""
    whole = -(-max_tokens // BLOCK) * BLOCK
    windows = (config.window(layer) for layer in range(config.num_hidden_layers))
    return [min(whole, whole if w is None else -(-(w + PREFILL_TOKENS) // CHUNK) * CHUNK) for w in windows]


def key_value_bytes(config: ModelConfig, kv: str = "f32") -> int:
    """Bytes of a key and a value of one head at one position."""
    value = -(-config.head_dim // BLOCK) * BLOCK
    return (config.head_dim + value) * _NUMBER_BYTES[kv] + _SCALES_BYTES[kv]


def cache_bytes(config: ModelConfig, max_tokens: int, kv: str = "f32") -> int:
    """Bytes of the buffers of a KV cache for ``max_tokens`` positions."""
    return sum(capacities(config, max_tokens)) * config.num_key_value_heads * key_value_bytes(config, kv)
