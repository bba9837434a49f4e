"""Learning on the fly: one gradient step on a piece of feedback, and a penalty against forgetting.

Elastic weight consolidation adds strength / 2 sum(F (p - p0)^2) to the loss: p0 are the parameters after the old task,
F is the diagonal of the Fisher information there, estimated from the old task's data as the mean over its examples of
the squared gradient of their log-likelihood.

Source: Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ruvllm.brief import brief
from ruvllm.model.llama import Llama
from ruvllm.model.lora_adapter import LoraAdapter
from ruvllm.model.low_rank import Factors
from ruvllm.model.training import clip
from ruvllm.model.training_data import Example, make_batch, require_examples
from ruvllm.model.training_pass import TrainingPass


@dataclass(frozen=True)
class Consolidation:
    """A penalty for departing from what was learned: strength / 2 sum(fisher (p - anchor)^2).

    anchor, fisher: (n,) float32, laid out as ``LoraAdapter.parameters``; see ``consolidate``.
    """

    anchor: np.ndarray
    fisher: np.ndarray
    strength: float

    __repr__ = brief

    def __post_init__(self) -> None:
        if self.anchor.shape != self.fisher.shape:
            raise ValueError(f"fisher: expected {self.anchor.size} elements, found {self.fisher.size}")
        if not 0 <= self.strength < np.inf:
            raise ValueError(f"strength: expected a finite number >= 0, found {self.strength!r}")

    def loss(self, parameters: np.ndarray) -> float:
        """Its value at ``parameters``."""
        distance = (parameters - self.anchor).astype(np.float64)
        return float(self.strength / 2 * np.sum(self.fisher * distance**2))

    def add_gradient(self, parameters: np.ndarray, into: np.ndarray) -> None:
        """Add its gradient at ``parameters``, strength fisher (p - anchor). Raises ValueError for another size."""
        if parameters.shape != self.anchor.shape:
            raise ValueError(f"penalty: expected {parameters.size} elements (the adapter's), found {self.anchor.size}")
        into += np.float32(self.strength) * self.fisher * (parameters - self.anchor)


def fisher_information(
    model: Llama, adapter: LoraAdapter, examples: Sequence[Example], fixed: Mapping[str, Factors] | None = None,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:  # fmt: skip
    """The diagonal of the empirical Fisher information: mean over examples of (gradient of their summed loss)^2.

    Returns:
        (n,) float32, laid out as ``adapter.parameters``.

    Raises:
        ValueError: no examples, or token ids that the model does not know.
    """
    require_examples("examples", examples, model.config.vocab_size)
    forward = TrainingPass(model, adapter, fixed)
    total, gradient = np.zeros_like(adapter.parameters), np.empty_like(adapter.parameters)
    for example in examples:
        gradient[:] = 0
        forward.gradients(make_batch([example]), gradient, 1.0)
        total += gradient * gradient
        if progress:
            progress(1)
    return total / np.float32(len(examples))


def consolidate(
    model: Llama, adapter: LoraAdapter, examples: Sequence[Example], strength: float = 1.0,
    fixed: Mapping[str, Factors] | None = None,
) -> Consolidation:  # fmt: skip
    """What an adapter has learned from examples, as a penalty for later training (``penalty`` of ``MicroLora.fit``).

    Raises:
        ValueError: no examples, token ids that the model does not know, or a negative strength.
    """
    fisher = fisher_information(model, adapter, examples, fixed)
    return Consolidation(adapter.parameters.copy(), fisher, strength)


def adapt_once(
    model: Llama, adapter: LoraAdapter, example: Example, lr: float, max_norm: float,
    fixed: Mapping[str, Factors] | None = None, penalty: Consolidation | None = None,
) -> float:  # fmt: skip
    """One step down the gradient of an example's mean loss, in place; the step is at most ``max_norm`` long.

    Returns:
        The mean loss before the step.
    """
    gradient = np.zeros_like(adapter.parameters)
    forward = TrainingPass(model, adapter, fixed)
    losses = forward.gradients(make_batch([example]), gradient, 1 / example.target_count)
    if penalty is not None:
        penalty.add_gradient(adapter.parameters, gradient)
    gradient *= np.float32(lr)
    if not np.isfinite(clip(gradient, max_norm)):
        raise FloatingPointError("adapt: the gradient is no longer a finite number; reset the adapter")
    adapter.parameters -= gradient
    return float(losses.mean())
