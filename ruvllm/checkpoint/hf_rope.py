"""Rotary embedding in config.json: ``rope_parameters``, or the older ``rope_theta`` and ``rope_scaling``."""

from __future__ import annotations

from collections.abc import Callable

from ruvllm.checkpoint.family import Sizes
from ruvllm.checkpoint.fields import Fields
from ruvllm.model.config import FULL, SLIDING
from ruvllm.model.config_checks import ConfigError
from ruvllm.model.rope_config import RopeConfig, longrope_attention_factor, yarn_attention_factor


def ropes_of(keys: Fields, sizes: Sizes, partial: bool) -> tuple[RopeConfig, RopeConfig | None]:
    """The rotary embedding, and that of windowed layers where ``rope_parameters`` have one for each type of layer.

    As in transformers, a `rope_scaling` that is not empty overrides `rope_parameters`, and values within them
    override those next to them. partial: whether models of this family may rotate a part of a head.
    """
    scaling, parameters = keys.get("rope_scaling", dict) or {}, keys.get("rope_parameters", dict) or {}
    by_type = "layer_types" in keys or "rope_local_base_freq" in keys  # others have one kind of layer
    if by_type and isinstance(parameters.get(FULL), dict):  # ``rope_scaling`` is that of full layers
        nested = Fields(keys.path, parameters, prefix="rope_parameters.")
        full = Fields(keys.path, parameters[FULL] | scaling, f"{nested.prefix}{FULL}.")
        local = Fields(keys.path, _local_theta(keys) | (nested.get(SLIDING, dict) or {}), f"{nested.prefix}{SLIDING}.")
        return _rope(keys, full, sizes, partial), _rope(keys, local, sizes, partial)
    where = "rope_scaling" if scaling else "rope_parameters"
    return _rope(keys, Fields(keys.path, scaling or parameters, prefix=f"{where}."), sizes, partial), None


def _local_theta(keys: Fields) -> dict[str, float]:
    """The base of windowed layers where their own parameters do not say it."""
    theta = keys.get("rope_local_base_freq", float)
    return {} if theta is None else {"rope_theta": theta}


_ORIGINAL = "original_max_position_embeddings"


def _rope(keys: Fields, rope: Fields, sizes: Sizes, partial: bool) -> RopeConfig:
    kind = rope.get("rope_type", str) or rope.get("type", str)
    if kind is None:
        if any(isinstance(value, dict) for value in rope.values.values()):
            raise rope.error("rope_type", "another for each layer type", "one for all layers")
        if rope.get("factor", float) not in (None, 1.0):
            raise rope.error("rope_type", "no such key", "the type of scaling that `factor` belongs to")
        kind = "default"
    if kind == "su" or (kind == "yarn" and "short_factor" in rope):  # Phi 3's older names
        kind = "longrope"
    if kind not in _KINDS:
        raise rope.error("rope_type", kind, ", ".join(map(repr, _KINDS)))
    theta = rope.get("rope_theta", float)
    try:
        return _KINDS[kind](
            keys, rope, keys.default("rope_theta", float, 10000.0) if theta is None else theta,
            _rotary_dim(keys, rope, sizes, partial),
        )  # fmt: skip
    except ConfigError as error:
        name, _, index = error.field.removeprefix("rope.").partition("[")
        raise rope.error(_KEYS.get(name, name) + (f"[{index}" if index else ""), error.found, error.expected) from None


def _rotary_dim(keys: Fields, rope: Fields, sizes: Sizes, partial: bool) -> int | None:
    """How many elements of a head are rotated; None: all."""
    for holder in (rope, keys):
        share = holder.get("partial_rotary_factor", float)
        if share in (None, 1.0):
            continue
        if not partial or not 0 < share < 1:
            expected = "a number up to 1.0" if partial else "1.0: all of a head is rotated"
            raise holder.error("partial_rotary_factor", share, expected)
        return int(sizes.head_dim * share)
    return None


def _original(keys: Fields, rope: Fields) -> int:
    for holder, key in ((keys, _ORIGINAL), (rope, _ORIGINAL), (keys, "max_position_embeddings")):
        found = holder.get(key, int)
        if found is not None:
            if found < 1:
                raise holder.error(key, found, "a positive integer")
            return found
    return keys.require("max_position_embeddings", int)


def _plain(keys: Fields, rope: Fields, theta: float, dim: int | None) -> RopeConfig:
    return RopeConfig(theta=theta, rotary_dim=dim)


def _linear(keys: Fields, rope: Fields, theta: float, dim: int | None) -> RopeConfig:
    return RopeConfig(theta=theta, scaling="linear", factor=rope.require("factor", float), rotary_dim=dim)


def _ntk(keys: Fields, rope: Fields, theta: float, dim: int | None) -> RopeConfig:
    return RopeConfig(theta=theta, scaling="ntk", factor=rope.require("factor", float), rotary_dim=dim)


def _dynamic(keys: Fields, rope: Fields, theta: float, dim: int | None) -> RopeConfig:
    return RopeConfig(
        theta=theta, scaling="dynamic", factor=rope.require("factor", float),
        original_max_position=keys.require("max_position_embeddings", int), rotary_dim=dim,
    )  # fmt: skip


def _llama3(keys: Fields, rope: Fields, theta: float, dim: int | None) -> RopeConfig:
    return RopeConfig(
        theta=theta, scaling="llama3", factor=rope.require("factor", float),
        low_freq_factor=rope.require("low_freq_factor", float),
        high_freq_factor=rope.require("high_freq_factor", float),
        original_max_position=_original(keys, rope), rotary_dim=dim,
    )  # fmt: skip


def _yarn(keys: Fields, rope: Fields, theta: float, dim: int | None) -> RopeConfig:
    original, factor = _original(keys, rope), rope.get("factor", float)
    if factor is None:
        factor = keys.require("max_position_embeddings", int) / original
    attention = rope.get("attention_factor", float)
    if attention is None:
        attention = yarn_attention_factor(factor, rope.get("mscale", float), rope.get("mscale_all_dim", float))
    return RopeConfig(
        theta=theta, scaling="yarn" if rope.default("truncate", bool, True) else "yarn_unrounded", factor=factor,
        low_freq_factor=rope.get("beta_slow", float) or 1.0, high_freq_factor=rope.get("beta_fast", float) or 32.0,
        original_max_position=original, attention_factor=attention, rotary_dim=dim,
    )  # fmt: skip


def _longrope(keys: Fields, rope: Fields, theta: float, dim: int | None) -> RopeConfig:
    original, attention = _original(keys, rope), rope.get("attention_factor", float)
    if attention is None:
        factor = rope.get("factor", float) or keys.require("max_position_embeddings", int) / original
        attention = longrope_attention_factor(factor, original)
    return RopeConfig(
        theta=theta, scaling="longrope", original_max_position=original, attention_factor=attention,
        factors=_numbers(rope, "short_factor"), long_factors=_numbers(rope, "long_factor"), rotary_dim=dim,
    )  # fmt: skip


def _numbers(rope: Fields, key: str) -> tuple[float, ...]:
    found = rope.require(key, list)
    for number in found:
        if not isinstance(number, int | float) or isinstance(number, bool):
            raise rope.error(key, repr(number), "numbers")
    return tuple(map(float, found))


_KINDS: dict[str, Callable[[Fields, Fields, float, int | None], RopeConfig]] = {
    "default": _plain, "linear": _linear, "ntk": _ntk, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn,
    "longrope": _longrope,
}  # fmt: skip
# Fields of RopeConfig whose key has another name.
_KEYS = {
    "theta": "rope_theta", "original_max_position": "original_max_position_embeddings", "factors": "short_factor",
    "long_factors": "long_factor",
}  # fmt: skip
