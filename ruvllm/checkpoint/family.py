"""Family: all that is particular to the files of one family of models, and the place of each tensor in them.

A family's own file in ``families`` says what its keys mean and how its tensors are called; everything that families
have in common is read in ``hf_config``, ``gguf_config`` and ``loader``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ruvllm.checkpoint.fields import Fields
from ruvllm.checkpoint.names import GGUF_LAYER, GGUF_MODEL, HF_LAYER, HF_MODEL
from ruvllm.model.config import ModelConfig

Choices = dict[str, Any]  # fields of a ModelConfig


class Place(NamedTuple):
    """The place of a tensor of the model in a file.

    rows: those of the file's tensor that belong to it, of so many as ``height``; None: all. expert: its index along the
    first of three axes, of so many as ``experts``. transposed: the file has (inputs, outputs).
    """

    name: str
    rows: range | None = None
    height: int = 0
    expert: int | None = None
    experts: int = 0
    transposed: bool = False

    def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the file's tensor, if the model's has ``shape``."""
        if self.rows is not None:
            shape = (self.height, *shape[1:])
        if self.transposed:
            shape = shape[::-1]
        return shape if self.expert is None else (self.experts, *shape)


class Sizes(NamedTuple):
    """What families need to know of a model before its configuration is complete."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int


def sizes_of(keys: Fields, names: Mapping[str, str]) -> Sizes:
    """The sizes that a file states, under the names of ModelConfig's fields, or those that ``names`` has for them.

    Without head_dim, heads divide the hidden size; without kv heads, there are as many as heads.
    """
    layers, size, count, kv_count, dim = (
        names.get(field, field)
        for field in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    hidden, heads = keys.require(size, int), keys.require(count, int)
    head_dim, kv_heads = keys.get(dim, int), keys.get(kv_count, int)
    if head_dim is None:
        if heads < 1 or hidden % heads:
            raise keys.error(count, heads, f"a divisor of {keys.prefix}{size} = {hidden}, or {dim} given")
        head_dim = hidden // heads
    return Sizes(keys.require(layers, int), hidden, heads, heads if kv_heads is None else kv_heads, head_dim)


Fused = Callable[[ModelConfig], dict[str, Place]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family's files. ``{x}`` in a tensor's name is the number of an expert; without it experts are stacked.

    Args:
        model_type: in config.json; also the name of the family.
        classes: what ``architectures`` in config.json may hold.
        architecture: ``general.architecture`` of a GGUF file.
        hf_choices: from the keys of config.json and the sizes, the fields of ModelConfig that are not common to all.
        gguf_choices: the same from GGUF metadata, whose keys are read without the architecture's name. Of families
            with one architecture the first in ``FAMILIES`` reads them; it may say the ``model_type`` of another.
        gguf_values: the reverse: keys without the architecture's name, for a configuration.
        defaults: keys of config.json whose default in transformers is not LLaMA's.
        hf_names, gguf_names: names of a layer's tensors where they differ from LLaMA's.
        hf_fused, gguf_fused: parts of a layer that are stored in a larger tensor.
        activations: what ``hidden_act`` may be; empty: ``hf_choices`` sees to it.
        interleaved: GGUF files hold the rows of q and k with the two of a RoPE pair as neighbours.
        norm_offset: added to a norm's weight from safetensors.
        partial_rotary: ``partial_rotary_factor`` may rotate a part of each head.
    """

    model_type: str
    classes: tuple[str, ...]
    architecture: str
    hf_choices: Callable[[Fields, Sizes], Choices] = lambda keys, sizes: {}
    gguf_choices: Callable[[Fields, Sizes], Choices] = lambda meta, sizes: {}
    gguf_values: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}
    defaults: Mapping[str, Any] = field(default_factory=dict)
    hf_names: Mapping[str, str] = field(default_factory=dict)
    gguf_names: Mapping[str, str] = field(default_factory=dict)
    hf_fused: Fused = lambda config: {}
    gguf_fused: Fused = lambda config: {}
    activations: tuple[str, ...] = ("silu", "swish")
    interleaved: bool = False
    norm_offset: float = 0.0
    partial_rotary: bool = False

    def hf_places(self, config: ModelConfig) -> dict[str, Place]:
        """The place of each tensor in safetensors, by canonical name."""
        return _places(config, HF_MODEL, HF_LAYER | dict(self.hf_names), self.hf_fused(config), "model.layers")

    def gguf_places(self, config: ModelConfig) -> dict[str, Place]:
        """The place of each tensor in a GGUF file, by canonical name."""
        return _places(config, GGUF_MODEL, GGUF_LAYER | dict(self.gguf_names), self.gguf_fused(config), "blk")


def _places(
    config: ModelConfig, model: Mapping[str, str], layer: Mapping[str, str], fused: Mapping[str, Place], prefix: str
) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for name in config.tensor_shapes():
        if not name.startswith("layers."):
            places[name] = Place(model[name])
            continue
        _, number, part = name.split(".", 2)
        place = _layer_place(config, layer, fused, part)
        places[name] = place._replace(name=f"{prefix}.{number}.{place.name}")
    return places


def _layer_place(config: ModelConfig, layer: Mapping[str, str], fused: Mapping[str, Place], part: str) -> Place:
    pieces = part.split(".")
    if pieces[0] != "experts":
        return fused.get(part) or Place(layer[part])
    assert config.experts is not None
    x, kind = int(pieces[1]), f"experts.{pieces[2]}"
    place = fused.get(kind) or Place(layer[kind])
    if "{x}" in place.name:
        return place._replace(name=place.name.format(x=x))
    return place._replace(expert=x, experts=config.experts.count)


def fused_qkv(name: str) -> Fused:
    """q, k and v stacked in one tensor."""

    def places(config: ModelConfig) -> dict[str, Place]:
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        bounds = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
        return {part: Place(name, range(*rows), q + 2 * kv) for part, rows in bounds.items()}

    return places


def fused_gate_up(name: str) -> Fused:
    """Gate above up in one tensor."""

    def places(config: ModelConfig) -> dict[str, Place]:
        F = config.intermediate_size
        return {"gate": Place(name, range(F), 2 * F), "up": Place(name, range(F, 2 * F), 2 * F)}

    return places


def both(first: Fused, second: Fused) -> Fused:
    """The places of two."""
    return lambda config: first(config) | second(config)
