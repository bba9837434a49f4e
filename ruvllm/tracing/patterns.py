"""AttentionPattern: the weights with which a layer's heads read positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ruvllm.brief import brief
from ruvllm.display import Table, panels
from ruvllm.tracing.labels import label_ticks, shown


@dataclass(frozen=True)
class AttentionPattern(Table):
    """weights (H, T, S) of T tokens over S positions: rows sum to 1, or less where a head has a sink."""

    name: str
    weights: np.ndarray
    tokens: list[str]
    positions: list[str]

    __repr__ = brief

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, T, S)."""
        return self.weights.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.weights, dtype)

    def __getitem__(self, at: Any) -> Any:
        return self.weights[at]

    def heading(self) -> str:
        """One line: which layer, and how many heads."""
        return f"attention of {self.name}: what the last token reads, by head"

    def rows(self) -> list[tuple[str, ...]]:
        """The three positions that each head reads most from the last token; the first row has the headings."""
        found: list[tuple[str, ...]] = [("head", "first", "second", "third")]
        for head, weights in enumerate(self.weights[:, -1]):
            best = np.argsort(-weights, kind="stable")[:3]
            cells = [f"{shown(self.positions[i])} {weights[i]:.0%}" for i in best]
            found.append((str(head), *cells, *[""] * (3 - len(cells))))
        return found

    def plot(self) -> Any:
        """Heads as small multiples, tokens on the axes; returns the list of matplotlib axes."""
        heads = len(self.weights)
        columns = min(4, heads)
        axes = panels(heads, columns, 2.6)
        for head, ax in enumerate(axes):
            ax.imshow(self.weights[head], cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            ax.set_title(f"head {head}", fontsize=9)
            label_ticks(ax.xaxis, self.positions)
            label_ticks(ax.yaxis, self.tokens)
            ax.tick_params(axis="x", rotation=90)
        axes[0].figure.suptitle(f"attention of {self.name}: rows read columns", fontsize=10)
        return axes
