"""lab.steering, llm.steer and control vectors in GGUF files: against arrays by hand, float64, and the gguf package."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from ruvllm import lab
from ruvllm.checkpoint.control_vector import load_control_vector, save_control_vector
from ruvllm.errors import ModelFormatError
from ruvllm.llm import LLM
from tests.llm_cases import CONFIG
from tests.model import tiny_checkpoints, tiny_gguf
from tests.model.model_cases import load

DATA = Path(__file__).parents[1] / "data"

GOOD, BAD = ["I am glad", "What joy!", "Yes"], ["I am sad", "What woe!", "No"]
RNG = np.random.default_rng(0)


def last_states(llm: LLM, prompts: list[str]) -> np.ndarray:
    """The residual stream (n, L, E) after each layer at the last token, by TransformerLens' names."""
    found = []
    for prompt in prompts:
        with llm.trace(prompt) as t:
            t.keep("blocks.*.hook_resid_post")
        found.append([t[f"blocks.{i}.hook_resid_post"][-1] for i in range(2)])
    return np.array(found, np.float64)


def test_directions_are_differences_of_means(llm: LLM) -> None:
    found = lab.steering(llm, GOOD, BAD[:2], progress=False)
    good, bad = last_states(llm, GOOD), last_states(llm, BAD[:2])
    difference = good.mean(0) - bad.mean(0)
    np.testing.assert_allclose(found.directions, difference, atol=1e-6)
    np.testing.assert_array_equal(found[1], found.directions[1])
    sizes = np.linalg.norm(np.concatenate([good, bad]), axis=-1).mean(0)
    np.testing.assert_allclose(found.lengths, np.linalg.norm(difference, axis=-1) / sizes, rtol=1e-6)
    unit = difference[1] / np.linalg.norm(difference[1])
    one, other = good[:, 1] @ unit, bad[:, 1] @ unit
    apart = (one.mean() - other.mean()) / np.sqrt((one.var() + other.var()) / 2)
    assert found.separation[1] == pytest.approx(apart, rel=1e-6)
    assert list(found) == [0, 1] and len(found) == 2 and 2 not in found
    assert "layer 1" in str(found) and "<table>" in found._repr_html_()
    assert found.plot().get_xlabel() == "layer"


def test_principal_components_of_pairs(llm: LLM) -> None:
    found = lab.steering(llm, GOOD, BAD, method="pca", progress=False)
    differences = last_states(llm, GOOD) - last_states(llm, BAD)
    for layer in range(2):
        values, vectors = np.linalg.eigh(differences[:, layer].T @ differences[:, layer])
        first = vectors[:, -1]
        first = first * np.sign(first @ differences[:, layer].mean(0))
        assert values[-1] > 1.01 * values[-2]
        np.testing.assert_allclose(found[layer], first, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_steering_adds_after_each_layer(llm: LLM, fused: bool) -> None:
    directions = {layer: RNG.standard_normal(48).astype(np.float32) for layer in range(2)}
    ids = llm.tokenizer.encode("Hello there")
    llm.model.fused = fused
    plain = llm.logits(ids)
    with llm.trace(ids) as t:
        t.keep("layers.1.residual", "final.residual")
    with llm.steer(directions, 0.5, layers=[1]):
        last = llm.logits(ids)
    with llm.steer(directions, -2):
        with llm.trace(ids) as both:
            both.keep("layers.1.residual", "final.residual")
        everywhere = llm.logits(ids)
    llm.model.fused = True
    np.testing.assert_array_equal(last, llm.model.unembed(t["final.residual"] + np.float32(0.5) * directions[1]))
    np.testing.assert_array_equal(both["layers.1.residual"], t["layers.1.residual"] - 2 * directions[0])
    np.testing.assert_array_equal(everywhere, llm.model.unembed(both["final.residual"]))
    np.testing.assert_array_equal(llm.logits(ids), plain)
    assert np.abs(everywhere - plain).max() > 0.1


def test_a_mean_direction_leads_from_one_text_to_the_other(llm: LLM) -> None:
    found = lab.steering(llm, ["Ask Ann"], ["Ask Bob"], progress=False)
    with llm.steer(found, layers=[1]):
        there = llm.logits(llm.tokenizer.encode("Ask Bob"), last_only=True)
    np.testing.assert_allclose(there, llm.logits(llm.tokenizer.encode("Ask Ann"), last_only=True), atol=1e-4)


def test_files_are_those_of_the_gguf_package(llm: LLM, tmp_path: Path) -> None:
    found = lab.steering(llm, GOOD, BAD, progress=False)
    reader = gguf.GGUFReader(found.save(tmp_path / "joy.gguf"))
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "llama"
    assert reader.fields["controlvector.layer_count"].contents() == 1
    (tensor,) = reader.tensors
    assert tensor.name == "direction.1" and tensor.tensor_type == gguf.GGMLQuantizationType.F32
    np.testing.assert_array_equal(tensor.data, found[1])
    loaded = lab.Steering.load(tmp_path / "joy.gguf", llm)
    assert list(loaded) == [1]
    np.testing.assert_array_equal(loaded[1], found[1])
    ids = llm.tokenizer.encode("Hello")
    with llm.steer(tmp_path / "joy.gguf", 3):
        steered = llm.logits(ids)
    with llm.steer(found, 3, layers=[1]):
        np.testing.assert_array_equal(llm.logits(ids), steered)

    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_int32("controlvector.layer_count", 1)
    writer.add_tensor("direction.1", found[1])
    tiny_gguf.finish(writer)
    read = load_control_vector(tmp_path / "theirs.gguf", CONFIG)
    assert list(read) == [1]
    np.testing.assert_array_equal(read[1], found[1])


def written(path: Path, architecture: str = "controlvector", **tensors: np.ndarray) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for name, array in tensors.items():
        writer.add_tensor(name.replace("_", "."), array)
    tiny_gguf.finish(writer)
    return path


@pytest.mark.parametrize(
    ("architecture", "tensors", "message"),
    [
        ("llama", {"direction_1": 48}, "general.architecture: found llama, expected controlvector"),
        ("controlvector", {"direction_1": 47}, r"tensor 'direction.1' shape: found \(47,\), expected \(48,\)"),
        ("controlvector", {"direction_2": 48}, "found direction.2, expected direction.1 to .1"),
        ("controlvector", {"direction_0": 48}, "found direction.0, expected direction.1 to .1"),
        ("controlvector", {"blk_1": 48}, "found blk.1, expected direction.1 to .1"),
        ("controlvector", {}, "tensors: found none"),
    ],
)
def test_other_files_are_refused(
    architecture: str, tensors: dict[str, int], message: str, llm: LLM, tmp_path: Path
) -> None:
    path = written(tmp_path / "x.gguf", architecture, **{n: np.ones(size, np.float32) for n, size in tensors.items()})
    with pytest.raises(ModelFormatError, match=message), llm.steer(path):
        raise AssertionError("unreachable")


def test_wrong_arguments(llm: LLM, tmp_path: Path) -> None:
    path = written(tmp_path / "nan.gguf", direction_1=np.full(48, np.nan, np.float32))
    with pytest.raises(ModelFormatError, match="numbers that are not finite"), llm.steer(path):
        raise AssertionError("unreachable")
    with pytest.raises(ValueError, match="layers: expected some of 1, which have a direction, found 0"):
        with llm.steer({1: np.ones(48)}, layers=[0]):
            raise AssertionError("unreachable")
    with pytest.raises(ValueError, match="layers: expected some of 7, which have a direction, found 7"):
        with llm.steer({7: np.ones(48)}):
            raise AssertionError("unreachable")
    with pytest.raises(ValueError, match="direction of layer 1: expected 48 finite numbers"):
        with llm.steer({1: np.ones(47)}):
            raise AssertionError("unreachable")
    with pytest.raises(ValueError, match="layers: expected at least one"), llm.steer({}):
        raise AssertionError("unreachable")
    with pytest.raises(ValueError, match="method: expected one of mean, pca"):
        lab.steering(llm, GOOD, BAD, method="svd")
    with pytest.raises(ValueError, match="pca: expected two pairs or more, found 3 positives, 2 negatives"):
        lab.steering(llm, GOOD, BAD[:2], method="pca")
    for method in ("mean", "pca"):
        with pytest.raises(ValueError, match="positives and negatives do not differ"):
            lab.steering(llm, GOOD, GOOD, method=method, progress=False)
    with pytest.raises(TypeError, match="positives: expected several prompts, found one text"):
        lab.steering(llm, "I am glad", BAD)
    with pytest.raises(ValueError, match="negatives: expected at least one prompt"):
        lab.steering(llm, GOOD, [])
    with pytest.raises(ValueError, match="directions: expected some of layers 1 and above, found layers"):
        save_control_vector(tmp_path / "none.gguf", {0: np.ones(48)}, CONFIG)




def test_llama_cpp_steers_the_same(tmp_path: Path) -> None:
    """Logits that llama.cpp computed with a control vector: tests/data/make_control_vector.py."""
    with np.load(DATA / "control_vector.npz") as file:
        golden = dict(file)
    model = load(tiny_gguf.write_gguf(tmp_path / "model.gguf", tiny_checkpoints.read("llama3")), "f32", threads=1)
    llm = LLM(model, None, tmp_path)
    layers = range(int(golden["first"]), int(golden["last"]) + 1)
    assert len(golden["directions"]) == len(layers) == model.config.num_hidden_layers - 1 > 1
    path = save_control_vector(
        tmp_path / "vector.gguf", dict(zip(layers, golden["directions"], strict=True)), model.config
    )
    plain = llm.logits(golden["ids"])
    with llm.steer(path):
        np.testing.assert_allclose(llm.logits(golden["ids"]), golden["logits"], atol=1e-4)
    assert np.abs(plain - golden["logits"]).max() > 0.1
