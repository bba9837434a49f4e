"""patch(llm, clean, corrupted): where in a model, and at which token, lies what makes its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ruvllm.brief import brief
from ruvllm.display import Table, axis
from ruvllm.lab.loaded import require_loaded
from ruvllm.llm import LLM
from ruvllm.model.edits import Edit
from ruvllm.model.hooks import Editing
from ruvllm.progress import hidden, tqdm
from ruvllm.prompt import Prompt
from ruvllm.tracing.attribution import token_of
from ruvllm.tracing.labels import label_ticks, shown, text_of

Metric = Callable[[np.ndarray], float] | tuple[str | int, str | int]
_COLUMNS = 8  # tokens of a printed table: those with the largest effects


@dataclass(frozen=True)
class Patching(Table):
    """What a metric becomes when one array at one token is what it was in the clean run.

    values: (names, T). clean, corrupted: the metric without a patch. tokens: of the corrupted text.
    """

    names: list[str]
    tokens: list[str]
    values: np.ndarray
    clean: float
    corrupted: float

    __repr__ = brief

    @property
    def restored(self) -> np.ndarray:
        """(names, T): 0 where a patch changes nothing, 1 where it restores the clean run's metric."""
        return (self.values - self.corrupted) / (self.clean - self.corrupted)

    def heading(self) -> str:
        """One line: the metric of both runs."""
        return f"patching: metric {self.corrupted:.3f} corrupted, {self.clean:.3f} clean; what each patch restores"

    def rows(self) -> list[tuple[str, ...]]:
        """What patches restore at the tokens that matter most; the first row has the headings."""
        most = np.sort(np.argsort(-np.abs(self.restored).max(axis=0), kind="stable")[:_COLUMNS])
        found: list[tuple[str, ...]] = [("name", *(f"{i}: {shown(self.tokens[i])}" for i in most))]
        return found + [
            (name, *(f"{row[i]:.0%}" for i in most)) for name, row in zip(self.names, self.restored, strict=True)
        ]

    def plot(self, ax: Any = None) -> Any:
        """A map of names and tokens, blue where a patch restores; returns the matplotlib axis."""
        ax = axis(ax)
        most = np.abs(self.restored).max()
        picture = ax.imshow(self.restored, cmap="RdBu", vmin=-most, vmax=most, aspect="auto", origin="lower")
        label_ticks(ax.xaxis, self.tokens)
        ax.tick_params(axis="x", rotation=90)
        label_ticks(ax.yaxis, self.names, 40)
        ax.figure.colorbar(picture, ax=ax, label="restored of the clean run's metric")
        return ax


def patch(
    llm: LLM, clean: Prompt, corrupted: Prompt, at: str = "layers.*.residual", metric: Metric | None = None,
    progress: bool | None = None,
) -> Patching:  # fmt: skip
    """Run a corrupted text with one array at one token from the clean run, for each array and each token.

    Args:
        llm: a loaded model.
        clean, corrupted: two prompts of as many tokens, as "When Mary and John ..." and "When Anna and John ...".
        at: the arrays: a name, alias or glob of ``llm.names()``; of one head "layers.3.heads.4".
        metric: a function of the logits (V,) after the last token; or two tokens, for the difference of their logits;
            None: for the likeliest tokens of the two runs.
        progress: show a bar; None: where stderr is a terminal or a notebook.

    Raises:
        KeyError: no array has this name.
        ValueError: prompts of different lengths, arrays that cannot be edited, or a metric that is the same in both.
        TypeError: llm is a path or a name: load it first.
    """
    require_loaded(llm)
    points = llm.model.points
    whole_edit = Edit(points, at, scale=1)  # raises where an array cannot be edited
    head, names = whole_edit.head, [name for name in points if name in whole_edit.names]
    patched = names if head is None else [f"{name}.{head}" for name in names]
    with llm.trace(clean) as source:
        source.keep(*names)
    with llm.trace(corrupted) as target:
        target.keep("embed")
    ids = target.ids
    if len(ids) != len(source.ids):
        raise ValueError(f"corrupted: expected {len(source.ids)} tokens, as clean has, found {len(ids)}")
    before = llm.logits(source.ids, last_only=True), llm.logits(ids, last_only=True)
    measure = _measure(llm, metric, before)
    whole, none = (float(measure(logits)) for logits in before)
    if not np.isfinite(whole - none) or whole == none:
        raise ValueError(f"metric: expected two numbers that differ, found {whole} and {none}: no patch can restore it")
    first = int(np.argmax(ids != source.ids))  # before it both runs have the same arrays
    values = np.full((len(names), len(ids)), none)
    cache = llm.new_cache(len(ids))
    for row, name in enumerate(tqdm(names, desc="patching", leave=False, disable=hidden(progress))):
        cache.clear()
        llm.logits(ids, cache, last_only=True)
        position = np.zeros(1, np.int64)
        held_rows = source[name] if head is None else source[name][:, head]
        edit = Edit(points, patched[row], lambda x, rows=held_rows, position=position: rows[position])
        edit.positions = position
        with Editing(llm.model, [edit]):  # one block for all positions: its tape is recorded once
            # From the last token to the first: the cache then holds what comes before, without patches.
            for position[0] in range(len(ids) - 1, first - 1, -1):
                held = cache.rewind(int(position[0]))
                values[row, position[0]] = measure(llm.logits(ids[held:], cache, last_only=True))
    return Patching(patched, target.tokens, values, whole, none)


def _measure(llm: LLM, metric: Metric | None, logits: tuple[np.ndarray, np.ndarray]) -> Callable[[np.ndarray], float]:
    if callable(metric):
        return metric
    if metric is None:
        first, second = (int(x.argmax()) for x in logits)
        if first == second:
            token = text_of(llm.tokenizer, first)
            raise ValueError(f"metric: {token!r} is likeliest in both runs: give two tokens or a function")
    else:
        first, second = (token_of(llm.tokenizer, token, llm.config.vocab_size) for token in metric)
    return lambda logits: float(logits[first] - logits[second])
