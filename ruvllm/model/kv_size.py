"""How large a KV cache is. Nothing here loads the compiler: `ruvllm memory` answers at once."""

from __future__ import annotations

from collections.abc import Iterable

from ruvllm.model.config import ModelConfig

PREFILL_TOKENS = 132  # most tokens per forward pass, whole blocks of twelve
FEW_TOKENS = 12  # most tokens of a pass in which every thread computes norms and the like of all rows: one token block
BLOCK = 16  # positions whose keys are interleaved, elements to which a value is padded: LANES of the kernels
CHUNK = 256  # positions per step of attention: CHUNK of the kernels
HUGE_PAGE = 1 << 21  # bytes

_NUMBER_BYTES = {"f32": 4, "f16": 2, "int8": 1}
KV_TYPES = tuple(_NUMBER_BYTES)
_SCALES_BYTES = {"f32": 0, "f16": 0, "int8": 8}  # bytes of the scales of a key and its value


def chosen_kv(kv: str, layouts: Iterable[str]) -> str:
    """The precision of a KV cache: "auto" is float32 where all matrices of the model are, else 16 bits.

    Raises ValueError for an unknown ``kv``.
    """
    if not isinstance(kv, str) or kv not in ("auto", *KV_TYPES):
        raise ValueError(f"kv: expected one of auto, {', '.join(KV_TYPES)}, found {kv!r}")
    if kv != "auto":
        return kv
    return "f32" if all(layout == "f32" for layout in layouts) else "f16"


def group_windows(config: ModelConfig) -> list[int | None]:
    """The windows of a model's layers, each once; None: all positions."""
    return list(dict.fromkeys(map(config.window, range(config.num_hidden_layers))))


def block_positions(max_tokens: int) -> int:
    """Positions of a block of a cache: those of a chunk, or fewer in a smaller cache."""
    return min(CHUNK, -(-max_tokens // BLOCK) * BLOCK)


def capacity(window: int | None, max_tokens: int) -> int:
    """Positions, in whole blocks, that a layer stores: all, or with a window those that any pass can see."""
    step = block_positions(max_tokens)
    whole = -(-max_tokens // step) * step
    return whole if window is None else min(whole, -(-(window + PREFILL_TOKENS) // CHUNK) * CHUNK)


def capacities(config: ModelConfig, max_tokens: int) -> list[int]:
    """Positions that each layer stores."""
    return [capacity(config.window(layer), max_tokens) for layer in range(config.num_hidden_layers)]


def key_value_bytes(config: ModelConfig, kv: str = "f32") -> int:
    """Bytes of a key and a value of one head at one position."""
    value = -(-config.head_dim // BLOCK) * BLOCK
    return (config.head_dim + value) * _NUMBER_BYTES[kv] + _SCALES_BYTES[kv]


def group_bytes(config: ModelConfig, kv: str, positions: int) -> list[int]:
    """Bytes of a block of so many positions of each group of layers: those with the window of ``group_windows``.

    A large block is whole huge pages, which attention reads faster: each of its pages is one of its own.
    """
    windows = list(map(config.window, range(config.num_hidden_layers)))
    sizes = [windows.count(w) * positions * layer_bytes(config, kv) for w in group_windows(config)]
    return [-(-size // HUGE_PAGE) * HUGE_PAGE if size >= 2 * HUGE_PAGE else size for size in sizes]


def layer_bytes(config: ModelConfig, kv: str) -> int:
    """Bytes of the keys and values of one layer at one position."""
    return config.num_key_value_heads * key_value_bytes(config, kv)


def cache_bytes(config: ModelConfig, max_tokens: int, kv: str = "f32") -> int:
    """Bytes of the blocks of a KV cache for ``max_tokens`` positions."""
    step = block_positions(max_tokens)
    blocks = [capacity(window, max_tokens) // step for window in group_windows(config)]
    return sum(n * size for n, size in zip(blocks, group_bytes(config, kv, step), strict=True))
