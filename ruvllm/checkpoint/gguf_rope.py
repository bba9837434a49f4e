"""Rotary embedding as a GGUF file describes it: metadata, and the tensors of divisors."""

from __future__ import annotations

from ruvllm.checkpoint.family import Family, Sizes
from ruvllm.checkpoint.fields import Fields
from ruvllm.checkpoint.gguf_split import AnyGGUF
from ruvllm.checkpoint.names import GGUF_LONG_FACTORS, GGUF_ROPE_FACTORS, GGUF_SHORT_FACTORS
from ruvllm.errors import ModelFormatError
from ruvllm.model.rope_config import RopeConfig, yarn_attention_factor

# Whether YaRN rounds its limits: GPT-OSS does not. No key of llama.cpp, which always does.
YARN_TRUNCATE = "rope.scaling.yarn_truncate"
_MAX_PAIRS = 512  # half of the largest head_dim: no tensor larger than that is read here


def rope_of(file: AnyGGUF, own: Fields, sizes: Sizes, family: Family) -> RopeConfig:
    """Base, scaling and divisors. llama.cpp divides by a linear factor and by divisors where a file has both."""
    theta = own.get("rope.freq_base", float)
    theta = 10000.0 if theta is None else theta
    dim = own.get("rope.dimension_count", int)
    rotary_dim = dim if family.partial_rotary and dim != sizes.head_dim else None
    scaling, attention = own.get("rope.scaling.type", str), own.get("rope.scaling.attn_factor", float)
    if scaling not in (None, "none", "linear", "yarn", "longrope"):
        raise own.error("rope.scaling.type", scaling, "'none', 'linear', 'yarn' or 'longrope'")
    if GGUF_SHORT_FACTORS in file.tensors:
        return RopeConfig(
            theta=theta, scaling="longrope", factors=_divisors(file, own, GGUF_SHORT_FACTORS),
            long_factors=_divisors(file, own, GGUF_LONG_FACTORS), attention_factor=attention or 1.0,
            original_max_position=own.require("rope.scaling.original_context_length", int), rotary_dim=rotary_dim,
        )  # fmt: skip
    if scaling == "longrope":
        raise own.error("rope.scaling.type", scaling, f"another, without a tensor {GGUF_SHORT_FACTORS!r}")
    factor = own.get("rope.scaling.factor", float)
    if factor is None:
        factor = own.get("rope.scale_linear", float)  # the key's name before August 2023
    if factor is None or factor == 0 or scaling == "none":  # llama.cpp reads 0 as "unscaled"
        factor = 1.0
    if scaling == "yarn":
        original = own.get("rope.scaling.original_context_length", int)
        return RopeConfig(
            theta=theta, scaling="yarn" if own.default(YARN_TRUNCATE, bool, True) else "yarn_unrounded",
            factor=factor, low_freq_factor=1.0, high_freq_factor=32.0,
            original_max_position=own.require("context_length", int) if original is None else original,
            attention_factor=(attention or 1.0) * yarn_attention_factor(factor), rotary_dim=rotary_dim,
        )  # fmt: skip
    own.require_plain("rope.scaling.attn_factor", (1.0,))
    if GGUF_ROPE_FACTORS in file.tensors:
        divisors = tuple(d * factor for d in _divisors(file, own, GGUF_ROPE_FACTORS))
        return RopeConfig(theta=theta, scaling="factors", factors=divisors, rotary_dim=rotary_dim)
    return RopeConfig(theta=theta, scaling=None if factor == 1 else "linear", factor=factor, rotary_dim=rotary_dim)


def _divisors(file: AnyGGUF, own: Fields, name: str) -> tuple[float, ...]:
    expected = "one divisor for each pair of a head"
    if name not in file.tensors:
        raise ModelFormatError(own.path, field=f"tensor {name!r}", found="no such tensor", expected=expected)
    tensor = file.tensor(name)
    if len(tensor.shape) != 1 or tensor.shape[0] > _MAX_PAIRS:
        raise ModelFormatError(own.path, field=f"tensor {name!r} shape", found=tensor.shape, expected=expected)
    return tuple(map(float, tensor.float32()[0]))
