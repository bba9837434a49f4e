"""Training data: tokens, which of them are targets, and how examples form batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ruvllm.brief import brief
from ruvllm.model.training_pass import NO_TARGET, Batch


@dataclass(frozen=True)
class Example:
    """One text. ids: (T,) int64. learn: (T,) bool, the tokens to predict (an answer, not its prompt).

    Raises:
        ValueError: the two do not match, or there is nothing to learn: the first token has nothing before it.
    """

    ids: np.ndarray
    learn: np.ndarray

    __repr__ = brief

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", np.asarray(self.ids, np.int64))
        object.__setattr__(self, "learn", np.asarray(self.learn, bool))
        if self.ids.ndim != 1 or self.ids.shape != self.learn.shape:
            raise ValueError(f"learn: expected one mark per token, found {self.learn.shape} for ids {self.ids.shape}")
        if not self.learn[1:].any():
            raise ValueError("learn: expected a token to predict after the first, found none")

    @property
    def target_count(self) -> int:
        """How many tokens are predicted."""
        return int(self.learn[1:].sum())


def require_examples(name: str, examples: Sequence[Example], vocabulary: int) -> None:
    """Raise ValueError where there are none, or where one holds a token that the model does not know."""
    if not examples:
        raise ValueError(f"{name}: expected at least one example, found none")
    for number, example in enumerate(examples):
        if example.ids.min() < 0 or example.ids.max() >= vocabulary:
            found = f"{example.ids.min()} to {example.ids.max()} in example {number}"
            raise ValueError(f"{name}: expected token ids from 0 to {vocabulary - 1}, found {found}")


def make_batch(examples: Sequence[Example]) -> Batch:
    """Examples, concatenated."""
    targets = []
    for example in examples:
        wanted = np.where(example.learn[1:], example.ids[1:], NO_TARGET)
        targets.append(np.append(wanted, NO_TARGET))
    starts = np.cumsum([0, *(len(example.ids) for example in examples)])
    return Batch(np.concatenate([example.ids for example in examples]), np.concatenate(targets), starts)


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the examples in an epoch; it depends on seed and epoch alone, so that a run can be resumed."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def steps_per_epoch(count: int, per_step: int) -> int:
    """Steps that see each example once; the last one may see fewer."""
    return -(-count // per_step)


def step_batches(
    examples: Sequence[Example], step: int, batch_size: int, accumulation: int, seed: int
) -> Iterator[Batch]:
    """The batches of step 0, 1, ...: ``accumulation`` of them, of ``batch_size`` examples each."""
    per_step = batch_size * accumulation
    epoch, at = divmod(step, steps_per_epoch(len(examples), per_step))
    order = epoch_order(len(examples), seed, epoch)[at * per_step : (at + 1) * per_step]
    for lo in range(0, len(order), batch_size):
        yield make_batch([examples[i] for i in order[lo : lo + batch_size]])
