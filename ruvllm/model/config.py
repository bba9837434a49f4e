"""The configuration of a LLaMA-family model: its sizes, its rotary embedding, its variants, its memory.

Field names are those of Hugging Face `transformers`. A `ModelConfig` that exists is valid: every
value is checked once, here, whatever file or program it came from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ruvllm._brief import brief
from ruvllm.errors import RuvllmError, printable

ROPE_SCALINGS = (None, "linear", "ntk", "llama3", "factors")

# Larger than any model that one machine runs, small enough that no product of two of them overflows 64 bits.
_LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 4096,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 1024,
    "max_position_embeddings": 1 << 31,
    "sliding_window": 1 << 31,
    "rope.original_max_position": 1 << 31,
}

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip

GROUP = 32  # weights that share one scale in the INT8 and INT4 estimates
SCALE_BYTES = 2  # a float16 scale


class ConfigError(RuvllmError, ValueError):
    """A configuration value that no model can have: `field`, what was `found`, what was `expected`."""

    def __init__(self, field: str, found: object, expected: str) -> None:
        self.field = field
        self.found = found
        self.expected = expected
        super().__init__(field, found, expected)

    def __str__(self) -> str:
        return f"{self.field}: found {printable(repr(self.found))}, expected {self.expected}"


def _integer(name: str, value: Any) -> None:
    high = _LIMITS[name]
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= high:
        raise ConfigError(name, value, f"an integer from 1 to {high}")


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(name, value, "True or False")


def _real(name: str, value: Any, low: float, high: float) -> None:
    """Require low < value <= high; NaN fails, being in no interval."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high:
        raise ConfigError(name, value, f"a number above {low:g} and at most {high:g}")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: pair i of a head of D values turns by `position * inv_freq[i]`.

    With base[i] = theta ** (-2i / D), i = 0 .. D/2 - 1, `scaling` says what inv_freq is:

    - None: base[i].
    - "linear": base[i] / factor (position interpolation).
    - "ntk": the same formula with theta * factor ** (D / (D - 2)) for theta (fixed NTK-aware scaling).
    - "llama3": base[i] / factor for wavelengths 2π/base[i] above original_max_position / low_freq_factor, base[i]
      below original_max_position / high_freq_factor, and between them interpolated linearly in 1 / wavelength.
    - "factors": base[i] / factors[i], one divisor a pair (the tensor `rope_freqs.weight` of a GGUF file).

    Source: Su et al. 2021 (RoPE), Chen et al. 2023 (linear), Llama 3.1's reference code (llama3).
    Raises ConfigError (a ValueError) when a value is impossible.
    """

    theta: float = 10000.0
    scaling: str | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    factors: tuple[float, ...] | None = None  # (D/2,)

    __repr__ = brief

    def __post_init__(self) -> None:
        _real("rope.theta", self.theta, 0.0, 1e30)
        if self.scaling not in ROPE_SCALINGS:
            raise ConfigError("rope.scaling", self.scaling, "None, 'linear', 'ntk', 'llama3' or 'factors'")
        _real("rope.factor", self.factor, 0.0, 1e9)
        _real("rope.low_freq_factor", self.low_freq_factor, 0.0, 1e9)
        _real("rope.high_freq_factor", self.high_freq_factor, 0.0, 1e9)
        if self.scaling == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            expected = f"more than low_freq_factor = {self.low_freq_factor:g}"
            raise ConfigError("rope.high_freq_factor", self.high_freq_factor, expected)
        _integer("rope.original_max_position", self.original_max_position)
        if (self.factors is not None) != (self.scaling == "factors"):
            raise ConfigError("rope.factors", self.factors, "one divisor a pair with scaling 'factors', else None")
        for i, factor in enumerate(self.factors or ()):
            _real(f"rope.factors[{i}]", factor, 0.0, 1e9)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a model needs, from `ModelConfig.memory_estimate`.

    parameters: number of weights. fp16: two bytes for each. int8, int4: matrices in whole bytes or nibbles
    with one float16 scale for each group of 32 along a row, vectors (norms, biases) at two bytes.
    kv_bytes_per_token_fp16 / fp32 / int8: keys and values of one position in all layers, two or four bytes a value, or
    one and a float32 scale for each key and each value of a head.
    """

    parameters: int
    fp16: int
    int8: int
    int4: int
    kv_bytes_per_token_fp16: int
    kv_bytes_per_token_fp32: int
    kv_bytes_per_token_int8: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides the shape and the arithmetic of a LLaMA or Mistral model.

    hidden_size is E, intermediate_size F, num_attention_heads H, num_key_value_heads KV, head_dim D,
    vocab_size V; H · D need not equal E. With `sliding_window` W, position p sees positions p-W+1 .. p (None: all
    up to p). `tie_word_embeddings` makes the embedding serve as the output head. attention_bias: biases on q, k, v;
    attention_out_bias: on o; mlp_bias: on gate, up, down.

    Raises ConfigError (a ValueError) naming the field, the value found and what was expected.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        for size in _SIZES:
            _integer(size, getattr(self, size))
        if self.num_attention_heads % self.num_key_value_heads:
            expected = f"a divisor of num_attention_heads = {self.num_attention_heads}"
            raise ConfigError("num_key_value_heads", self.num_key_value_heads, expected)
        if self.head_dim % 2:
            raise ConfigError("head_dim", self.head_dim, "an even number: rotary embedding turns pairs")
        if self.sliding_window is not None:
            _integer("sliding_window", self.sliding_window)
        _real("rms_norm_eps", self.rms_norm_eps, 0.0, 1.0)
        for flag in ("tie_word_embeddings", "attention_bias", "attention_out_bias", "mlp_bias"):
            _boolean(flag, getattr(self, flag))
        self._check_rope()
        self._check_tokens()

    def _check_rope(self) -> None:
        if not isinstance(self.rope, RopeConfig):
            raise ConfigError("rope", self.rope, "a RopeConfig")
        if self.rope.factors is not None and len(self.rope.factors) != self.head_dim // 2:
            expected = f"{self.head_dim // 2} divisors (head_dim / 2)"
            raise ConfigError("rope.factors", f"{len(self.rope.factors)} divisors", expected)
        if self.rope.scaling == "ntk" and self.head_dim == 2:
            raise ConfigError("rope.scaling", "ntk", "another scaling: NTK needs head_dim above 2")

    def _check_tokens(self) -> None:
        if not isinstance(self.eos_token_ids, tuple):
            raise ConfigError("eos_token_ids", self.eos_token_ids, "a tuple of token ids")
        ids = [("eos_token_ids", i) for i in self.eos_token_ids]
        if self.bos_token_id is not None:
            ids.append(("bos_token_id", self.bos_token_id))
        for name, token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.vocab_size:
                raise ConfigError(name, token, f"a token id from 0 to {self.vocab_size - 1}")

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of one layer, by its name within the layer. Matrices are (outputs, inputs)."""
        E, F = self.hidden_size, self.intermediate_size
        HD, KVD = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm": (E,), "q": (HD, E), "k": (KVD, E), "v": (KVD, E), "o": (E, HD),
            "mlp_norm": (E,), "gate": (F, E), "up": (F, E), "down": (E, F),
        }  # fmt: skip
        if self.attention_bias:
            shapes |= {"q_bias": (HD,), "k_bias": (KVD,), "v_bias": (KVD,)}
        if self.attention_out_bias:
            shapes |= {"o_bias": (E,)}
        if self.mlp_bias:
            shapes |= {"gate_bias": (F,), "up_bias": (F,), "down_bias": (E,)}
        return shapes

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the model, by canonical name: `embed`, `norm`, `head`, `layers.{i}.q` ..."""
        shapes: dict[str, tuple[int, ...]] = {"embed": (self.vocab_size, self.hidden_size)}
        layer = self.layer_shapes()
        for i in range(self.num_hidden_layers):
            shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        shapes["norm"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["head"] = (self.vocab_size, self.hidden_size)
        return shapes

    def parameter_count(self) -> int:
        """Number of weights; a tied head counts once."""
        return self._total(math.prod)

    def memory_estimate(self) -> MemoryEstimate:
        """Bytes of the weights at several precisions and of the KV cache per token; see `MemoryEstimate`.

        KV cache of one token: 2 · layers · KV · D values.
        """
        parameters = self.parameter_count()
        kv_values = 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim
        return MemoryEstimate(
            parameters=parameters,
            fp16=2 * parameters,
            int8=self._total(lambda shape: _quantized_bytes(shape, 8)),
            int4=self._total(lambda shape: _quantized_bytes(shape, 4)),
            kv_bytes_per_token_fp16=2 * kv_values,
            kv_bytes_per_token_fp32=4 * kv_values,
            kv_bytes_per_token_int8=kv_values + 4 * kv_values // self.head_dim,
        )

    def _total(self, cost: Callable[[tuple[int, ...]], int]) -> int:
        """Sum of cost(shape) over all tensors of the model."""
        return sum(cost(shape) for shape in self.tensor_shapes().values())


def _quantized_bytes(shape: tuple[int, ...], bits: int) -> int:
    """Bytes of one tensor quantised in groups along its rows; a vector stays at two bytes a value."""
    if len(shape) == 1:
        return 2 * shape[0]
    rows, columns = shape
    return rows * ((columns * bits + 7) // 8 + (columns + GROUP - 1) // GROUP * SCALE_BYTES)


PRESETS: dict[str, ModelConfig] = {
    "llama2-7b": ModelConfig(
        name="LLaMA2-7B", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, head_dim=128, max_position_embeddings=4096,
        rms_norm_eps=1e-5, rope=RopeConfig(theta=10000.0), bos_token_id=1, eos_token_ids=(2,),
    ),
    "llama2-13b": ModelConfig(
        name="LLaMA2-13B", vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
        num_attention_heads=40, num_key_value_heads=40, head_dim=128, max_position_embeddings=4096,
        rms_norm_eps=1e-5, rope=RopeConfig(theta=10000.0), bos_token_id=1, eos_token_ids=(2,),
    ),
    "llama3-8b": ModelConfig(
        name="LLaMA3-8B", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192,
        rms_norm_eps=1e-5, rope=RopeConfig(theta=500000.0), bos_token_id=128000, eos_token_ids=(128001,),
    ),
    "mistral-7b": ModelConfig(
        name="Mistral-7B", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=32768,
        rms_norm_eps=1e-5, rope=RopeConfig(theta=10000.0), sliding_window=4096, bos_token_id=1, eos_token_ids=(2,),
    ),
    "smollm2-135m": ModelConfig(
        name="SmolLM2-135M-Instruct", vocab_size=49152, hidden_size=576, intermediate_size=1536,
        num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
        max_position_embeddings=8192, rms_norm_eps=1e-5, rope=RopeConfig(theta=100000.0),
        tie_word_embeddings=True, bos_token_id=1, eos_token_ids=(2,),
    ),
}  # fmt: skip
