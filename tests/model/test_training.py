"""Training: the steps, the schedule, checkpoints that resume exactly, adaptation, and what is not forgotten."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ruvllm.checkpoint import training_state
from ruvllm.checkpoint.training_state import resume_training, save_training
from ruvllm.errors import ModelFormatError
from ruvllm.model import LoraAdapter, LoraConfig, MicroLora
from ruvllm.model.adaptation import Consolidation, consolidate, fisher_information
from ruvllm.model.training import Trainer, TrainingConfig, clip, evaluate
from ruvllm.model.training_data import Example, make_batch, step_batches
from ruvllm.model.training_pass import TrainingPass
from tests.model.model_cases import SMALL, small_model, text

LORA = LoraConfig(4, 8.0, targets=("q", "v", "down"))


def task(seed: int, count: int = 4, tokens: int = 12) -> list[Example]:
    """Random texts to be learned by heart."""
    return [Example(text(tokens, seed=100 * seed + n), np.ones(tokens, bool)) for n in range(count)]


def trained(config: TrainingConfig, layout: str = "f32", **more) -> Trainer:
    model = small_model(layout, threads=1)
    trainer = Trainer(model, LoraAdapter(SMALL, LORA), task(0), config, **more)
    list(trainer.run())
    return trainer


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("layout", ["f32", "int4"])
def test_a_model_learns_by_heart(layout: str, optimizer: str) -> None:
    rate = 0.03 if optimizer == "adamw" else 1.0
    config = TrainingConfig(steps=25, batch_size=4, lr=rate, optimizer=optimizer, momentum=0.5)
    trainer = trained(config, layout)
    first = Trainer(trainer.model, LoraAdapter(SMALL, LORA), task(0)).evaluate()
    assert trainer.history[0].loss == pytest.approx(first.loss, abs=1e-4)  # a new adapter adds nothing
    assert trainer.evaluate().loss < 0.7 * first.loss
    assert evaluate(trainer.model, trainer.adapter, task(9)).loss > first.loss * 0.8  # not other texts


def test_accumulated_batches_are_one_batch() -> None:
    """Also where batches have unlike numbers of targets: the step's loss is the mean over all of them."""
    examples = [Example(text(n, seed=n), np.arange(n) > n // 3) for n in (5, 30, 9, 14)]
    results = []
    for batch, accumulation in ((4, 1), (1, 4), (2, 2)):
        config = TrainingConfig(steps=3, batch_size=batch, accumulation=accumulation, optimizer="sgd", lr=0.5)
        trainer = Trainer(small_model("f32", 1), LoraAdapter(SMALL, LORA), examples, config)
        list(trainer.run())
        results.append((trainer.adapter.parameters, [step.loss for step in trainer.history]))
    for parameters, losses in results[1:]:
        np.testing.assert_allclose(parameters, results[0][0], atol=1e-6)
        np.testing.assert_allclose(losses, results[0][1], rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_resumed_run_is_the_whole_run(optimizer: str, tmp_path: Path) -> None:
    config = TrainingConfig(steps=7, batch_size=3, lr=0.01, optimizer=optimizer, momentum=0.9, seed=5)
    lora = LoraConfig(2, dropout=0.3)
    whole = Trainer(small_model("int8", 1), LoraAdapter(SMALL, lora), task(1), config)
    for step in whole.run():
        if step.step == 3:
            save_training(whole, tmp_path)
    resumed = Trainer(small_model("int8", 1), LoraAdapter(SMALL, lora, seed=8), task(1), config)
    resume_training(resumed, tmp_path)
    assert resumed.done == 3
    list(resumed.run())
    np.testing.assert_array_equal(resumed.adapter.parameters, whole.adapter.parameters)
    assert [step.loss for step in resumed.history] == [step.loss for step in whole.history]


def test_checkpoints_of_another_run_are_refused(tmp_path: Path) -> None:
    model = small_model("f32", 1)
    config = TrainingConfig(steps=2, lr=0.01)
    run = Trainer(model, LoraAdapter(SMALL, LORA), task(1), config)
    run.step()
    save_training(run, tmp_path)
    for other, message in (
        (Trainer(model, LoraAdapter(SMALL, LORA), task(1), TrainingConfig(steps=2, lr=0.02)), "lr was 0.01 there"),
        (Trainer(model, LoraAdapter(SMALL, LoraConfig(2)), task(1), config), "rank was 4 there, and is 2 here"),
        (Trainer(model, LoraAdapter(SMALL, LORA), task(2), config), "data was"),
    ):
        with pytest.raises(ModelFormatError, match=message):
            resume_training(other, tmp_path)
        assert other.done == 0
    with pytest.raises(FileNotFoundError):
        resume_training(run, tmp_path / "none")
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    (tmp_path / "trainer_state.json").write_text(json.dumps({**state, "done": 2}))
    with pytest.raises(ModelFormatError, match="done: found 2, expected trainer_state-2.safetensors next to it"):
        resume_training(run, tmp_path)
    (tmp_path / "trainer_state.json").write_text("[")
    with pytest.raises(ModelFormatError, match="no JSON"):
        resume_training(run, tmp_path)


def test_schedules_and_clipping() -> None:
    config = TrainingConfig(lr=1.0, warmup=4, schedule="linear")
    rates = [config.learning_rate(step, 12) for step in range(1, 13)]
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(rates[4:], [1 - i / 8 for i in range(8)])
    cosine = TrainingConfig(lr=2.0, warmup=0.0)
    assert cosine.learning_rate(1, 10) == 2.0 and cosine.learning_rate(6, 10) == pytest.approx(1.0)
    assert {TrainingConfig(schedule="constant", warmup=0.0).learning_rate(s, 9) for s in range(1, 10)} == {1e-3}
    assert TrainingConfig(epochs=2.5, batch_size=4).total_steps(10) == 8
    gradient = np.array([3.0, 4.0], np.float32)
    assert clip(gradient, 10.0) == pytest.approx(5.0) and gradient.tolist() == [3, 4]
    assert clip(gradient, 1.0) == pytest.approx(5.0)
    np.testing.assert_allclose(gradient, [0.6, 0.8], rtol=1e-6)


def test_each_epoch_sees_each_example_once() -> None:
    examples = [Example(np.array([n, n + 1]), np.ones(2, bool)) for n in range(10)]
    seen = [int(i) for step in range(4) for b in step_batches(examples, step, 2, 2, 0) for i in b.ids[::2]]
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[:10]) != seen[:10]
    assert seen[10:] != seen[: len(seen) - 10]


def test_fit_with_another_adapter_attached() -> None:
    model = small_model("f32", 1)
    lora = MicroLora(model)
    other = LoraAdapter(SMALL, LoraConfig(2), seed=4)
    for b in other.b.values():
        b[:] = 0.2
    lora.attach(other, "other")
    before = other.parameters.copy()
    seen = []
    training = TrainingConfig(steps=15, batch_size=4, lr=0.03)
    trainer = lora.fit(task(0), "mine", LORA, training, on_step=lambda step, total: seen.append((step.step, total)))
    assert seen[-1] == (15, 15) and lora.active == {"other": 1.0, "mine": 1.0}
    np.testing.assert_array_equal(other.parameters, before)
    ids = task(0)[0].ids
    x = model.forward(ids, model.new_cache(12))[:-1].astype(np.float64)
    spoken = np.log(np.exp(x).sum(axis=1)) - x[np.arange(11), ids[1:]]
    assert spoken.mean() == pytest.approx(trainer.evaluate(task(0)[:1]).loss, abs=1e-4)
    with pytest.raises(ValueError, match="adapter 'mine' exists with other settings"):
        lora.fit(task(0), "mine", LoraConfig(1))


@pytest.mark.parametrize("layout", ["f32", "int4"])
def test_adapt_learns_from_one_step_of_bounded_length(layout: str) -> None:
    lora = MicroLora(small_model(layout, 1))
    example = task(3, count=1)[0]
    losses = [lora.adapt(example, max_norm=0.5)]
    micro = lora.adapters["micro"]
    assert micro.config.rank == 2 and lora.active == {"micro": 1.0}
    for _ in range(5):
        before = micro.parameters.copy()
        losses.append(lora.adapt(example, lr=1e6, max_norm=0.5))
        assert np.linalg.norm(micro.parameters - before) <= 0.5001
    assert losses[1] < losses[0] and min(losses[2:]) < losses[1]
    assert lora.detach("micro") is micro
    with pytest.raises(ValueError, match="lr: expected a finite number above 0"):
        lora.adapt(example, lr=0.0)


def test_fisher_information_is_the_mean_squared_gradient() -> None:
    model, adapter, examples = small_model("f32", 1), LoraAdapter(SMALL, LORA, seed=2), task(2, count=3)
    expected = np.zeros(adapter.param_count)
    for example in examples:
        gradient = np.zeros_like(adapter.parameters)
        TrainingPass(model, adapter).gradients(make_batch([example]), gradient, 1.0)
        expected += gradient.astype(np.float64) ** 2 / 3
    np.testing.assert_allclose(fisher_information(model, adapter, examples), expected, rtol=1e-4, atol=1e-9)
    penalty = Consolidation(np.zeros(2, np.float32), np.array([1, 4], np.float32), 3.0)
    into = np.zeros(2, np.float32)
    penalty.add_gradient(np.array([1, 2], np.float32), into)
    assert into.tolist() == [3, 24] and penalty.loss(np.array([1, 2], np.float32)) == 25.5


def test_consolidation_keeps_what_was_learned() -> None:
    """A second task erases the first, and much less so with the penalty, which leaves room to learn."""
    first, second = task(4), task(5)
    config = TrainingConfig(steps=40, batch_size=4, lr=0.02)
    losses = {}
    for name in ("without", "with"):
        model, adapter = small_model("f32", 1), LoraAdapter(SMALL, LoraConfig(8, targets=("q", "v", "o", "down")))
        list(Trainer(model, adapter, first, config).run())
        learned = evaluate(model, adapter, first).loss
        penalty = consolidate(model, adapter, first, strength=300.0) if name == "with" else None
        untaught = evaluate(model, adapter, second).loss
        list(Trainer(model, adapter, second, config, penalty=penalty).run())
        losses[name] = evaluate(model, adapter, first).loss - learned, untaught - evaluate(model, adapter, second).loss
    forgotten, gained = zip(losses["without"], losses["with"], strict=True)
    assert forgotten[0] > 0.5, losses
    assert forgotten[1] < 0.5 * forgotten[0], losses
    assert gained[1] > 0.8 * gained[0], losses


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, "lr: expected a finite number above 0, found 0.0"),
        ({"epochs": -1}, "epochs"),
        ({"steps": 0}, "steps: expected an integer >= 1, found 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"schedule": "step"}, "schedule: expected one of cosine, linear, constant, found 'step'"),
        ({"optimizer": "adam"}, "optimizer: expected one of adamw, sgd"),
        ({"beta1": 1.0}, "beta1"),
        ({"warmup": float("nan")}, "warmup"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
    ],
)
def test_settings_out_of_range(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**values)


def test_what_cannot_be_learned_from() -> None:
    model, adapter = small_model("f32", 1), LoraAdapter(SMALL, LORA)
    with pytest.raises(ValueError, match="examples: expected at least one example, found none"):
        Trainer(model, adapter, [])
    with pytest.raises(ValueError, match="token ids from 0 to 210, found 5 to 211 in example 0"):
        Trainer(model, adapter, [Example(np.array([5, 211]), np.ones(2, bool))])
    with pytest.raises(ValueError, match="a token to predict after the first"):
        Example(np.array([1, 2]), np.array([True, False]))
    trainer = Trainer(model, adapter, task(0), TrainingConfig(steps=3))
    adapter.parameters[0] = np.nan
    before = trainer.done
    with pytest.raises(FloatingPointError, match="step 1: loss nan"):
        trainer.step()
    assert trainer.done == before


@pytest.mark.parametrize("killed_in", ["write_safetensors", "replacing"])
def test_a_save_that_is_killed_leaves_the_state_before(
    killed_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainingConfig(steps=4, batch_size=3, lr=0.01)
    run = Trainer(small_model("f32", 1), LoraAdapter(SMALL, LORA), task(1), config)
    run.step()
    save_training(run, tmp_path)
    kept = run.adapter.parameters.copy()
    run.step()

    def killed(*_: object) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(training_state, killed_in, killed)
        save_training(run, tmp_path)
    again = Trainer(small_model("f32", 1), LoraAdapter(SMALL, LORA), task(1), config)
    resume_training(again, tmp_path)
    assert again.done == 1
    np.testing.assert_array_equal(again.adapter.parameters, kept)
    save_training(run, tmp_path)
    assert [path.name for path in tmp_path.glob("trainer_state-*")] == ["trainer_state-2.safetensors"]


def test_a_run_on_other_weights_or_with_other_adapters_is_another_run(tmp_path: Path) -> None:
    config = TrainingConfig(steps=4, batch_size=3, lr=0.01)
    lora = MicroLora(small_model("f32", 1))
    run = lora.trainer(task(1), "a", LORA, config)
    run.step()
    save_training(run, tmp_path)
    with pytest.raises(ModelFormatError, match="weights was .'f32'. there, and is .'int8'. here"):
        resume_training(MicroLora(small_model("int8", 1)).trainer(task(1), "a", LORA, config), tmp_path)
    lora.attach(LoraAdapter(SMALL, LORA), "other")
    with pytest.raises(ModelFormatError, match="other adapters was None there"):
        resume_training(lora.trainer(task(1), "b", LORA, config), tmp_path)
    for other in ("other", "b"):
        lora.detach(other)
    run.m[0] = np.nan
    save_training(run, tmp_path)
    with pytest.raises(ModelFormatError, match="m holds NaN"):
        resume_training(lora.trainer(task(1), "a", LORA, config), tmp_path)


def test_a_weight_too_large_for_float32_is_refused() -> None:
    lora = MicroLora(small_model("f32", 1))
    lora.attach(LoraAdapter(SMALL, LORA), "a").parameters[:] = 1
    lora.refresh("a")
    with pytest.raises(ValueError, match="^weight of 'a': 1e\\+300 makes elements"):
        lora.use({"a": 1e300})
    assert lora.active == {"a": 1.0}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.3, 2.0])
def test_no_step_is_faster_than_asked_for(schedule: str, warmup: float) -> None:
    config = TrainingConfig(schedule=schedule, warmup=warmup, lr=1e-3)
    for total in (1, 4, 15, 100):
        rates = [config.learning_rate(step, total) for step in range(1, total + 1)]
        assert max(rates) <= 1e-3 and min(rates) >= 0


def test_a_fit_that_fails_leaves_nothing_behind() -> None:
    lora = MicroLora(small_model("int4", 1))
    wild = TrainingConfig(steps=3, batch_size=2, lr=1e38, warmup=0, max_grad_norm=0, optimizer="sgd")
    with pytest.raises(FloatingPointError, match="lower lr"):
        lora.fit(task(1), "hot", LORA, wild)
    with pytest.raises(ValueError, match="examples: expected at least one"):
        lora.fit([], "ghost", LORA)
    three = Consolidation(np.zeros(3, np.float32), np.ones(3, np.float32), 1.0)
    with pytest.raises(ValueError, match="penalty: expected [0-9]+ elements .the adapter.s., found 3"):
        lora.fit(task(1), "ewc", LORA, TrainingConfig(steps=1), three)
    assert lora.adapters == {} and lora.active == {}


def test_what_learns_acts_also_if_it_had_been_set_aside() -> None:
    lora = MicroLora(small_model("f32", 1))
    lora.adapt(task(1)[0])
    lora.use()
    lora.adapt(task(1)[0])
    assert lora.active == {"micro": 1.0}
    lora.use({"micro": 0.5})
    lora.fit(task(1), "micro", training=TrainingConfig(steps=1))
    assert lora.active == {"micro": 0.5}
