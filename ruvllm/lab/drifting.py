"""drift(llm, prompt): the error of each layer against float64; quantisation_error(path): the error of each tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ruvllm.brief import brief
from ruvllm.checkpoint.hub import resolve
from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.checkpoint.tensor import Tensor
from ruvllm.display import Table, axis
from ruvllm.kernels.reference import log_softmax
from ruvllm.lab.loaded import require_loaded
from ruvllm.llm import LLM
from ruvllm.model.reference import Float64, reference_states
from ruvllm.model.weights import LAYOUTS, load_weights
from ruvllm.progress import hidden, tqdm
from ruvllm.prompt import Prompt

_RUNS, _RUN_ROWS = 16, 32  # a large matrix's error is measured in 16 runs, evenly spread, of 32 adjacent rows


@dataclass(frozen=True)
class Drift(Table):
    """How far a model's results are from float64 on the file's own weights.

    errors: ||x - r|| / ||r|| of the residual stream after the embedding and after each layer, all tokens together.
    largest: the largest difference of one element there. logits: the largest difference of a logit. divergence: mean
    Kullback-Leibler divergence of the predicted tokens, in nats. agreement: share of positions with the same top token.
    """

    name: str
    tokens: int
    errors: tuple[float, ...]
    largest: tuple[float, ...]
    logits: float
    divergence: float
    agreement: float

    __repr__ = brief

    def heading(self) -> str:
        """One line: the name, and what the error does to predictions."""
        return (
            f"{self.name}, {self.tokens} tokens, against float64: logits within {self.logits:.2g}, "
            f"KL divergence {self.divergence:.2g}, same top token {self.agreement:.1%}"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """A table of the layers, as text; the first row has the headings."""
        names = ["embedding", *(f"layer {i}" for i in range(len(self.errors) - 1))]
        found: list[tuple[str, ...]] = [("after", "relative error", "largest difference")]
        return found + [(n, f"{e:.2e}", f"{d:.2e}") for n, e, d in zip(names, self.errors, self.largest, strict=True)]

    def plot(self, ax: Any = None) -> Any:
        """Relative error by layer; several fit on one axis. Returns the matplotlib axis."""
        ax = axis(ax)
        ax.plot(range(len(self.errors)), np.maximum(self.errors, 1e-9), marker=".", label=self.name)
        ax.set_yscale("log")
        ax.set_xlabel("layers passed")
        ax.set_ylabel("relative error of the residual stream")
        ax.legend(frameon=False)
        return ax


def drift(llm: LLM, prompt: Prompt, name: str | None = None, progress: bool | None = None) -> Drift:
    """Error of each layer of a model against float64, on the weights that its file holds.

    The error includes all rounding: weights converted at load, activations in 8 bits, and swapped kernels if called
    inside ``swap``. The model runs as it always does, in its parallel region; with ``model.fused = False`` operation by
    operation. The reference has no adapters: detach them first.

    Args:
        llm: a loaded model; its file must still be there.
        prompt: text, token ids or messages, as for ``LLM.generate``; all at once, at most a few hundred tokens.
        name: for tables and plots; None: the layouts of the weights.
        progress: show a bar; None: where stderr is a terminal or a notebook.

    Raises:
        FileNotFoundError: the model's file is gone.
        ValueError: an empty prompt.
        TypeError: llm is a path or a name: load it first.
    """
    require_loaded(llm)
    states = [f"layers.{i}.residual" for i in range(llm.config.num_hidden_layers)] + ["final.residual"]
    with llm.trace(prompt, kv="f32") as trace:
        trace.keep(*states, "logits")
    ids, logits = trace.ids, trace["logits"]
    errors, largest = [], []
    with open_checkpoint(llm.path) as checkpoint:
        with tqdm(
            total=llm.config.num_hidden_layers + 1, desc="float64", unit="layer", leave=False, disable=hidden(progress)
        ) as bar:

            class Shown(Float64):
                def boundary(self, x: np.ndarray) -> np.ndarray:
                    bar.update()
                    return super().boundary(x)

            *references, expected = reference_states(checkpoint, ids, ops_type=Shown)
    for state, reference in zip(states, references, strict=True):
        difference = trace[state] - reference
        errors.append(float(np.linalg.norm(difference) / np.linalg.norm(reference)))
        largest.append(float(np.abs(difference).max()))
    p, q = log_softmax(expected), log_softmax(logits)
    return Drift(
        name=name or " and ".join(sorted({linear.layout for linear in llm.model.linears().values()})),
        tokens=len(ids), errors=tuple(errors), largest=tuple(largest), logits=float(np.abs(logits - expected).max()),
        divergence=float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1))),
        agreement=float(np.mean(expected.argmax(-1) == logits.argmax(-1))),
    )  # fmt: skip


@dataclass(frozen=True)
class QuantisationError(Table):
    """Relative error ||w - r|| / ||r|| of each matrix of a file when kept in each layout."""

    name: str
    dtypes: dict[str, str]
    errors: dict[str, dict[str, float]]  # by layout, then by tensor

    __repr__ = brief

    def heading(self) -> str:
        """One line: the mean error of each layout."""
        means = (f"{layout} {np.mean(list(errors.values())):.2%}" for layout, errors in self.errors.items())
        return f"{self.name}: relative error of {len(self.dtypes)} matrices, on average {', '.join(means)}"

    def rows(self) -> list[tuple[str, ...]]:
        """A table of the tensors, as text; the first row has the headings."""
        found: list[tuple[str, ...]] = [("tensor", "in the file", *self.errors)]
        for tensor, dtype in self.dtypes.items():
            found.append((tensor, dtype, *(f"{errors[tensor]:.2e}" for errors in self.errors.values())))
        return found

    def plot(self, ax: Any = None) -> Any:
        """Error of each tensor in the order of the file, one mark for each layout; returns the matplotlib axis."""
        ax = axis(ax)
        for layout, errors in self.errors.items():
            ax.plot(range(len(errors)), np.maximum(list(errors.values()), 1e-9), ".", label=layout)
        ax.set_yscale("log")
        ax.set_xlabel("matrix, from the embedding to the last layer")
        ax.set_ylabel("relative error")
        ax.set_title(self.name)
        ax.legend(frameon=False)
        return ax


def quantisation_error(
    path: Any, layouts: str | Sequence[str] = ("f16", "int8", "int4"), progress: bool | None = None
) -> QuantisationError:
    """Relative error of each matrix of a model file when kept in a layout; 0 where the layout holds it exactly.

    Args:
        path: as for ``ruvllm.load``.
        layouts: one or several of LAYOUTS.
        progress: show a bar; None: where stderr is a terminal or a notebook.

    Returns:
        Relative errors, from 512 rows of each matrix (16 runs of adjacent rows, evenly spread), or from all if it has
        fewer.

    Raises:
        ValueError: an unknown layout.
        FileNotFoundError, ModelFormatError: as for ``ruvllm.load``.
    """
    layouts = (layouts,) if isinstance(layouts, str) else tuple(layouts)
    for layout in layouts:
        if layout not in LAYOUTS:
            raise ValueError(f"layouts: expected some of {', '.join(LAYOUTS)}, found {layout!r}")
    where = resolve(path)
    with open_checkpoint(where) as checkpoint:
        names = [name for name in checkpoint.config.tensor_shapes() if len(checkpoint.tensor(name).shape) == 2]
        errors: dict[str, dict[str, float]] = {layout: {} for layout in layouts}
        bar = tqdm(names, desc="quantising", leave=False, disable=hidden(progress))
        for name in bar:
            for layout, error in _tensor_errors(checkpoint.tensor(name), layouts).items():
                errors[layout][name] = error
        dtypes = {name: checkpoint.tensor(name).dtype for name in names}
        return QuantisationError(checkpoint.config.name or str(where), dtypes, errors)


def _tensor_errors(tensor: Tensor, layouts: Sequence[str]) -> dict[str, float]:
    """The relative error of each layout, in _RUNS runs of _RUN_ROWS rows, or in all rows of a small matrix."""
    rows = tensor.shape[0]
    spread = np.linspace(0, rows - _RUN_ROWS, _RUNS).astype(np.int64).tolist()
    runs = [(0, rows)] if rows <= _RUNS * _RUN_ROWS else [(lo, lo + _RUN_ROWS) for lo in spread]
    wanted = np.concatenate([tensor.float32(*run).reshape(-1, tensor.shape[1]) for run in runs]).astype(np.float64)
    chosen = np.concatenate([np.arange(*run) for run in runs])
    size = float(np.sum(wanted**2))
    found = {}
    for layout in layouts:
        kept = load_weights(tensor, layout).take(chosen, np.empty(wanted.shape, np.float32))
        found[layout] = float(np.sqrt(np.sum((kept - wanted) ** 2) / size)) if size else 0.0
    return found
