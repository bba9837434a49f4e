"""MicroLoRA: low-rank adapters over a model: attach, mix, swap between two tokens, switch off, merge.

A matrix W (N, K) with an adapter gives y = W x + scaling B^T (A^T x), A (K, R), B (R, N). W itself is never touched, so
it may be of 4 or 8 bits; only ``merge`` writes the sum into float weights.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; rank-stabilised scaling is Kalajdzievski
2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ruvllm.model.config import ModelConfig
from ruvllm.model.low_rank import AdapterSet, Factors
from ruvllm.model.weights import FLOAT_LAYOUTS, FloatWeights

if TYPE_CHECKING:
    from ruvllm.model.adaptation import Consolidation
    from ruvllm.model.llama import Llama
    from ruvllm.model.training import Penalty, Step, Trainer, TrainingConfig
    from ruvllm.model.training_data import Example

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
MAX_RANK = 1024
_SETS_KEPT = 16  # mixtures of adapters that are packed already


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter is: its rank, its strength, where it sits.

    rank: R, the columns of A. alpha: the adapter adds alpha / rank (with ``rslora``: alpha / sqrt(rank)) times A B.
    dropout: share of the inputs of A that are left out while training. targets: matrices that get an adapter.

    Raises:
        ValueError: a value outside its range; the message names it.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q", "v")
    rslora: bool = False

    def __post_init__(self) -> None:
        _require("rank", self.rank, _is_integer(self.rank) and 1 <= self.rank <= MAX_RANK, f"1 to {MAX_RANK}")
        alpha_fits = _is_number(self.alpha) and 0 < self.alpha < math.inf
        _require("alpha", self.alpha, alpha_fits, "a finite number above 0")
        dropout_fits = _is_number(self.dropout) and 0 <= self.dropout < 1
        _require("dropout", self.dropout, dropout_fits, "a number from 0 to below 1")
        _require("rslora", self.rslora, isinstance(self.rslora, bool), "True or False")
        named = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        known = bool(named) and all(target in TARGETS for target in named)
        _require("targets", self.targets, known, f"some of {', '.join(TARGETS)}")
        object.__setattr__(self, "targets", tuple(target for target in TARGETS if target in named))

    @property
    def scaling(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoraAdapter:
    """The A and B of every matrix that an adapter sits on, views of one array ``parameters`` (float32).

    ``a["layers.0.q"]`` is (K, R), ``b["layers.0.q"]`` is (R, N). A new adapter adds nothing: A is random, B is zero.

    Args:
        model: the configuration of the model that it is for.
        config: rank, scaling and targets.
        seed: of the random numbers in A.
        names: matrices that it sits on ("layers.0.q"); None: the targets of all layers.
    """

    def __init__(
        self, model: ModelConfig, config: LoraConfig | None = None, seed: int = 0, names: tuple[str, ...] | None = None
    ) -> None:
        self.config = config = config or LoraConfig()
        shapes = model.tensor_shapes()
        if names is None:
            names = tuple(f"layers.{i}.{t}" for i in range(model.num_hidden_layers) for t in config.targets)
        sizes = {name: (shapes[name][1] * config.rank, config.rank * shapes[name][0]) for name in names}
        self.parameters = np.zeros(sum(a + b for a, b in sizes.values()), np.float32)
        self.a, self.b = self.views(self.parameters, {name: shapes[name] for name in names})
        self.reset(seed)

    def views(
        self, parameters: np.ndarray, shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """A and B of each matrix within an array of as many numbers as ``parameters``: of gradients, of averages."""
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
        """Begin anew: A uniform within 1 / sqrt(K), as PEFT draws it, and B zero."""
        rng = np.random.default_rng(seed)
        for name, a in self.a.items():
            a[:] = rng.uniform(-1, 1, a.shape) / math.sqrt(len(a))
            self.b[name][:] = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The matrices that it sits on."""
        return tuple(self.a)

    @property
    def param_count(self) -> int:
        """How many numbers are trained."""
        return self.parameters.size

    @property
    def memory_bytes(self) -> int:
        """Bytes of A and B."""
        return self.parameters.nbytes

    def factors(self, name: str, weight: float = 1.0) -> Factors:
        """What it adds to a matrix as down (R, K) and up (N, R), scaled."""
        return self.a[name].T, self.b[name].T * np.float32(weight * self.config.scaling)

    def require_finite(self) -> None:
        """Raise ValueError, naming the matrix, if a number is NaN or infinite."""
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


class MicroLora:
    """The adapters of a model: which there are, and which act with what weight.

    A change acts from the next token on; the base weights, the model and its caches stay as they are. What a KV cache
    already holds was computed with the adapters of its time.
    """

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.adapters: dict[str, LoraAdapter] = {}
        self._active: dict[str, float] = {}
        self._enabled = True
        self._sets: dict[tuple[tuple[str, float], ...], AdapterSet] = {}
        self._unmerged: dict[str, FloatWeights] = {}  # what merged matrices were before

    @property
    def active(self) -> dict[str, float]:
        """The adapters that act, and their weights; none while disabled."""
        return dict(self._active) if self._enabled else {}

    @property
    def merged(self) -> bool:
        """Whether adapters have been written into the weights."""
        return bool(self._unmerged)

    def attach(self, adapter: LoraAdapter, name: str = "default", weight: float = 1.0) -> LoraAdapter:
        """Add an adapter and let it act beside those that do.

        Raises:
            ValueError: it was made for another model, holds NaN, or the name is taken by another adapter.
        """
        if self.adapters.get(name, adapter) is not adapter:
            raise ValueError(f"name: there is an adapter {name!r} already; detach it first or choose another name")
        adapter.require_fits(self.model.config)
        adapter.require_finite()
        weight = _checked_weight(name, weight)
        self.adapters[name] = adapter
        self._forget(name)
        self._set_for({name: 1.0})  # packed now, so that a swap to it takes no time
        self._apply({**self._active, name: weight})
        return adapter

    def detach(self, name: str) -> LoraAdapter:
        """Remove an adapter and return it. Raises KeyError if there is none of this name."""
        adapter = self.adapters.pop(self._known(name))
        self._apply({other: weight for other, weight in self._active.items() if other != name})
        self._forget(name)
        return adapter

    def use(self, *names: str | Mapping[str, float]) -> None:
        """Let exactly these adapters act: ``use("a")``, ``use("a", "b")``, ``use({"a": 0.7, "b": 0.3})``, ``use()``.

        Raises:
            KeyError: there is no adapter of this name.
            ValueError: a weight that is no finite number.
        """
        weights: dict[str, float] = {}
        for name in names:
            weights |= {name: 1.0} if isinstance(name, str) else name
        self._apply({self._known(name): _checked_weight(name, weight) for name, weight in weights.items()})

    def enable(self) -> None:
        """Let the adapters act again."""
        self._enabled = True
        self._apply(self._active)

    def disable(self) -> None:
        """Let the model answer as if it had no adapters, until ``enable``."""
        self._enabled = False
        self._apply(self._active)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """No adapter acts inside the block."""
        before = self._enabled
        self.disable()
        try:
            yield
        finally:
            if before:
                self.enable()

    def refresh(self, name: str) -> None:
        """Take in that the numbers of an adapter were changed in place."""
        self.adapters[self._known(name)].require_finite()
        self._forget(name)
        self._apply(self._active)

    def fit(
        self, examples: Sequence[Example], name: str = "default", config: LoraConfig | None = None,
        training: TrainingConfig | None = None, penalty: Penalty | None = None,
        on_step: Callable[[Step, int], object] | None = None,
    ) -> Trainer:  # fmt: skip
        """Train the adapter ``name``, a new one of ``config`` if there is none, and let it act.

        Others that act meanwhile stay as they are, and are part of the model that it learns beside.

        Args:
            examples: what it learns from.
            name: of the adapter.
            config: of a new adapter; one that exists keeps its own.
            training: how it learns.
            penalty: added to the loss, for example ``adaptation.consolidate``.
            on_step: called after each step with its report and the number of all steps.

        Returns:
            The Trainer, with ``history`` and ``evaluate``.

        Raises:
            ValueError: no examples, token ids that the model does not know, or a ``config`` for one that exists.
            FloatingPointError: the loss is no longer a finite number.
        """
        trainer = self.trainer(examples, name, config, training, penalty)
        try:
            for step in trainer.run():
                if on_step:
                    on_step(step, trainer.total)
        finally:
            self.refresh(name)
        return trainer

    def trainer(
        self, examples: Sequence[Example], name: str = "default", config: LoraConfig | None = None,
        training: TrainingConfig | None = None, penalty: Penalty | None = None,
    ) -> Trainer:  # fmt: skip
        """What ``fit`` runs, to be stepped by hand; after that ``refresh(name)`` lets the model speak so."""
        from ruvllm.model.training import Trainer, TrainingConfig

        training = training or TrainingConfig()
        if name in self.adapters and config not in (None, self.adapters[name].config):
            raise ValueError(f"config: there is an adapter {name!r} of other settings: {self.adapters[name]!r}")
        if name not in self.adapters:
            self.attach(LoraAdapter(self.model.config, config, training.seed), name)
        fixed = self.factors({other: weight for other, weight in self.active.items() if other != name})
        return Trainer(self.model, self.adapters[name], examples, training, fixed, penalty)

    def adapt(
        self, feedback: Example, name: str = "micro", rank: int = 2, lr: float = 0.3, max_norm: float = 0.2,
        penalty: Consolidation | None = None,
    ) -> float:  # fmt: skip
        """One gradient step on a piece of feedback, in milliseconds: an adapter of rank 1 or 2 that learns as it goes.

        Args:
            feedback: a text, and which of its tokens were to be said.
            name: of the adapter, made at the first call; its targets are q and v.
            rank: of a new adapter.
            lr: the step is lr times the gradient of the mean loss ...
            max_norm: ... and at most this long, whatever the feedback.
            penalty: see ``adaptation.consolidate``.

        Returns:
            The mean loss of the feedback before the step.

        Raises:
            ValueError: token ids that the model does not know, or an option outside its range.
        """
        from ruvllm.model.adaptation import adapt_once
        from ruvllm.model.training_data import require_examples

        for option, value in (("lr", lr), ("max_norm", max_norm)):
            _require(option, value, _is_number(value) and 0 < value < math.inf, "a finite number above 0")
        require_examples("feedback", [feedback], self.model.config.vocab_size)
        if name not in self.adapters:
            self.attach(LoraAdapter(self.model.config, LoraConfig(rank, alpha=float(rank)), seed=0), name)
        fixed = self.factors({other: weight for other, weight in self.active.items() if other != name})
        loss = adapt_once(self.model, self.adapters[name], feedback, lr, max_norm, fixed, penalty)
        self.refresh(name)
        return loss

    def merge(self) -> None:
        """Write what acts now into the weights, after which it costs nothing; the originals are kept for ``unmerge``.

        Raises:
            ValueError: the weights are integers, which cannot take it; or something is merged already.
        """
        if self.merged:
            raise ValueError("merge: adapters are merged already; unmerge first")
        linears = self.model.linears()
        active = self._set_for(self.active)
        for name in active.matrices if active else ():
            if linears[name].layout not in FLOAT_LAYOUTS:
                found = f"{name} has {linears[name].layout} weights"
                raise ValueError(f"merge: {found}, which cannot be added to; load the model with weights='f32'")
        for name, (down, up) in self.factors(self.active).items():
            weights = linears[name].weights
            assert isinstance(weights, FloatWeights)
            self._unmerged[name] = weights
            linears[name].weights = weights.plus(up @ down)
        self.model.weights_changed()
        self._apply({})

    def unmerge(self) -> None:
        """Put the weights back that were there before ``merge``, bit for bit. No adapter acts then; see ``use``."""
        linears = self.model.linears()
        for name, weights in self._unmerged.items():
            linears[name].weights = weights
        self._unmerged = {}
        self.model.weights_changed()

    def _apply(self, active: dict[str, float]) -> None:
        self._active = {name: weight for name, weight in active.items() if weight}
        self.model.set_adapters(self._set_for(self.active))

    def _set_for(self, active: Mapping[str, float]) -> AdapterSet | None:
        """These adapters as one packed set; None for none."""
        if not active:
            return None
        key = tuple(sorted(active.items()))
        found = self._sets.get(key)
        if found is None:
            model = self.model
            half = not any(linear.layout in FLOAT_LAYOUTS for linear in model.linears().values())
            found = AdapterSet(len(model.layers), TARGETS, self.factors(active), half)
            while len(self._sets) >= _SETS_KEPT:
                self._sets.pop(next(iter(self._sets)))
            self._sets[key] = found
        return found

    def factors(self, active: Mapping[str, float]) -> dict[str, Factors]:
        """down (R, K) and up (N, R) of every matrix, R the sum of the ranks of the adapters on it."""
        parts: dict[str, list[Factors]] = {}
        for name, weight in active.items():
            for matrix in self.adapters[name].names:
                parts.setdefault(matrix, []).append(self.adapters[name].factors(matrix, weight))
        return {
            matrix: (np.concatenate([down for down, _ in some]), np.concatenate([up for _, up in some], axis=1))
            for matrix, some in parts.items()
        }

    def _forget(self, name: str) -> None:
        """Drop packed sets in which an adapter has a part."""
        self._sets = {key: held for key, held in self._sets.items() if all(other != name for other, _ in key)}

    def _known(self, name: str) -> str:
        if name not in self.adapters:
            raise KeyError(f"no adapter called {name!r}: there are {', '.join(self.adapters) or 'none'}")
        return name

    def __repr__(self) -> str:
        acting = ", ".join(f"{name}={weight:g}" for name, weight in self.active.items()) or "none acts"
        return f"MicroLora({len(self.adapters)} adapters; {acting})"


def _checked_weight(name: str, weight: Any) -> float:
    _require(f"weight of {name!r}", weight, _is_number(weight) and math.isfinite(weight), "a finite number")
    return float(weight)


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_integer(value) or isinstance(value, float | np.floating)


def _require(name: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, found {value!r}")
