"""steering(llm, positives, negatives): the direction, in each layer, from one kind of text to another."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ruvllm.brief import brief
from ruvllm.checkpoint.control_vector import load_control_vector, save_control_vector
from ruvllm.display import Table, axis
from ruvllm.lab.loaded import require_loaded
from ruvllm.llm import LLM
from ruvllm.model.config import ModelConfig
from ruvllm.model.edits import after_layer
from ruvllm.progress import hidden, tqdm
from ruvllm.prompt import Prompt

METHODS = ("mean", "pca")
_NOTHING = 1e-12  # relative to the residual stream's length: what rounding in float64 leaves of no difference


@dataclass(frozen=True)
class Steering(Table, Mapping[int, np.ndarray]):
    """Directions by layer, to be added to the residual stream after it: ``llm.steer`` does that.

    directions: (L, E). lengths (L,): of each, relative to the mean length of the residual stream there. separation
    (L,): the distance of the two kinds of text along the direction, in standard deviations of one kind.
    """

    directions: np.ndarray
    lengths: np.ndarray
    separation: np.ndarray
    method: str
    config: ModelConfig

    __repr__ = brief

    def __getitem__(self, layer: int) -> np.ndarray:
        if layer not in range(len(self)):
            raise KeyError(layer)
        row: np.ndarray = self.directions[layer]
        return row

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return len(self.directions)

    __hash__ = None  # type: ignore[assignment]  # arrays have none

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a GGUF control vector, as llama.cpp reads it: of all layers but the first, for which it has no place.

        ``llm.steer(path)`` reads it, and so do llama.cpp's programs with ``--control-vector``.
        """
        return save_control_vector(path, self, self.config)

    @staticmethod
    def load(path: str | os.PathLike[str], llm: LLM) -> dict[int, np.ndarray]:
        """The directions (E,) by layer of a control vector for this model: what ``llm.steer(path)`` adds.

        Raises:
            FileNotFoundError, ModelFormatError: the file is not there, unsound, or was made for another model.
        """
        return load_control_vector(path, llm.config)

    def heading(self) -> str:
        """One line: of what."""
        best = int(self.separation.argmax())
        return f"directions of {len(self)} layers ({self.method}); the texts are farthest apart after layer {best}"

    def rows(self) -> list[tuple[str, ...]]:
        """A table of the layers, as text; the first row has the headings."""
        found: list[tuple[str, ...]] = [("after", "length, of the residual stream's", "separation, in deviations")]
        pairs = zip(self.lengths, self.separation, strict=True)
        return found + [(f"layer {i}", f"{length:.1%}", f"{apart:.1f}") for i, (length, apart) in enumerate(pairs)]

    def plot(self, ax: Any = None) -> Any:
        """How far apart the two kinds of text are after each layer; returns the matplotlib axis."""
        ax = axis(ax)
        ax.plot(range(len(self)), self.separation, marker=".")
        ax.set_ylim(bottom=0)
        ax.set_xlabel("layer")
        ax.set_ylabel("separation, in standard deviations")
        return ax


def steering(
    llm: LLM, positives: Sequence[Prompt], negatives: Sequence[Prompt], method: str = "mean",
    progress: bool | None = None,
) -> Steering:  # fmt: skip
    """The direction from one kind of text to another in the residual stream after each layer, at the last token.

    Adapters that are active and edits around the call are part of what is measured.

    Args:
        llm: a loaded model.
        positives, negatives: prompts of the two kinds: text, token ids or messages. Prompts that differ in one respect
            alone give the cleanest direction.
        method: "mean": mean(positives) - mean(negatives), so that a factor of 1 leads from the one to the other;
            "pca": the first principal component of the differences of pairs, of length 1, as llama.cpp makes it.
        progress: show a bar; None: where stderr is a terminal or a notebook.

    Raises:
        ValueError: no prompts, an unknown method, for "pca" fewer than two pairs, or texts that do not differ.
        TypeError: one prompt in place of several, or llm is a path or a name: load it first.
    """
    require_loaded(llm)
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, found {method!r}")
    kinds = {"positives": positives, "negatives": negatives}
    for name, prompts in kinds.items():
        if isinstance(prompts, str):
            raise TypeError(f"{name}: expected several prompts, found one text")
        if not len(prompts):
            raise ValueError(f"{name}: expected at least one prompt, found none")
    if method == "pca" and not 2 <= len(positives) == len(negatives):
        raise ValueError(
            f"pca: expected two pairs or more, found {len(positives)} positives, {len(negatives)} negatives"
        )
    with tqdm(total=len(positives) + len(negatives), desc="steering", leave=False, disable=hidden(progress)) as bar:
        one, other = (np.stack([_last_states(llm, prompt, bar) for prompt in prompts]) for prompts in kinds.values())
    mean = one.mean(0) - other.mean(0)
    directions = (
        mean
        if method == "mean"
        else np.stack([_component(x, m) for x, m in zip((one - other).swapaxes(0, 1), mean, strict=True)])
    )
    sizes = np.linalg.norm(np.concatenate([one, other]), axis=-1).mean(0)
    if (np.linalg.norm(directions, axis=-1) <= _NOTHING * sizes).all():
        raise ValueError(f"steering: positives and negatives do not differ (method={method!r}): there is no direction")
    unit = directions / np.maximum(np.linalg.norm(directions, axis=-1, keepdims=True), 1e-30)
    along = [np.einsum("nle,le->nl", x, unit) for x in (one, other)]
    spread = np.sqrt(sum(x.var(0) for x in along) / 2)
    gap = np.abs(along[0].mean(0) - along[1].mean(0))
    return Steering(
        directions.astype(np.float32), np.linalg.norm(directions, axis=-1) / sizes,
        gap / np.maximum(spread, 1e-6 * sizes), method, llm.config,
    )  # fmt: skip


def _last_states(llm: LLM, prompt: Prompt, bar: Any) -> np.ndarray:
    """The residual stream (L, E) after each layer, at the last token, in float64."""
    names = [after_layer(llm.config, i) for i in range(llm.config.num_hidden_layers)]
    with llm.trace(prompt) as trace:
        trace.keep(*names)
    bar.update()
    return np.stack([trace[name][-1] for name in names]).astype(np.float64)


def _component(differences: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """The first principal component of differences (n, E) about zero, on the side of their mean; 0 if they are."""
    if not differences.any():
        return mean
    first = np.linalg.svd(differences, full_matrices=False)[2][0]
    return np.asarray(first if first @ mean >= 0 else -first)
