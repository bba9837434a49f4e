"""lab.drift and lab.quantisation_error, against float64; and what all functions say that take models."""

import inspect
from pathlib import Path

import numpy as np
import pytest

from ruvllm import lab
from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.model.reference import reference_logits, reference_states
from tests.lab.cases import IDS, loaded
from tests.model import tiny


def test_drift_is_the_same_on_both_paths() -> None:
    llm = loaded("llama2_mha", "int8")
    replayed = lab.drift(llm, IDS, progress=False)
    llm.model.fused = False
    assert lab.drift(llm, IDS, progress=False) == replayed


def test_drift_of_each_layer_against_float64() -> None:
    """The last state's error is that of the logits' own comparison; coarser weights are farther away."""
    found = {layout: lab.drift(loaded("llama2_mha", layout), IDS, progress=False) for layout in ("f32", "f16", "int8")}
    layers = loaded("llama2_mha").config.num_hidden_layers
    assert all(len(d.errors) == layers + 1 for d in found.values())
    assert found["f32"].errors[0] == 0 and found["f32"].errors[-1] < 1e-6 and found["f32"].agreement == 1
    assert found["f32"].errors[-1] < found["f16"].errors[-1] < found["int8"].errors[-1]
    with open_checkpoint(tiny.directory("llama2_mha")) as checkpoint:
        expected = reference_logits(checkpoint, IDS)
        states = list(reference_states(checkpoint, IDS))
    assert len(states) == layers + 2 and np.array_equal(states[-1], expected)
    llm = loaded("llama2_mha", "int8")
    got = llm.logits(IDS, llm.new_cache(len(IDS), "f32"))
    assert found["int8"].logits == pytest.approx(np.abs(got - expected).max(), rel=1e-6)
    ax = found["f32"].plot()
    assert found["int8"].plot(ax) is ax and len(ax.lines) == 2
    assert "layer 0" in str(found["int8"]) and "KL divergence" in found["int8"]._repr_html_()


def test_quantisation_error_of_each_tensor() -> None:
    path = tiny.directory("llama2_mha")
    found = lab.quantisation_error(path, ("f32", "f16", "int8", "int4"), progress=False)
    with open_checkpoint(path) as checkpoint:
        w = checkpoint.tensor("layers.0.q").float32().astype(np.float64)
    half = np.linalg.norm(w.astype(np.float16) - w) / np.linalg.norm(w)
    assert found.errors["f32"]["layers.0.q"] == 0
    assert found.errors["f16"]["layers.0.q"] == pytest.approx(half, rel=1e-3)
    assert all(found.errors["int8"][n] < found.errors["int4"][n] < 0.2 for n in found.dtypes)
    assert "layers.1.down" in str(found) and "int4" in found._repr_html_()
    assert len(found.plot().lines) == 4
    with pytest.raises(ValueError, match="layouts: expected some of"):
        lab.quantisation_error(path, ("int3",))


TAKE_MODELS = [name for name in lab.__all__ if "llm" in getattr(getattr(lab, name), "__annotations__", {})]


@pytest.mark.parametrize("name", TAKE_MODELS)
def test_a_path_in_place_of_a_loaded_model(name: str, tmp_path: Path) -> None:
    function = getattr(lab, name)
    others = [["a"]] * sum(x.default is x.empty for x in list(inspect.signature(function).parameters.values())[1:])
    for given in ("smollm2-135m", tmp_path / "model.gguf"):
        with pytest.raises(TypeError) as caught:
            function(given, *others)
        assert str(caught.value) == (
            f"llm: expected a loaded model, found {str(given)!r}: load it first: ruvllm.load(...)"
        )
    with pytest.raises(TypeError, match="expected a loaded model, as ruvllm.load returns, found Llama"):
        function(loaded("llama2_mha").model, *others)


def test_functions_that_take_models_are_found() -> None:
    assert set(TAKE_MODELS) == {"drift", "patch", "profile", "steering"}
