"""The named arrays of a model, found by running its layer code: what traces keep and edits change."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from ruvllm.kernels import tape as t
from ruvllm.model.config import ModelConfig
from ruvllm.model.layer import Decoder
from ruvllm.model.ops.recorder import Recorder
from ruvllm.model.ops.recording import Pass
from ruvllm.model.ops.schedule import Value

# What a name means, by its end. Layer code may give others.
_MEANINGS = {
    "embed": "embedded tokens, as the first layer reads them",
    "residual": "residual stream, before the layer",
    "attention.norm": "normalised input of attention",
    "attention.normalised": "that input before the norm's weights",
    "attention.q": "queries, with bias, before their norm and rotation",
    "attention.k": "keys, with bias, before their norm and rotation",
    "attention.v": "values, with bias",
    "attention.rotated_q": "queries as scores are computed from them",
    "attention.rotated_k": "keys as scores are computed from them, and as the cache gets them",
    "attention.scores": "scores of each query with each position, before the softmax; -inf where it sees none",
    "attention.pattern": "weights with which each query reads each position",
    "attention.heads": "what each head has read: weighted sums of values",
    "attention.before_norm": "output of attention, before the norm behind it",
    "attention.out": "what attention adds to the residual stream",
    "residual_mid": "residual stream, between attention and feed-forward",
    "mlp.norm": "normalised input of the feed-forward network",
    "mlp.normalised": "that input before the norm's weights",
    "mlp.gate": "gate, before the activation",
    "mlp.up": "what the gate multiplies",
    "mlp.hidden": "activation(gate) * up",
    "mlp.router": "the router's score of each expert",
    "mlp.experts.hidden": "activation(gate) * up of each token's experts, the best first",
    "mlp.experts.out": "output of each token's experts, the best first, before their weights",
    "mlp.shared.gate": "gate of the shared expert, before the activation",
    "mlp.shared.up": "what that gate multiplies",
    "mlp.shared.hidden": "activation(gate) * up of the shared expert",
    "mlp.shared.out": "what the shared expert contributes",
    "mlp.before_norm": "output of the feed-forward network, before the norm behind it",
    "mlp.out": "what the feed-forward network adds to the residual stream",
    "final.residual": "residual stream, after the last layer",
    "final.norm": "normalised input of the head",
    "final.normalised": "that input before the norm's weights",
    "logits": "logits of the next token",
}
# TransformerLens' names. Its arrays begin with an axis of the batch, these have none.
_LENS = {
    "residual": ("hook_resid_pre",), "residual_mid": ("hook_resid_mid",), "attention.q": ("attn.hook_q",),
    "attention.k": ("attn.hook_k",), "attention.v": ("attn.hook_v",), "attention.rotated_q": ("attn.hook_rot_q",),
    "attention.rotated_k": ("attn.hook_rot_k",), "attention.scores": ("attn.hook_attn_scores",),
    "attention.pattern": ("attn.hook_pattern",), "attention.heads": ("attn.hook_z",),
    "attention.out": ("hook_attn_out",), "mlp.gate": ("mlp.hook_pre",), "mlp.up": ("mlp.hook_pre_linear",),
    "attention.normalised": ("ln1.hook_normalized",), "mlp.normalised": ("ln2.hook_normalized",),
    "mlp.hidden": ("mlp.hook_post",), "mlp.out": ("hook_mlp_out",),
}  # fmt: skip
_OF_HEADS = ("q", "k", "v", "rotated_q", "rotated_k", "heads")
READ = (".scores", ".pattern")  # (H, T, S): how each token reads S positions
_NORMS = {"attention.norm": "residual", "mlp.norm": "residual_mid", "final.norm": "residual"}  # and what they read


@dataclass(frozen=True)
class Point:
    """A named array: its axes behind the first, which counts tokens, and its other names.

    layer: None outside of layers. source: what an array that is computed only on request is computed
    from. router: of arrays with a row for each expert of a token, sorted by expert, the name of the scores that chose
    them; their first axis here is that of the token's experts.
    """

    name: str
    axes: tuple[int, ...]
    meaning: str
    aliases: tuple[str, ...] = ()
    layer: int | None = None
    source: str | None = None
    router: str | None = None

    @property
    def shape(self) -> str:
        """The shape as text: "(T, 8, 64)"."""
        axes = (self.axes[0], "T", "S") if self.name.endswith(READ) else ("T", *self.axes)
        return f"({', '.join(map(str, axes))})"

    @property
    def derived(self) -> bool:
        """Whether it is computed only on request: it can be read, not edited."""
        return self.source is not None

    @property
    def row_bytes(self) -> int:
        """Bytes of one token."""
        return 4 * int(np.prod(self.axes))


Points = Mapping[str, Point]


class _Listing(Recorder):
    """Notes the arrays that layer code names."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.named: dict[str, Value] = {}

    def name(self, x: Value, name: str) -> Value:
        """x."""
        if name in self.named:
            raise ValueError(f"name: the layer code gives {name!r} to two arrays")
        self.named[name] = x
        return x


def points_of(decoder: Decoder, config: ModelConfig) -> dict[str, Point]:
    """The named arrays of a model in the order in which they are computed."""
    listing = _Listing(Pass.PROMPT, np.float32, {})
    decoder(listing, listing.source_of(config.hidden_size))
    found: dict[str, Point] = {}
    for name, value in listing.named.items():
        end, router = _end(name), name.partition("experts.")[0] + "router"
        if value.count > t.EACH and router in found:
            found[name] = _point(name, (value.count - t.EACH, value.width), config, router=router)
            continue
        if value.count not in (t.TOKENS, t.LOGIT_ROWS):
            raise ValueError(f"name: expected an array with a row for each token, {name!r} has others")
        if end == "attention.heads":
            at = name.removesuffix(".heads")
            for read in READ:
                found[at + read] = _point(at + read, (config.num_attention_heads,), config, f"{at}.rotated_q")
        if end in _NORMS:
            source = name.removesuffix(end.removeprefix("final.")) + _NORMS[end]
            found[f"{name}alised"] = _point(f"{name}alised", (value.width,), config, source)
        per_head = end.rpartition(".")[2] in _OF_HEADS and value.width % config.head_dim == 0
        axes = (value.width // config.head_dim, config.head_dim) if per_head else (value.width,)
        found[name] = _point(name, axes, config)
    return found


def found_by(points: Points, pattern: str) -> list[str]:
    """The names that a glob, a name or an alias means; none if there is none."""
    if pattern in points:
        return [pattern]
    return [p.name for p in points.values() if any(fnmatchcase(name, pattern) for name in (p.name, *p.aliases))]


def matching(points: Points, pattern: str) -> list[str]:
    """The names that a glob, a name or an alias means.

    Raises KeyError with the nearest names if there is none.
    """
    found = found_by(points, pattern)
    if not found:
        every = [name for p in points.values() for name in (p.name, *p.aliases)]
        near = difflib.get_close_matches(pattern, every, 3, 0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise KeyError(f"{pattern!r}: no array has this name{hint} (names() lists all)")
    return found


def _end(name: str) -> str:
    """A name without its layer."""
    return re.sub(r"^layers\.\d+\.", "", name)


def _point(
    name: str, axes: tuple[int, ...], config: ModelConfig, source: str | None = None, router: str | None = None
) -> Point:
    end, at = _end(name), re.match(r"layers\.(\d+)\.", name)
    layer = None if at is None else int(at[1])
    aliases = [] if layer is None else [f"blocks.{layer}.{alias}" for alias in _LENS.get(end, ())]
    if end == "attention.heads":
        aliases.append(f"layers.{layer}.heads")
    if name == "embed":
        aliases.append("hook_embed")
    if name == "final.normalised":
        aliases.append("ln_final.hook_normalized")
    last = config.num_hidden_layers - 1
    if end == "residual" and layer:
        aliases.append(f"blocks.{layer - 1}.hook_resid_post")
    if name == "final.residual":
        aliases.append(f"blocks.{last}.hook_resid_post")
    return Point(name, axes, _MEANINGS.get(end, ""), tuple(aliases), layer, source, router)
