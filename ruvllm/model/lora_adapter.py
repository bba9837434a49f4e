"""A low-rank adapter: its settings (LoraConfig) and its weights (LoraAdapter).

A matrix W (N, K) with an adapter gives y = W x + scaling B^T (A^T x), A (K, R), B (R, N).

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; rank-stabilised scaling is Kalajdzievski
2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ruvllm.model.checks import is_integer, is_number, require
from ruvllm.model.config import ModelConfig
from ruvllm.model.low_rank import Factors

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
MAX_RANK = 1024


@dataclass(frozen=True)
class LoraConfig:
    """The settings of an adapter: its rank, its strength, its matrices.

    rank: R, the columns of A. alpha: the adapter adds alpha / rank (with ``rslora``: alpha / sqrt(rank)) times A B.
    dropout: share of the inputs of A that are dropped in training. targets: matrices that get an adapter.

    Raises:
        ValueError: a value outside its range; the message names it.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q", "v")
    rslora: bool = False

    def __post_init__(self) -> None:
        require("rank", self.rank, is_integer(self.rank) and 1 <= self.rank <= MAX_RANK, f"1 to {MAX_RANK}")
        alpha_fits = is_number(self.alpha) and 0 < self.alpha < math.inf
        require("alpha", self.alpha, alpha_fits, "a finite number above 0")
        dropout_fits = is_number(self.dropout) and 0 <= self.dropout < 1
        require("dropout", self.dropout, dropout_fits, "a number from 0 to below 1")
        require("rslora", self.rslora, isinstance(self.rslora, bool), "True or False")
        named = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        known = bool(named) and all(target in TARGETS for target in named)
        require("targets", self.targets, known, f"some of {', '.join(TARGETS)}")
        object.__setattr__(self, "targets", tuple(target for target in TARGETS if target in named))

    @property
    def scaling(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoraAdapter:
    """The A and B of every adapted matrix, views of one array ``parameters`` (float32).

    ``a["layers.0.q"]`` is (K, R), ``b["layers.0.q"]`` is (R, N). A new adapter adds nothing: A is random, B is zero.

    Args:
        model: the configuration of the model that it is for.
        config: rank, scaling and targets.
        seed: of the random numbers in A.
        names: the matrices that it adapts ("layers.0.q"); None: the targets of all layers.
    """

    def __init__(
        self, model: ModelConfig, config: LoraConfig | None = None, seed: int = 0, names: tuple[str, ...] | None = None
    ) -> None:
        self.config = config = config or LoraConfig()
        shapes = model.tensor_shapes()
        if names is None:
            every = (f"layers.{i}.{t}" for i in range(model.num_hidden_layers) for t in config.targets)
            names = tuple(name for name in every if name in shapes)
            for target in config.targets:
                if not any(name.endswith(f".{target}") for name in names):
                    raise ValueError(f"targets: found {target!r}, expected matrices of this model, outside of experts")
        sizes = {name: (shapes[name][1] * config.rank, config.rank * shapes[name][0]) for name in names}
        self.parameters = np.zeros(sum(a + b for a, b in sizes.values()), np.float32)
        self.a, self.b = self.views(self.parameters, {name: shapes[name] for name in names})
        self.reset(seed)

    def views(
        self, parameters: np.ndarray, shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """A and B of each matrix within an array shaped like ``parameters``: of gradients, of averages."""
        if shapes is None:
            shapes = {name: (self.b[name].shape[1], self.a[name].shape[0]) for name in self.a}
        a, b, at, rank = {}, {}, 0, self.config.rank
        for name, (rows, columns) in shapes.items():
            middle, end = at + columns * rank, at + (columns + rows) * rank
            a[name] = parameters[at:middle].reshape(columns, rank)
            b[name] = parameters[middle:end].reshape(rank, rows)
            at = end
        return a, b

    def reset(self, seed: int = 0) -> None:
        """Reset: A uniform within 1 / sqrt(K), as PEFT draws it, and B zero."""
        rng = np.random.default_rng(seed)
        for name, a in self.a.items():
            a[:] = rng.uniform(-1, 1, a.shape) / math.sqrt(len(a))
            self.b[name][:] = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The adapted matrices."""
        return tuple(self.a)

    @property
    def param_count(self) -> int:
        """The number of trained parameters."""
        return self.parameters.size

    def factors(self, name: str, weight: float = 1.0) -> Factors:
        """What it adds to a matrix as down (R, K) and up (N, R), scaled."""
        return self.a[name].T, self.b[name].T * np.float32(weight * self.config.scaling)

    def require_finite(self) -> None:
        """Raise ValueError, naming the matrix, if an element is NaN or infinite."""
        for part, arrays in (("A", self.a), ("B", self.b)):
            for name, array in arrays.items():
                if not np.isfinite(array).all():
                    raise ValueError(f"adapter: {part} of {name} holds NaN or infinity")

    def require_fits(self, model: ModelConfig) -> None:
        """Raise ValueError unless its matrices have the shapes of that model's."""
        shapes = model.tensor_shapes()
        for name, a in self.a.items():
            made_for = (self.b[name].shape[1], len(a))
            if shapes.get(name) != made_for:
                has = "no such matrix" if name not in shapes else f"one of {shapes[name]}"
                raise ValueError(f"adapter: it was made for another model: {name} of shape {made_for}, this has {has}")

    def __repr__(self) -> str:
        c = self.config
        return f"LoraAdapter(rank {c.rank}, alpha {c.alpha:g}, {' '.join(c.targets)}, {self.param_count:,} parameters)"
