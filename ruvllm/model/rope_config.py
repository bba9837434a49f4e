"""RopeConfig: how rotary position embedding rotates the pairs of a head, under each kind of scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ruvllm.brief import brief
from ruvllm.model.config_checks import ConfigError, require_integer, require_real

ROPE_SCALINGS = (None, "linear", "ntk", "llama3", "factors", "yarn", "yarn_unrounded", "dynamic", "longrope")
YARN = ("yarn", "yarn_unrounded")
_WITH_FACTORS = ("factors", "longrope")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: pair i of a head is rotated by ``position * inv_freq[i]``.

    R = rotary_dim is the number of rotated elements, all D of a head by default; the others stay as they are. With
    base[i] = theta ** (-2i / R), i = 0 .. R/2 - 1, ``scaling`` says what inv_freq is:

    - None: base[i].
    - "linear": base[i] / factor (position interpolation).
    - "ntk": the same formula with theta * factor ** (R / (R - 2)) for theta (fixed NTK-aware scaling).
    - "llama3": base[i] / factor for wavelengths 2π/base[i] above original_max_position / low_freq_factor, base[i]
      below original_max_position / high_freq_factor, and between them interpolated linearly in 1 / wavelength.
    - "factors": base[i] / factors[i], one divisor per pair (the tensor `rope_freqs.weight` of a GGUF file).
    - "yarn", "yarn_unrounded": base[i] / factor for pairs that rotate less than low_freq_factor ("beta_slow") times
      within original_max_position, base[i] for those that rotate more than high_freq_factor ("beta_fast") times,
      between them interpolated linearly in i; see ``kernels.rope_inv_freq``.
    - "dynamic": "ntk" with a factor for the context C: factor C / L - (factor - 1), above
      L = original_max_position.
    - "longrope": "factors" up to a context of original_max_position, above it ``long_factors``.

    The context of the last two is the capacity of the KV cache: it is known before the first token, so that a token's
    result does not depend on how many come later. cos and sin are multiplied by ``attention_factor``.

    Source: Su et al. 2021 (RoPE), Chen et al. 2023 (linear), Llama 3.1's reference code (llama3), Peng et al. 2023
    (YaRN), Ding et al. 2024 (LongRoPE), transformers (dynamic).
    Raises ConfigError (a ValueError) when a value is impossible.
    """

    theta: float = 10000.0
    scaling: str | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    factors: tuple[float, ...] | None = None  # (R/2,)
    long_factors: tuple[float, ...] | None = None  # (R/2,)
    attention_factor: float = 1.0
    rotary_dim: int | None = None

    __repr__ = brief

    def __post_init__(self) -> None:
        require_real("rope.theta", self.theta, 0.0, 1e30)
        if self.scaling not in ROPE_SCALINGS:
            raise ConfigError("rope.scaling", self.scaling, "one of " + ", ".join(map(repr, ROPE_SCALINGS)))
        for name in ("factor", "low_freq_factor", "high_freq_factor", "attention_factor"):
            require_real(f"rope.{name}", getattr(self, name), 0.0, 1e9)
        if self.scaling in ("llama3", *YARN) and self.high_freq_factor <= self.low_freq_factor:
            expected = f"more than low_freq_factor = {self.low_freq_factor:g}"
            raise ConfigError("rope.high_freq_factor", self.high_freq_factor, expected)
        if self.scaling in YARN and self.theta <= 1:
            raise ConfigError("rope.theta", self.theta, "more than 1 with YaRN")
        require_integer("rope.original_max_position", self.original_max_position)
        if self.rotary_dim is not None:
            require_integer("rotary_dim", self.rotary_dim)
        if (self.factors is not None) != (self.scaling in _WITH_FACTORS):
            raise ConfigError("rope.factors", self.factors, "one divisor per pair with scaling 'factors', else None")
        if (self.long_factors is not None) != (self.scaling == "longrope"):
            raise ConfigError("rope.long_factors", self.long_factors, "one divisor per pair with 'longrope', else None")
        for name in ("factors", "long_factors"):
            for i, factor in enumerate(getattr(self, name) or ()):
                require_real(f"rope.{name}[{i}]", factor, 0.0, 1e9)

    def require_head(self, head_dim: int) -> None:
        """Raise ConfigError unless heads of ``head_dim`` elements can be rotated this way."""
        dim = self.rotary_dim or head_dim
        if dim % 2:
            raise ConfigError("head_dim", head_dim, "an even number: rotary embedding rotates pairs")
        if dim > head_dim:
            raise ConfigError("rotary_dim", dim, f"at most head_dim = {head_dim}")
        for name in ("factors", "long_factors"):
            found = getattr(self, name)
            if found is not None and len(found) != dim // 2:
                raise ConfigError(f"rope.{name}", f"{len(found)} divisors", f"{dim // 2} divisors (head_dim / 2)")
        if self.scaling in ("ntk", "dynamic") and dim == 2:
            raise ConfigError("rope.scaling", self.scaling, "another scaling: NTK needs head_dim above 2")

    def for_context(self, capacity: int) -> RopeConfig:
        """The scaling for a KV cache of so many positions: "dynamic" and "longrope" depend on it."""
        original = self.original_max_position
        if self.scaling == "dynamic":
            factor = self.factor * max(capacity, original) / original - (self.factor - 1)
            return replace(self, scaling="ntk", factor=factor)
        if self.scaling == "longrope":
            factors = self.long_factors if capacity > original else self.factors
            return replace(self, scaling="factors", factors=factors, long_factors=None)
        return self


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """YaRN's default factor of cos and sin: 1 + 0.1 ln(factor), or a quotient of two such."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


def longrope_attention_factor(factor: float, original: int) -> float:
    """LongRoPE's default factor of cos and sin: sqrt(1 + ln(factor) / ln(original))."""
    return 1.0 if factor <= 1 or original < 2 else math.sqrt(1 + math.log(factor) / math.log(original))
