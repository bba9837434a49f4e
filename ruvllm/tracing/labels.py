"""Labels: tokens on the axes of plots, few enough not to overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MOST = 24  # labels along an axis
_CHARACTERS = 10  # of one label


def text_of(tokenizer: Any, token: int) -> str:
    """A token's text; "<262>" for one that only the model has, whose vocabulary may be padded."""
    text: str = tokenizer.decode([token]) if token < tokenizer.vocab_size else ""
    return text or f"<{token}>"


def shown(token: str, most: int = _CHARACTERS) -> str:
    """A token's text on one line, in quotes where blanks matter no one sees."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in token.replace("\n", "\\n"))
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return text.replace(" ", "·") if text.strip(" ") != text or not text else text


def label_ticks(axis: Any, tokens: Sequence[str], characters: int = _CHARACTERS) -> None:
    """A tick for each token, or for evenly spread ones; dollars are no formulas."""
    step = -(-len(tokens) // MOST) or 1
    ticks = range(0, len(tokens), step)
    axis.set_ticks(list(ticks), [shown(tokens[i], characters).replace("$", r"\$") for i in ticks], fontsize=7)
