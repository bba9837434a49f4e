"""Training an adapter: settings, learning-rate schedule, the steps, and checkpoints that resume exactly."""

from __future__ import annotations

import hashlib
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

import ruvllm.kernels as K
from ruvllm.brief import brief
from ruvllm.model.llama import Llama
from ruvllm.model.lora_adapter import LoraAdapter
from ruvllm.model.low_rank import Factors
from ruvllm.model.ranks import Ranks
from ruvllm.model.training_data import Example, make_batch, require_examples, step_batches, steps_per_epoch
from ruvllm.model.training_pass import TrainingPass

SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("adamw", "sgd")
_EVALUATION_TOKENS = 512  # tokens of a batch of evaluation


@dataclass(frozen=True)
class TrainingConfig:
    """How an adapter learns.

    epochs: how often each example is seen; ``steps``, if given, sets the number of steps instead.
    batch_size: examples at one time; ``accumulation`` such batches make one step.
    lr: the highest learning rate; it rises from 0 over ``warmup`` steps (below 1: that share of all steps), then
    follows ``schedule``: "cosine" or "linear" down to 0, or "constant".
    optimizer: "adamw" (beta1, beta2, eps, weight_decay) or "sgd" (momentum, weight_decay).
    max_grad_norm: longer gradients are scaled down to this norm; 0 for none.
    seed: of the order of examples, of dropout, of a new adapter.
    checkpointing: less memory, more time, the same results; see ``TrainingPass``.

    Raises:
        ValueError: a value outside its range; the message names it.
    """

    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 8
    accumulation: int = 1
    lr: float = 1e-3
    schedule: str = "cosine"
    warmup: float = 0.1
    optimizer: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        _number("epochs", self.epochs, self.epochs > 0, "above 0")
        if self.steps is not None:
            _whole("steps", self.steps, 1)
        for name in ("batch_size", "accumulation"):
            _whole(name, getattr(self, name), 1)
        _whole("seed", self.seed, 0)
        _number("lr", self.lr, self.lr > 0, "above 0")
        _number("eps", self.eps, self.eps > 0, "above 0")
        for name in ("warmup", "weight_decay", "max_grad_norm"):
            _number(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        for name in ("beta1", "beta2", "momentum"):
            _number(name, getattr(self, name), 0 <= getattr(self, name) < 1, "from 0 to below 1")
        for name, known in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, found {getattr(self, name)!r}")

    def total_steps(self, examples: int) -> int:
        """Steps of a whole run."""
        if self.steps is not None:
            return self.steps
        return max(1, round(self.epochs * steps_per_epoch(examples, self.batch_size * self.accumulation)))

    def learning_rate(self, step: int, total: int) -> float:
        """Of step 1 .. total."""
        rising = self.warmup if self.warmup >= 1 else self.warmup * total
        if step <= rising:
            return self.lr * step / max(rising, 1)
        done = max(0.0, step - 1 - rising) / max(total - rising, 1)
        left = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
        return self.lr * left[self.schedule]


@dataclass(frozen=True)
class Step:
    """One step: its number from 1, mean loss per target in nats, norm of the gradient, learning rate, duration."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """Mean negative log-likelihood of a target, in nats, over ``tokens`` targets."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """e^loss."""
        return math.exp(min(self.loss, 700.0))

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:.2f} ({self.tokens} tokens)"


class Penalty(Protocol):
    """A term added to the loss, for example elastic weight consolidation."""

    def add_gradient(self, parameters: np.ndarray, into: np.ndarray) -> None:
        """Add its gradient at ``parameters``."""
        ...


@dataclass
class Trainer:
    """Trains an adapter on examples, step by step; the base model is not touched.

    Args:
        model: the base model.
        adapter: trained, in place.
        examples: the training data.
        config: the settings.
        fixed: other adapters that are active, see ``MicroLora.factors``.
        penalty: added to the loss.
        ranks: those that train together: each has the whole model and all of this, learns from some of the sequences
            of each batch, and gets the same adapter.

    Raises:
        ValueError: no examples, or token ids that the model does not know.
        RankError: another rank has other examples.
    """

    model: Llama
    adapter: LoraAdapter
    examples: Sequence[Example]
    config: TrainingConfig = field(default_factory=TrainingConfig)
    fixed: Mapping[str, Factors] | None = None
    penalty: Penalty | None = None
    ranks: Ranks | None = None

    __repr__ = brief

    def __post_init__(self) -> None:
        require_examples("examples", self.examples, self.model.config.vocab_size)
        self.adapter.require_fits(self.model.config)
        if self.ranks is not None:
            checksum = zlib.crc32(b"".join(each.ids.tobytes() + each.learn.tobytes() for each in self.examples))
            self.ranks.compare({"same data": f"{len(self.examples)} examples, checksum {checksum:08x}"})
        self.total = self.config.total_steps(len(self.examples))
        self.done = 0  # steps
        self.history: list[Step] = []
        self._pass = TrainingPass(self.model, self.adapter, self.fixed, self.config.checkpointing)
        size = self.adapter.param_count
        self._gradient = np.zeros(size, np.float32)
        # AdamW's running means of the gradient and of its square; SGD's momentum is the first alone.
        self.m = np.zeros(size, np.float32)
        self.v = np.zeros(size if self.config.optimizer == "adamw" else 0, np.float32)

    def step(self) -> Step:
        """Learn from the next batches.

        Raises:
            FloatingPointError: the loss, or an element of the adapter, would no longer be finite; the adapter stays as
                it was before the step.
        """
        started, c = time.perf_counter(), self.config
        batches = list(step_batches(self.examples, self.done, c.batch_size, c.accumulation, c.seed))
        targets = sum(int((batch.targets >= 0).sum()) for batch in batches)
        tokens = sum(len(batch.ids) for batch in batches)
        self._gradient[:] = 0
        total = 0.0
        for number, batch in enumerate(batches):
            seed: tuple[int, ...] = (c.seed, self.done, number)
            if self.ranks is not None:
                part, seed = batch.sequences(self.ranks.rank, self.ranks.size), (*seed, self.ranks.rank)
                if part is None:
                    continue
                batch = part
            total += float(self._pass.gradients(batch, self._gradient, 1 / targets, seed).sum(dtype=np.float64))
        if self.ranks is not None:
            self.ranks.add(self._gradient)
            total = self.ranks.total(total)
        if self.penalty is not None:
            self.penalty.add_gradient(self.adapter.parameters, self._gradient)
        norm = clip(self._gradient, c.max_grad_norm)
        if not math.isfinite(total) or not math.isfinite(norm):
            raise FloatingPointError(f"step {self.done + 1}: loss {total / targets}, gradient norm {norm}; lower lr")
        number = self.done + 1
        rate = c.learning_rate(number, self.total)
        before = self.adapter.parameters.copy()
        self._update(number, rate)
        if not np.isfinite(self.adapter.parameters).all():
            self.adapter.parameters[:] = before
            raise FloatingPointError(f"step {number}: the adapter is no longer finite; lower lr")
        self.done = number
        report = Step(number, total / targets, norm, rate, tokens, time.perf_counter() - started)
        self.history.append(report)
        return report

    def run(self) -> Iterator[Step]:
        """The remaining steps, each as it is done."""
        while self.done < self.total:
            yield self.step()

    def evaluate(self, examples: Sequence[Example] | None = None) -> Evaluation:
        """The loss of the current adapter on examples (None: the training data), without dropout."""
        examples = self.examples if examples is None else examples
        return evaluate(self.model, self.adapter, examples, self.fixed)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """All that a later run needs to continue exactly here: arrays, and their description."""
        arrays = {"parameters": self.adapter.parameters, "m": self.m, "v": self.v}
        history = [asdict(step) for step in self.history]
        return arrays, {"done": self.done, "fingerprint": self.fingerprint(), "history": history}

    def restore(self, arrays: Mapping[str, np.ndarray], description: Mapping[str, Any]) -> None:
        """Continue from a ``state``.

        Raises:
            ValueError: it is of a run with other settings, another adapter, another model or other data.
        """
        mine, other = self.fingerprint(), description["fingerprint"]
        for key, value in mine.items():
            if other.get(key) != value:
                raise ValueError(f"checkpoint: {key} was {other.get(key)!r} there, and is {value!r} here")
        for name, array in (("parameters", self.adapter.parameters), ("m", self.m), ("v", self.v)):
            if arrays[name].shape != array.shape:
                raise ValueError(f"checkpoint: {name} has {arrays[name].size} elements there, {array.size} here")
            if not np.isfinite(arrays[name]).all():
                raise ValueError(f"checkpoint: {name} holds NaN or infinity")
            array[:] = arrays[name]
        self.done = int(description["done"])
        self.history = [Step(**step) for step in description["history"]]

    def fingerprint(self) -> dict[str, Any]:
        """What two runs must have in common for one to continue the other."""
        lora, model = self.adapter.config, self.model.config
        data = hash_of(self.examples)
        shape = [model.vocab_size, model.hidden_size, model.intermediate_size, model.num_hidden_layers]
        others = hashlib.sha256()
        for name, factors in sorted((self.fixed or {}).items()):
            others.update(name.encode() + b"".join(part.tobytes() for part in factors))
        return {
            **asdict(self.config), **asdict(lora), "targets": list(lora.targets), "model": shape, "data": data,
            "weights": sorted({linear.layout for linear in self.model.linears().values()}),
            "other adapters": others.hexdigest()[:16] if self.fixed else None,
        }  # fmt: skip

    def _update(self, number: int, rate: float) -> None:
        c, p, g = self.config, self.adapter.parameters, self._gradient
        if c.optimizer == "adamw":
            K.adamw(p, g, self.m, self.v, number, K.AdamW(rate, c.beta1, c.beta2, c.eps, c.weight_decay))
        else:
            self.m *= np.float32(c.momentum)
            self.m += g + np.float32(c.weight_decay) * p
            p -= np.float32(rate) * self.m


def clip(gradient: np.ndarray, max_norm: float) -> float:
    """Scale a gradient down to ``max_norm`` if it is longer (0: never); returns its original norm."""
    norm = math.sqrt(float(K.dot(gradient, gradient)))
    if max_norm and norm > max_norm:
        K.scale(gradient, max_norm / norm, out=gradient)
    return norm


def evaluate(
    model: Llama, adapter: LoraAdapter, examples: Sequence[Example], fixed: Mapping[str, Factors] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:  # fmt: skip
    """The loss of examples. ``progress`` is called with the number of examples done since the call before.

    Raises:
        ValueError: no examples, or token ids that the model does not know.
    """
    require_examples("examples", examples, model.config.vocab_size)
    forward = TrainingPass(model, adapter, fixed)
    total, count, at = 0.0, 0, 0
    while at < len(examples):
        some = [examples[at]]
        while at + len(some) < len(examples) and sum(len(e.ids) for e in some) < _EVALUATION_TOKENS:
            some.append(examples[at + len(some)])
        losses = forward.losses(make_batch(some))
        total, count, at = total + float(losses.sum(dtype=np.float64)), count + len(losses), at + len(some)
        if progress:
            progress(len(some))
    return Evaluation(total / count, count)


def hash_of(examples: Sequence[Example]) -> str:
    """A fingerprint of examples."""
    state = hashlib.sha256()
    for example in examples:
        state.update(len(example.ids).to_bytes(8, "little") + example.ids.tobytes() + example.learn.tobytes())
    return state.hexdigest()[:16]


def _number(name: str, value: Any, ok: bool, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not ok:
        raise ValueError(f"{name}: expected a finite number {expected}, found {value!r}")


def _whole(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}: expected an integer >= {low}, found {value!r}")
