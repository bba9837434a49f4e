"""Attribution: what each part of a model adds to the difference of two logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ruvllm.brief import brief
from ruvllm.display import Table, axis
from ruvllm.model.checks import is_integer
from ruvllm.model.llama import Llama
from ruvllm.tracing.labels import shown, text_of

_SHOWN = 15  # parts of a printed table


class _Arrays(Protocol):
    """A trace."""

    def __getitem__(self, name: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Attribution(Table):
    """What is added to logit(wanted) - logit(other), the last norm's divisor held fixed, before any softcap.

    blocks: of the embedding, and of each layer's attention and feed-forward network; they sum to ``difference``.
    heads: (layers, H), the parts of attention; what is left of it is the bias of its output. logits: the difference of
    the model's own logits.
    """

    wanted: str
    other: str
    difference: float
    blocks: dict[str, float]
    heads: np.ndarray
    logits: float

    __repr__ = brief

    @property
    def unexplained(self) -> float:
        """``logits`` less ``blocks``: activations rounded for quantised weights, a softcap, an edited residual."""
        return self.logits - sum(self.blocks.values())

    def heading(self) -> str:
        """One line: the two tokens and their difference."""
        left = f"{self.unexplained:+.3f}"
        parts = "" if float(left) == 0 else f" {sum(self.blocks.values()):.3f} from parts and {left} unexplained"
        return f"logit {shown(self.wanted)} - logit {shown(self.other)} = {self.logits:.3f}, of which{parts}"

    def rows(self) -> list[tuple[str, ...]]:
        """The parts that count most, heads apart; the first row has the headings."""
        parts = self.blocks | {
            f"layers.{i}.heads.{h}": float(self.heads[i, h]) for i, h in np.ndindex(*self.heads.shape)
        }
        parts = {name: value for name, value in parts.items() if not name.endswith("attention.out")}
        best = sorted(parts, key=lambda name: -abs(parts[name]))[:_SHOWN]
        return [("part", "adds"), *((name, f"{parts[name]:+.3f}") for name in best)]

    def plot(self, ax: Any = None) -> Any:
        """What each head (columns) of each layer adds, with the feed-forward network last; returns the axis."""
        ax = axis(ax)
        mlps = np.array([[self.blocks[f"layers.{i}.mlp.out"]] for i in range(len(self.heads))])
        values = np.concatenate([self.heads, mlps], axis=1)
        most = np.abs(values).max() or 1.0
        picture = ax.imshow(values, cmap="RdBu", vmin=-most, vmax=most, aspect="auto", origin="lower")
        ax.axvline(self.heads.shape[1] - 0.5, color="black", linewidth=0.5)
        step = -(-self.heads.shape[1] // 16)
        heads = list(range(0, self.heads.shape[1], step))
        ax.set_xticks([*heads, self.heads.shape[1]], [*map(str, heads), "MLP"])
        ax.set_xlabel("head")
        ax.set_ylabel("layer")
        label = f"logit {shown(self.wanted)} - logit {shown(self.other)}".replace("$", r"\$")
        ax.figure.colorbar(picture, ax=ax, label=label)
        return ax


def token_of(tokenizer: Any, given: str | int, vocabulary: int) -> int:
    """The id of a token given as such, or as text: with a blank before it if that makes it one token."""
    if is_integer(given) and 0 <= int(given) < vocabulary:
        return int(given)
    if not isinstance(given, str):
        raise ValueError(f"token: expected text, or an id from 0 to {vocabulary - 1}, found {given!r}")
    for text in (f" {given}", given):
        ids = tokenizer.encode(text, add_special=False, parse_special=True)
        if len(ids) == 1:
            return int(ids[0])
    raise ValueError(f"token: expected text of one token, found {given!r}, which has {len(ids)}")


def needed(model: Llama) -> list[str]:
    """The names of the arrays that ``direct_attribution`` reads."""
    names = ["embed"]
    for i, layer in enumerate(model.decoder.layers):
        parts = ["attention.heads", "attention.out", "mlp.out"]
        if layer.attn_post_norm is not None:
            parts.insert(1, "attention.before_norm")
        names += [f"layers.{i}.{part}" for part in parts]
    return [*names, "final.residual"]


def direct_attribution(
    model: Llama, tokenizer: Any, arrays: _Arrays, tokens: tuple[str | int, str | int], position: int
) -> Attribution:
    """See ``Attribution``; after the token in row ``position`` of the trace."""
    decoder, config = model.decoder, model.config
    first, second = (token_of(tokenizer, token, config.vocab_size) for token in tokens)
    rows = decoder.head.take(np.array([first, second]))
    if decoder.head.bias is not None:
        raise ValueError("direct_attribution: the head has a bias, which no layer adds")
    rows_held = len(arrays["final.residual"])
    if not (is_integer(position) and -rows_held <= position < rows_held):
        raise ValueError(f"position: expected {-rows_held} to {rows_held - 1}, found {position!r}")
    x = arrays["final.residual"][position].astype(np.float64)
    size = np.sqrt(np.mean(x * x) + decoder.eps)
    direction = (rows[0].astype(np.float64) - rows[1]) * decoder.norm / size / decoder.logits_scaling
    blocks = {"embed": float(arrays["embed"][position] @ direction)}
    heads = np.empty((config.num_hidden_layers, config.num_attention_heads))
    for i, layer in enumerate(decoder.layers):
        at = f"layers.{i}.attention."
        for block in ("attention", "mlp"):
            blocks[f"layers.{i}.{block}.out"] = float(arrays[f"layers.{i}.{block}.out"][position] @ direction)
        factor = np.full(config.hidden_size, layer.residual_multiplier, np.float64)
        if layer.attn_post_norm is not None:
            before = arrays[at + "before_norm"][position].astype(np.float64)
            factor *= layer.attn_post_norm / np.sqrt(np.mean(before * before) + layer.eps)
        heads[i] = _head_outputs(model, layer.attention.o, arrays[at + "heads"][position]) @ (factor * direction)
    text = [text_of(tokenizer, token) for token in (first, second)]
    logits = model.unembed(arrays["final.residual"][position][None])[0]
    difference = float(logits[first] - logits[second])
    return Attribution(text[0], text[1], float(x @ direction), blocks, heads, difference)


def _head_outputs(model: Llama, o: Any, read: np.ndarray) -> np.ndarray:
    """What each head (H, E) adds to attention's output, without its bias: a row for each, in which others are 0."""
    H, D = read.shape
    alone = np.zeros((H, H, D), np.float32)
    alone[np.arange(H), np.arange(H)] = read
    adapters = {} if model.adapters is None else model.adapters.matrices
    out: np.ndarray = o(alone.reshape(H, H * D), adapter=adapters.get(o.name))
    return out if o.bias is None else out - o.bias
