"""Named arrays of every architecture: the same on both paths, close to float64, and what edits make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.model import Llama
from ruvllm.model.edits import Edit
from ruvllm.model.hooks import Editing
from ruvllm.model.layer import Decoder, TransformerLayer
from ruvllm.model.names import matching
from ruvllm.model.reference import Float64, reference_states
from ruvllm.tracing.trace import Trace
from tests.model import tiny_checkpoints
from tests.model.model_cases import SMALL, load, logits, small_model
from tests.model.test_transformers_logits import RUNNING


def traced(model: Llama, ids: np.ndarray, *globs: str, kv: str = "f32") -> Trace:
    """A trace of ids without text."""
    trace = Trace(model, None, ids, lambda tokens: model.new_cache(tokens, kv))
    trace.keep(*globs)
    trace.run()
    return trace


def reference_with(hooks: Mapping[str, Callable[[Any], None]]) -> type[Float64]:
    class Hooked(Float64):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.hooks = hooks

    return Hooked


def by_token(rows: np.ndarray, scores: np.ndarray, model: Llama) -> np.ndarray:
    """Rows that are sorted by expert, and by token within: those of each token, its best expert first."""
    assert model.config.experts is not None
    chosen = np.argsort(-scores, axis=-1, kind="stable")[:, : model.config.experts.per_token]
    order = [(expert, token) for token in range(len(scores)) for expert in chosen[token].tolist()]
    return rows[[sorted(order).index(choice) for choice in order]]


@pytest.mark.parametrize("variant", RUNNING)
def test_arrays_of_an_architecture(variant: str, tmp_path: Path) -> None:
    """A trace of everything leaves the logits as they are; each array is float64's, and the same on both paths."""
    ids = tiny_checkpoints.read(variant).ids
    path = tiny_checkpoints.write_checkpoint(tmp_path, tiny_checkpoints.read(variant))
    model = load(path, "f32", threads=1)
    found: dict[str, np.ndarray] = {}
    hooks = {name: (lambda x, name=name: found.update({name: x.copy()})) for name in model.points}
    with open_checkpoint(path) as checkpoint:
        reference_states(checkpoint, ids, ops_type=reference_with(hooks))
    plain = logits(model, ids)
    replayed = traced(model, ids)
    np.testing.assert_array_equal(replayed["logits"], plain)
    np.testing.assert_array_equal(logits(model, ids), plain)
    model.fused = False
    eager = traced(model, ids)
    seen = [name for name, point in model.points.items() if not point.derived]
    assert set(found) == set(seen)
    for name in seen:
        np.testing.assert_array_equal(eager[name], replayed[name], err_msg=name)
        router = model.points[name].router
        expected = by_token(found[name], found[router], model) if router else found[name]
        expected = expected.reshape(len(ids), *model.points[name].axes)
        error = np.abs(eager[name] - expected).max() / max(1, np.abs(expected).max())
        assert error <= 1e-4, f"{name}: {error}"
    for layer in range(model.config.num_hidden_layers):
        at = f"layers.{layer}.attention."
        pattern, values = eager[at + "pattern"], found[at + "v"].reshape(len(ids), -1, model.config.head_dim)
        group = model.config.num_attention_heads // model.config.num_key_value_heads
        read = np.einsum("hts,shd->thd", pattern, np.repeat(values, group, axis=1))
        np.testing.assert_allclose(read, eager[at + "heads"], atol=1e-4)


@pytest.mark.parametrize("variant", RUNNING)
def test_a_trace_leaves_the_logits_of_rounded_weights(variant: str, tmp_path: Path) -> None:
    ids = tiny_checkpoints.read(variant).ids
    model = load(tiny_checkpoints.write_checkpoint(tmp_path, tiny_checkpoints.read(variant)), "int8", threads=2)
    plain = logits(model, ids, "int8")
    np.testing.assert_array_equal(traced(model, ids, kv="int8")["logits"], plain)


@pytest.mark.parametrize("variant", ["llama3", "gemma2", "qwen3", "mixtral_window", "granite"])
def test_edits_are_those_of_the_reference(variant: str, tmp_path: Path) -> None:
    ids = tiny_checkpoints.read(variant).ids
    path = tiny_checkpoints.write_checkpoint(tmp_path, tiny_checkpoints.read(variant))
    model = load(path, "f32", threads=1)
    plain = logits(model, ids)
    middle = np.linspace(-1, 1, model.config.hidden_size).astype(np.float32)

    def add(x: Any) -> None:
        x += middle

    def silence(x: Any) -> None:
        x.reshape(len(ids), -1, model.config.head_dim)[:, 1] = 0

    def replace(x: Any) -> None:
        x[[2, 5]] = middle

    hooks = {"layers.1.residual": add, "layers.0.attention.heads": silence, "layers.0.mlp.out": replace}
    with open_checkpoint(path) as checkpoint:
        expected = reference_states(checkpoint, ids, ops_type=reference_with(hooks))[-1]
    edits = [
        Edit(model.points, "layers.1.residual", lambda x: x + middle), Edit(model.points, "layers.0.heads.1", scale=0),
        Edit(model.points, "layers.0.mlp.out", middle, positions=[2, 5, 1000]),
    ]  # fmt: skip
    for model.fused in (True, False):
        with Editing(model, edits):
            edited = logits(model, ids)
            together = traced(model, ids, "logits")["logits"]
        assert np.abs(edited - expected).max() <= 2e-4
        assert np.abs(edited - plain).max() > 0.1
        np.testing.assert_array_equal(together, edited)
        np.testing.assert_array_equal(logits(model, ids), plain)


def test_other_names_and_globs() -> None:
    points = small_model("f32", 1).points
    for alias, name in {
        "blocks.1.hook_resid_pre": "layers.1.residual", "blocks.0.hook_resid_post": "layers.1.residual",
        "blocks.1.hook_resid_post": "final.residual", "blocks.0.hook_resid_mid": "layers.0.residual_mid",
        "blocks.1.attn.hook_z": "layers.1.attention.heads", "blocks.1.attn.hook_pattern": "layers.1.attention.pattern",
        "blocks.0.hook_mlp_out": "layers.0.mlp.out", "layers.0.heads": "layers.0.attention.heads",
        "hook_embed": "embed",
    }.items():  # fmt: skip
        assert matching(points, alias) == [name]
    assert matching(points, "layers.*.residual") == ["layers.0.residual", "layers.1.residual"]
    assert matching(points, "blocks.*.attn.hook_q") == ["layers.0.attention.q", "layers.1.attention.q"]
    with pytest.raises(KeyError, match="'layers.0.residul': no array has this name; nearest: layers.0.residual"):
        matching(points, "layers.0.residul")


def test_layer_code_names_its_own_arrays() -> None:
    class Layer(TransformerLayer):
        def __call__(self, ops: Any, x: Any) -> Any:
            return super().__call__(ops, ops.name(ops.scale(x, 2), self.at + "doubled"))

    class Doubled(Decoder):
        layer_type = Layer

    model = Llama(SMALL, layout="f32", threads=1, seed=7, architecture=Doubled)
    ids = np.array([3, 1, 4])
    trace = traced(model, ids, "layers.1.*")
    np.testing.assert_array_equal(trace["layers.1.doubled"], trace["layers.1.residual"])
    assert model.points["layers.1.doubled"].shape == "(T, 75)"

    class Twice(TransformerLayer):
        def __call__(self, ops: Any, x: Any) -> Any:
            return super().__call__(ops, ops.name(x, self.at + "residual"))

    wrong = type("Wrong", (Decoder,), {"layer_type": Twice})
    with pytest.raises(ValueError, match="gives 'layers.0.residual' to two arrays"):
        _ = Llama(SMALL, layout="f32", threads=1, architecture=wrong).points


@pytest.mark.parametrize("layout", ["f32", "int4"])
def test_experts_can_be_edited(layout: str, tmp_path: Path) -> None:
    """A token without its second expert: the same as with that expert's output subtracted from all that is added."""
    ids = tiny_checkpoints.read("mixtral").ids[:10]
    model = load(tiny_checkpoints.write_checkpoint(tmp_path, tiny_checkpoints.read("mixtral")), layout, threads=2)
    plain = traced(model, ids)
    scores = np.sort(plain["layers.0.mlp.router"], axis=-1)[:, ::-1][:, :2]
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    outputs = plain["layers.0.mlp.experts.out"]
    np.testing.assert_allclose(np.einsum("tk,tke->te", weights, outputs), plain["layers.0.mlp.out"], atol=1e-5)

    def without(x: np.ndarray) -> None:
        x[:, 1] = 0

    found = []
    for model.fused in (True, False):
        with Editing(model, [Edit(model.points, "layers.0.mlp.experts.out", without, positions=[4, 7])]):
            found.append(traced(model, ids))
    expected = plain["layers.0.mlp.out"].copy()
    expected[[4, 7]] -= weights[[4, 7], 1:] * outputs[[4, 7], 1]
    np.testing.assert_allclose(found[0]["layers.0.mlp.out"], expected, atol=1e-5)
    for name in found[0].names:
        np.testing.assert_array_equal(found[0][name], found[1][name], err_msg=name)
