"""MicroLoRA: low-rank adapters over a model: attach, mix, swap between two tokens, switch off, train, merge.

The base weights stay frozen, so they may have 4 or 8 bits; only ``merge`` changes weights, of floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ruvllm.errors import printable
from ruvllm.model.checks import is_number, require
from ruvllm.model.lora_adapter import TARGETS, LoraAdapter, LoraConfig
from ruvllm.model.low_rank import AdapterSet, Factors
from ruvllm.model.weights import FloatWeights

if TYPE_CHECKING:
    from ruvllm.model.adaptation import Consolidation
    from ruvllm.model.llama import Llama
    from ruvllm.model.ranks import Ranks
    from ruvllm.model.training import Penalty, Step, Trainer, TrainingConfig
    from ruvllm.model.training_data import Example

__all__ = ["TARGETS", "LoraAdapter", "LoraConfig", "MicroLora"]

_SETS_KEPT = 16  # mixtures of adapters that are packed already


class MicroLora:
    """The adapters of a model: which exist, and which are active with what weight.

    A change takes effect at the next token; the base weights, the model and its caches stay unchanged. What a KV cache
    already holds was computed with the adapters active then.
    """

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.adapters: dict[str, LoraAdapter] = {}
        self._active: dict[str, float] = {}
        self._enabled = True
        self._sets: dict[tuple[tuple[str, float], ...], AdapterSet] = {}
        self._merged: tuple[str, ...] = ()  # adapters that are in the weights
        self._unmerged: dict[str, FloatWeights] = {}  # what those were before

    @property
    def active(self) -> dict[str, float]:
        """The active adapters and their weights; none while disabled."""
        return dict(self._active) if self._enabled else {}

    @property
    def merged(self) -> bool:
        """Whether adapters have been written into the weights."""
        return bool(self._unmerged)

    def attach(self, adapter: LoraAdapter, name: str = "default", weight: float = 1.0) -> LoraAdapter:
        """Add an adapter and activate it, next to those that are active.

        Raises:
            TypeError: the name is not a string.
            ValueError: it was made for another model, holds NaN, or the name is taken by another adapter or merged.
        """
        if not isinstance(name, str):
            raise TypeError(f"name: expected a string, found {name!r}")
        self._require_not_merged(name)
        if self.adapters.get(name, adapter) is not adapter:
            raise ValueError(f"name: there is an adapter {name!r} already; detach it first or choose another name")
        adapter.require_fits(self.model.whole_config)
        adapter.require_finite()
        weight = _checked_weight(name, weight)
        known = name in self.adapters
        self.adapters[name] = adapter
        self._forget(name)
        try:
            self._set_for({name: 1.0})  # packed now, so that a swap to it takes no time
            self._apply({**self._active, name: weight})
        except ValueError:  # numbers too large
            if not known:
                del self.adapters[name]
            raise
        return adapter

    def detach(self, name: str) -> LoraAdapter:
        """Remove an adapter and return it.

        Raises:
            KeyError: there is none of this name.
            ValueError: it is merged.
        """
        self._require_not_merged(name)
        adapter = self.adapters.pop(self._known(name))
        self._apply({other: weight for other, weight in self._active.items() if other != name})
        self._forget(name)
        return adapter

    def use(self, *names: str | Mapping[str, float]) -> None:
        """Activate exactly these adapters: ``use("a")``, ``use("a", "b")``, ``use({"a": 0.7, "b": 0.3})``, ``use()``.

        Raises:
            KeyError: there is no adapter of this name.
            ValueError: a weight that is not a finite number, or an adapter that is merged and would apply twice.
        """
        weights: dict[str, float] = {}
        for name in names:
            weights |= {name: 1.0} if isinstance(name, str) else name
        for name in weights:
            self._require_not_merged(self._known(name))
        self._apply({name: _checked_weight(name, weight) for name, weight in weights.items()})

    def enable(self) -> None:
        """Undo ``disable``."""
        self._enabled = True
        self._apply(self._active)

    def disable(self) -> None:
        """Run the model without its adapters, until ``enable``. Merged adapters stay in the weights."""
        self._enabled = False
        self._apply(self._active)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Disable the adapters inside the block."""
        before = self._enabled
        self.disable()
        try:
            yield
        finally:
            if before:
                self.enable()

    def refresh(self, name: str) -> None:
        """Pack an adapter again after its weights were changed in place.

        Raises:
            KeyError: there is none of this name.
            ValueError: they hold NaN, or it is merged.
        """
        self._require_not_merged(name)
        self.adapters[self._known(name)].require_finite()
        self._forget(name)
        self._apply(self._active)

    def fit(
        self, examples: Sequence[Example], name: str = "default", config: LoraConfig | None = None,
        training: TrainingConfig | None = None, penalty: Penalty | None = None,
        on_step: Callable[[Step, int], object] | None = None, ranks: Ranks | None = None,
    ) -> Trainer:  # fmt: skip
        """Train the adapter ``name``, a new one of ``config`` if there is none, and activate it.

        Other active adapters stay frozen, as parts of the model that it is trained on.

        Args:
            examples: the training data.
            name: of the adapter.
            config: of a new adapter; one that exists keeps its own.
            training: the settings of training.
            penalty: added to the loss, for example ``adaptation.consolidate``.
            on_step: called after each step with its report and the number of all steps.
            ranks: those that train together, see ``Trainer``.

        Returns:
            The Trainer, with ``history`` and ``evaluate``.

        Raises:
            ValueError: no examples, token ids that the model does not know, a ``config`` for one that exists, or an
                adapter that is merged.
            FloatingPointError: the loss is no longer a finite number.
        """
        known = name in self.adapters
        trainer = self.trainer(examples, name, config, training, penalty, ranks)
        try:
            for step in trainer.run():
                if on_step:
                    on_step(step, trainer.total)
        except (FloatingPointError, ValueError):
            if known:
                self.refresh(name)
            else:  # nothing was learned
                self.detach(name)
            raise
        except BaseException:  # what was learned until the caller ended it is kept
            self._act(name)
            raise
        self._act(name)
        return trainer

    def trainer(
        self, examples: Sequence[Example], name: str = "default", config: LoraConfig | None = None,
        training: TrainingConfig | None = None, penalty: Penalty | None = None, ranks: Ranks | None = None,
    ) -> Trainer:  # fmt: skip
        """The Trainer of ``fit``, to step by hand; afterwards ``refresh(name)`` activates the result."""
        from ruvllm.model.training import Trainer, TrainingConfig

        training = training or TrainingConfig()
        self._require_not_merged(name)
        if name in self.adapters and config not in (None, self.adapters[name].config):
            raise ValueError(f"config: adapter {name!r} exists with other settings: {self.adapters[name]!r}")
        fixed = self.factors({other: weight for other, weight in self.active.items() if other != name})
        if name in self.adapters:
            return Trainer(self.model, self.adapters[name], examples, training, fixed, penalty, ranks)
        adapter = LoraAdapter(self.model.config, config, training.seed)
        trainer = Trainer(self.model, adapter, examples, training, fixed, penalty, ranks)
        self.attach(adapter, name)
        return trainer

    def adapt(
        self, feedback: Example, name: str = "micro", rank: int = 2, lr: float = 3.0, max_norm: float = 0.4,
        penalty: Consolidation | None = None,
    ) -> float:  # fmt: skip
        """One gradient step on a piece of feedback, in milliseconds: with an adapter of rank 1 or 2.

        The defaults are measured on SmolLM2: three steps on one of five pieces of feedback took its loss from 4.42 to
        3.66 on average, and the perplexity of other texts rose by 0.9 %, at most by 2.6 %. Longer steps cost more.

        Args:
            feedback: a text, with the tokens that should have been generated as targets.
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
            require(option, value, is_number(value) and 0 < value < math.inf, "a finite number above 0")
        self._require_not_merged(name)
        require_examples("feedback", [feedback], self.model.config.vocab_size)
        if name not in self.adapters:
            self.attach(LoraAdapter(self.model.config, LoraConfig(rank, alpha=float(rank)), seed=0), name)
        fixed = self.factors({other: weight for other, weight in self.active.items() if other != name})
        loss = adapt_once(self.model, self.adapters[name], feedback, lr, max_norm, fixed, penalty)
        self._act(name)
        return loss

    def merge(self) -> None:
        """Add the active adapters to the weights, where they cost nothing; the originals are kept for ``unmerge``.

        Raises:
            ValueError: the weights are integers, something is merged already, or no adapter is active.
        """
        if self.merged:
            raise ValueError("merge: adapters are merged already; unmerge first")
        if not self.active:
            raise ValueError(f"merge: no adapter is active, {'they are disabled' if self._active else 'see use'}")
        linears, before, merged = self.model.linears(), {}, {}
        for name, (down, up) in self.factors(self.active).items():
            weights = linears[name].weights
            if not isinstance(weights, FloatWeights):
                found = f"{name} has {linears[name].layout} weights"
                raise ValueError(f"merge: {found}, which cannot be added to; load the model with weights='f32'")
            before[name], merged[name] = weights, weights.plus(up @ down)
        for name, weights in merged.items():
            linears[name].weights = weights
        self._merged, self._unmerged = tuple(self.active), before
        self.model.weights_changed()
        self._apply({})

    def unmerge(self) -> None:
        """Restore the weights of before ``merge``, bit for bit; the merged adapters are then inactive."""
        linears = self.model.linears()
        for name, weights in self._unmerged.items():
            linears[name].weights = weights
        self._merged, self._unmerged = (), {}
        self.model.weights_changed()

    def _apply(self, active: dict[str, float]) -> None:
        active = {name: weight for name, weight in active.items() if weight}
        self.model.set_adapters(self._set_for(active) if self._enabled else None)
        self._active = active

    def _set_for(self, active: Mapping[str, float]) -> AdapterSet | None:
        """These adapters as one packed set; None for none."""
        if not active:
            return None
        key = tuple(sorted(active.items()))
        found = self._sets.get(key)
        if found is None:
            found = self.model.pack_adapters(self.factors(active))
            while len(self._sets) >= _SETS_KEPT:
                self._sets.pop(next(iter(self._sets)))
            self._sets[key] = found
        return found

    def factors(self, active: Mapping[str, float]) -> dict[str, Factors]:
        """down (R, K) and up (N, R) of every matrix, R the sum of the ranks of the adapters on it.

        Raises ValueError if a weight makes elements too large for float32.
        """
        parts: dict[str, list[Factors]] = {}
        for name, weight in active.items():
            for matrix in self.adapters[name].names:
                with np.errstate(over="ignore", invalid="ignore"):
                    down, up = self.adapters[name].factors(matrix, weight)
                if not np.isfinite(up).all():
                    raise ValueError(f"weight of {name!r}: {weight:g} makes elements too large for float32")
                parts.setdefault(matrix, []).append((down, up))
        return {
            matrix: (np.concatenate([down for down, _ in some]), np.concatenate([up for _, up in some], axis=1))
            for matrix, some in parts.items()
        }

    def _act(self, name: str) -> None:
        """Activate an adapter whose weights were changed: with its factor, else 1."""
        self._active = {**self._active, name: self._active.get(name, 1.0)}
        self.refresh(name)

    def _forget(self, name: str) -> None:
        """Drop packed sets that contain an adapter."""
        self._sets = {key: held for key, held in self._sets.items() if all(other != name for other, _ in key)}

    def _require_not_merged(self, name: str) -> None:
        """Refuse to change a merged adapter: the weights would not follow."""
        if name in self._merged:
            raise ValueError(f"adapter {name!r} is merged into the weights; unmerge first")

    def _known(self, name: str) -> str:
        if name not in self.adapters:
            raise KeyError(f"no adapter called {name!r}: there are {', '.join(self.adapters) or 'none'}")
        return name

    def __repr__(self) -> str:
        acting = ", ".join(f"{name}={weight:g}" for name, weight in self.active.items()) or "none active"
        return f"MicroLora({len(self.adapters)} adapters; {printable(acting)})"


def _checked_weight(name: str, weight: Any) -> float:
    require(f"weight of {name!r}", weight, is_number(weight) and math.isfinite(weight), "a finite number")
    return float(weight)
