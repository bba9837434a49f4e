"""The model's oracle in float64, which ``lab.drift`` uses too."""

from ruvllm.model.reference import (
    attention,
    inverse_frequencies,
    reference_logits,
    rms_norm,
    rope_angles,
    rotate,
    silu,
    split_heads,
)

__all__ = [
    "attention",
    "inverse_frequencies",
    "reference_logits",
    "rms_norm",
    "rope_angles",
    "rotate",
    "silu",
    "split_heads",
]
