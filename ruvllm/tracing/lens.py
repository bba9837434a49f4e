"""LogitLens: what the residual stream would predict if the model ended after each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import ruvllm.kernels as K
from ruvllm.brief import brief
from ruvllm.display import Table, axis
from ruvllm.model.llama import Llama
from ruvllm.tracing.labels import label_ticks, shown, text_of

_ROWS = 32  # whose logits are in memory at once
_COLUMNS = 6  # positions of a printed table


@dataclass(frozen=True)
class LogitLens(Table):
    """The likeliest next tokens after the embedding and after each layer, L + 1 stages.

    ids and probabilities (L + 1, T, top), likeliest first; texts of these ids. tokens: of the text.
    """

    tokens: list[str]
    ids: np.ndarray
    probabilities: np.ndarray
    texts: dict[int, str]

    __repr__ = brief

    def stages(self) -> list[str]:
        """The names of the stages."""
        return ["embedding", *(f"layer {i}" for i in range(len(self.ids) - 1))]

    def heading(self) -> str:
        """One line: of how many tokens."""
        return f"logit lens of {len(self.tokens)} tokens: the likeliest next token after each layer"

    def rows(self) -> list[tuple[str, ...]]:
        """The likeliest token after each layer at the last positions; the first row has the headings."""
        positions = range(max(0, len(self.tokens) - _COLUMNS), len(self.tokens))
        found: list[tuple[str, ...]] = [("after", *(shown(self.tokens[p]) for p in positions))]
        for stage, ids, shares in zip(self.stages(), self.ids, self.probabilities, strict=True):
            found.append((stage, *(f"{shown(self.texts[int(ids[p, 0])])} {shares[p, 0]:.0%}" for p in positions)))
        return found

    def plot(self, ax: Any = None, last: int = 12) -> Any:
        """The likeliest token of each layer and of the ``last`` positions, darker if likelier; returns the axis."""
        fresh, ax = ax is None, axis(ax)
        shares, ids = self.probabilities[:, -last:, 0], self.ids[:, -last:, 0]
        if fresh:
            ax.figure.set_size_inches(2 + 0.75 * shares.shape[1], 1.5 + 0.24 * len(shares))
        picture = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
        for row, column in np.ndindex(ids.shape):
            color = "white" if shares[row, column] > 0.6 else "black"
            text = shown(self.texts[int(ids[row, column])], 9).replace("$", r"\$")
            ax.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
        label_ticks(ax.xaxis, self.tokens[-last:])
        label_ticks(ax.yaxis, self.stages())
        ax.set_xlabel("token")
        ax.figure.colorbar(picture, ax=ax, label="probability")
        return ax


def logit_lens(model: Llama, tokenizer: Any, states: list[np.ndarray], tokens: list[str], top: int) -> LogitLens:
    """The ``top`` likeliest tokens of each residual stream (T, E)."""
    if not 1 <= top <= model.config.vocab_size:
        raise ValueError(f"top: expected 1 to {model.config.vocab_size}, found {top!r}")
    ids = np.empty((len(states), len(tokens), top), np.int64)
    probabilities = np.empty(ids.shape, np.float32)
    for stage, x in enumerate(states):
        for lo in range(0, len(x), _ROWS):
            for row, logits in enumerate(model.unembed(x[lo : lo + _ROWS]), start=lo):
                best = K.top_logprobs(logits, top)
                ids[stage, row] = [token for token, _ in best]
                probabilities[stage, row] = np.exp([share for _, share in best])
    texts = {int(i): text_of(tokenizer, int(i)) for i in np.unique(ids)}
    return LogitLens(tokens, ids, probabilities, texts)
