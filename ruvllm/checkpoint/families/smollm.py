"""SmolLM3: every fourth layer without rotary embedding."""

from __future__ import annotations

from ruvllm.checkpoint.families.choices import biased, windows
from ruvllm.checkpoint.family import Choices, Family, Sizes
from ruvllm.checkpoint.fields import Fields

_EVERY = 4


def _smollm3(keys: Fields, sizes: Sizes) -> Choices:
    every = keys.default("no_rope_layer_interval", int, _EVERY)
    if every < 1:
        raise keys.error("no_rope_layer_interval", every, "a positive integer")
    rotated = keys.get("no_rope_layers", list)  # the key's name says the opposite: 1 means a layer that rotates
    if rotated is None:
        rotated = [int((i + 1) % every != 0) for i in range(sizes.layers)]
    if len(rotated) != sizes.layers or any(value not in (0, 1) for value in rotated):
        raise keys.error("no_rope_layers", rotated, f"0 or 1 for each of {sizes.layers} layers")
    window = keys.get("sliding_window", int) if keys.get("use_sliding_window", bool) else None
    return {
        **biased(keys), "mlp_bias": bool(keys.get("mlp_bias", bool)),
        "no_rope_layers": tuple(i for i, value in enumerate(rotated) if not value),
        **windows(keys, sizes, window, lambda i: not rotated[i]),
    }  # fmt: skip


def _without(layers: int) -> tuple[int, ...]:
    return tuple(range(_EVERY - 1, layers, _EVERY))


SMOLLM3 = Family(
    model_type="smollm3", classes=("SmolLM3ForCausalLM",), architecture="smollm3", hf_choices=_smollm3,
    gguf_choices=lambda meta, sizes: {"no_rope_layers": _without(sizes.layers)},
    interleaved=True,
    defaults={
        "tie_word_embeddings": True, "rope_theta": 2e6, "max_position_embeddings": 32768, "bos_token_id": 128000,
        "eos_token_id": 128001, "num_key_value_heads": 4,
    },
)  # fmt: skip
