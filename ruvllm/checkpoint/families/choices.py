"""Choices that several families make: windows by layer, experts, biases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ruvllm.checkpoint.family import Choices, Sizes
from ruvllm.checkpoint.fields import Fields
from ruvllm.model.config import FULL, SLIDING, ExpertsConfig, ModelConfig


def windows(keys: Fields, sizes: Sizes, window: int | None, slides: Callable[[int], bool]) -> Choices:
    """A window, and the layers that have one: those of ``layer_types``, or by default those that slide."""
    types = keys.get("layer_types", list)
    if types is not None and len(types) != sizes.layers:
        raise keys.error("layer_types", f"{len(types)} types", f"one for each of {sizes.layers} layers")
    if types is None:
        types = [SLIDING if window is not None and slides(i) else FULL for i in range(sizes.layers)]
    return window_choices(window, types)


def window_choices(window: int | None, types: list[str]) -> Choices:
    """A window and the type of each layer, in their shortest form; ModelConfig checks them."""
    if all(kind == FULL for kind in types):
        return {}
    alike = window is not None and all(kind == SLIDING for kind in types)
    return {"sliding_window": window, "layer_types": () if alike else tuple(types)}


def gguf_windows(meta: Fields, sizes: Sizes, window: int | None, period: int) -> Choices:
    """The same from GGUF: every ``period``th layer is full, unless ``sliding_window_pattern`` says another period, or
    of each layer whether it has a window."""
    key = "attention.sliding_window_pattern"
    found = meta.values.get(key)
    if isinstance(found, np.ndarray) and found.dtype == bool:
        if len(found) < sizes.layers:
            raise meta.error(key, f"{len(found)} values", f"one for each of {sizes.layers} layers")
        slides = found.tolist()
    else:
        period = meta.get(key, int) or period
        slides = [(i + 1) % period != 0 for i in range(sizes.layers)]
    types = [SLIDING if window is not None and slides[i] else FULL for i in range(sizes.layers)]
    return window_choices(window, types)


def gguf_window_values(config: ModelConfig, period: int) -> dict[str, Any]:
    """GGUF metadata of windows by layer; nothing about the layers where every ``period``th is full."""
    if config.sliding_window is None:
        return {}
    slides = [config.window(i) is not None for i in range(config.num_hidden_layers)]
    usual = slides == [(i + 1) % period != 0 for i in range(config.num_hidden_layers)]
    pattern = {} if usual else {"attention.sliding_window_pattern": slides}
    return {"attention.sliding_window": config.sliding_window, **pattern}


def biased(keys: Fields) -> Choices:
    """``attention_bias``, which in transformers is one switch for q, k, v and o."""
    bias = bool(keys.get("attention_bias", bool))
    return {"attention_bias": bias, "attention_out_bias": bias}


def sparse_layers(keys: Fields, sizes: Sizes) -> tuple[int, ...] | None:
    """The layers with experts by decoder_sparse_step and mlp_only_layers; None: all."""
    step, dense = keys.default("decoder_sparse_step", int, 1), keys.get("mlp_only_layers", list) or []
    if step < 1:
        raise keys.error("decoder_sparse_step", step, "a positive integer")
    for layer in dense:
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < sizes.layers:
            raise keys.error("mlp_only_layers", layer, f"layers from 0 to {sizes.layers - 1}")
    layers = tuple(i for i in range(sizes.layers) if i not in dense and (i + 1) % step == 0)
    return None if len(layers) == sizes.layers else layers


def gguf_experts(meta: Fields, size_key: str = "expert_feed_forward_length", **choices: Any) -> Choices:
    """The experts that GGUF metadata describe."""
    count, used = meta.require("expert_count", int), meta.require("expert_used_count", int)
    size = meta.require(size_key, int)
    return {"experts": ExpertsConfig(count=count, per_token=used, intermediate_size=size, **choices)}


def gguf_expert_values(config: ModelConfig) -> dict[str, Any]:
    """GGUF metadata of experts."""
    experts = config.experts
    if experts is None:
        return {}
    values = {
        "expert_count": experts.count, "expert_used_count": experts.per_token,
        "expert_feed_forward_length": experts.intermediate_size,
    }  # fmt: skip
    if experts.shared_intermediate_size:
        values["expert_shared_feed_forward_length"] = experts.shared_intermediate_size
    return values
