"""Loss and gradients: against PyTorch's autograd through PEFT, and the properties that they must have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ruvllm.checkpoint.adapters import load_adapter
from ruvllm.checkpoint.names import hf_name
from ruvllm.model import LoraAdapter, LoraConfig, MicroLora
from ruvllm.model.lora import TARGETS
from ruvllm.model.training_pass import Batch, TrainingPass
from tests.model import architectures, tiny
from tests.model.model_cases import SMALL, WINDOWED, load, logits, small_model, text

GOLDEN = Path(__file__).parents[1] / "data" / "lora"
PEFT_CASES = ("attention_bias", "bf16_sharded_tied", "llama3_scaled_gqa", "mistral_window")


def batch_of(*sequences: np.ndarray) -> Batch:
    """Sequences whose every next token is to be predicted."""
    targets = [np.append(ids[1:], -1) for ids in sequences]
    starts = np.cumsum([0, *map(len, sequences)])
    return Batch(np.concatenate(sequences), np.concatenate(targets), starts)


def random_adapter(config=SMALL, targets=TARGETS, dropout: float = 0.0) -> LoraAdapter:
    adapter = LoraAdapter(config, LoraConfig(3, targets=targets, dropout=dropout), seed=1)
    for b in adapter.b.values():
        b[:] = np.random.default_rng(2).standard_normal(b.shape) * 0.1
    return adapter


def gradient(model, adapter, batch, checkpointing=False, seed=None, fixed=None) -> tuple[np.ndarray, np.ndarray]:
    into = np.zeros_like(adapter.parameters)
    losses = TrainingPass(model, adapter, fixed, checkpointing).gradients(batch, into, 1.0, seed)
    return losses, into


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("case", PEFT_CASES)
def test_gradients_of_pytorch(case: str, checkpointing: bool) -> None:
    model = load(tiny.directory(case), "f32")
    adapter = load_adapter(GOLDEN / case, model.config)
    with np.load(GOLDEN / case / "golden.npz") as golden:
        expected = dict(golden)
    ids, targets = expected["ids"], expected["targets"]
    batch = Batch(ids, targets, np.array([0, len(ids)]))
    count = int((targets >= 0).sum())
    into = np.zeros_like(adapter.parameters)
    losses = TrainingPass(model, adapter, checkpointing=checkpointing).gradients(batch, into, 1 / count)
    assert len(losses) == count and abs(losses.mean() - expected["loss"]) <= 1e-5
    grad_a, grad_b = adapter.views(into)
    for name in adapter.names:
        stored = "base_model.model." + hf_name(name).removesuffix(".weight")
        for got, key in ((grad_a[name].T, "lora_A"), (grad_b[name].T, "lora_B")):
            wanted = expected[f"{stored}.{key}.weight"]
            assert np.linalg.norm(got - wanted) <= 1e-4 * np.linalg.norm(wanted), (name, key)


@pytest.mark.parametrize("layout", ["f32", "int8", "int4"])
def test_checkpointing_and_threads_change_nothing(layout: str) -> None:
    batch, adapter = batch_of(text(70), text(9, seed=1), text(33, seed=2)), random_adapter()
    one = gradient(small_model(layout, 1), adapter, batch)
    for threads, checkpointing in ((2, False), (2, True), (1, True)):
        other = gradient(small_model(layout, threads), adapter, batch, checkpointing)
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


@pytest.mark.parametrize("config", [SMALL, WINDOWED], ids=["full", "window"])
def test_sequences_do_not_see_each_other(config) -> None:
    """The gradient of a batch is the sum of those of its sequences; a loss is that of the sequence alone."""
    model, adapter = small_model("f32", config=config), random_adapter(config)
    sequences = [text(50), text(3, seed=1), text(101, seed=2)]
    losses, got = gradient(model, adapter, batch_of(*sequences))
    alone = [gradient(model, adapter, batch_of(ids)) for ids in sequences]
    np.testing.assert_allclose(losses, np.concatenate([a[0] for a in alone]), atol=2e-5)
    expected = np.sum([a[1] for a in alone], axis=0, dtype=np.float64)
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("layout", ["f32", "int4"])
def test_the_loss_is_that_of_the_model_that_speaks(layout: str) -> None:
    """The forward pass of training and the forward region agree, fixed adapters included."""
    model, learning, other = small_model(layout), random_adapter(), random_adapter(targets=("v", "up"))
    lora = MicroLora(model)
    lora.attach(learning, "learning")
    lora.attach(other, "other", 0.5)
    ids = text(40)
    x = logits(model, ids).astype(np.float64)[:-1]
    expected = np.log(np.exp(x).sum(axis=1)) - x[np.arange(39), ids[1:]]
    fixed = lora.factors({"other": 0.5})
    losses = TrainingPass(model, learning, fixed).losses(batch_of(ids))
    if layout == "f32":
        assert np.abs(losses - expected).max() <= 1e-4
    else:  # adapters in 8 bits there; one activation rounded the other way moves a single loss further
        assert abs(losses.mean() - expected.mean()) <= 5e-3


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_gradient_is_the_slope_of_the_loss(dropout: float) -> None:
    """A small step along a direction changes the loss by gradient times step, with dropout and a fixed adapter too."""
    model, adapter = small_model("f32"), random_adapter(dropout=dropout)
    lora = MicroLora(model)
    lora.attach(random_adapter(targets=("q", "down")), "fixed")
    fixed, batch, seed = lora.factors({"fixed": 1.0}), batch_of(text(40), text(20, seed=3)), (5, 6)
    _, slope = gradient(model, adapter, batch, seed=seed, fixed=fixed)
    direction = np.random.default_rng(0).standard_normal(slope.shape).astype(np.float32)
    direction *= 0.02 / np.linalg.norm(direction)
    start, ends = adapter.parameters.copy(), []
    for sign in (1, -1):
        adapter.parameters[:] = start + sign * direction
        ends.append(gradient(model, adapter, batch, seed=seed, fixed=fixed)[0].sum(dtype=np.float64))
    adapter.parameters[:] = start
    assert abs((ends[0] - ends[1]) / 2 - slope @ direction) <= 0.02 * abs(slope @ direction) + 2e-4


def test_masked_tokens_and_dropout() -> None:
    model, adapter = small_model("f32"), random_adapter(dropout=0.5)
    ids = text(30)
    masked = batch_of(ids).targets.copy()
    masked[:20] = -1
    full, part = batch_of(ids), Batch(ids, masked, np.array([0, 30]))
    np.testing.assert_allclose(gradient(model, adapter, part)[0], gradient(model, adapter, full)[0][20:], atol=1e-5)
    first, again, other = (gradient(model, adapter, full, seed=(0, step))[1] for step in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0


@pytest.mark.parametrize(
    ("name", "step"), [("qwen3", 0.01), ("gemma", 0.01), ("parallel", 0.01), ("mixture", 2e-4), ("shared", 2e-4)]
)  # fmt: skip
def test_the_gradient_is_the_slope_of_the_loss_in_other_architectures(name: str, step: float) -> None:
    """Every operation has its way back: norms of heads, GeGLU, norms after, parallel branches, experts.

    The step of a mixture is short: the loss jumps where a token changes its experts.
    """
    model, adapter = architectures.build(name, "f32"), random_adapter(architectures.CONFIG, ("q", "v", "o"))
    batch = batch_of(text(23, vocabulary=300), text(14, seed=3, vocabulary=300))
    _, slope = gradient(model, adapter, batch)
    np.testing.assert_array_equal(gradient(model, adapter, batch, checkpointing=True)[1], slope)
    rng, start = np.random.default_rng(0), adapter.parameters.copy()
    for _ in range(3):
        direction = rng.standard_normal(slope.shape).astype(np.float32)
        direction *= step / np.linalg.norm(direction)
        direction += np.float32(step) * slope / np.linalg.norm(slope)
        ends = []
        for sign in (1, -1):
            adapter.parameters[:] = start + sign * direction
            ends.append(gradient(model, adapter, batch)[0].sum(dtype=np.float64))
        adapter.parameters[:] = start
        assert (ends[0] - ends[1]) / 2 == pytest.approx(float(slope @ direction), rel=0.02)
