"""Checks of configuration values, and the error that names the field."""

from __future__ import annotations

from typing import Any

from ruvllm.errors import RuvllmError, printable

# Larger than any model that one machine runs, small enough that no product of two of them overflows 64 bits.
_LIMITS = {
    "vocab_size": 1 << 24, "hidden_size": 1 << 20, "intermediate_size": 1 << 22, "num_hidden_layers": 4096,
    "num_attention_heads": 4096, "num_key_value_heads": 4096, "head_dim": 1024, "rotary_dim": 1024,
    "experts.count": 512, "experts.per_token": 512, "experts.intermediate_size": 1 << 22,
}  # fmt: skip
_MOST = 1 << 31  # the limit of any other integer


class ConfigError(RuvllmError, ValueError):
    """An invalid configuration value: `field`, what was `found`, what was `expected`."""

    def __init__(self, field: str, found: object, expected: str) -> None:
        self.field = field
        self.found = found
        self.expected = expected
        super().__init__(field, found, expected)

    def __str__(self) -> str:
        return f"{self.field}: found {printable(repr(self.found))}, expected {self.expected}"


def require_integer(name: str, value: Any) -> None:
    """Require a positive integer below the field's limit."""
    high = _LIMITS.get(name, _MOST)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= high:
        raise ConfigError(name, value, f"an integer from 1 to {high}")


def require_boolean(name: str, value: Any) -> None:
    """Require True or False."""
    if not isinstance(value, bool):
        raise ConfigError(name, value, "True or False")


def require_real(name: str, value: Any, low: float, high: float) -> None:
    """Require low < value <= high; NaN fails, being in no interval."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high:
        raise ConfigError(name, value, f"a number above {low:g} and at most {high:g}")
