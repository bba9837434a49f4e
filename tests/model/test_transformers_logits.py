"""Every architecture against the logits of transformers, from each form that its files have."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import ruvllm
from ruvllm.checkpoint.hf_config import config_from_directory
from ruvllm.errors import ModelFormatError
from ruvllm.llm import LLM
from ruvllm.model.generate import generate
from ruvllm.model.sampling.options import Sampling
from ruvllm.quantizing import quantize
from tests.model import tiny_checkpoints, tiny_gguf
from tests.model.model_cases import logits, run

WITHOUT = {"olmoe_clipped"}  # refused by name
RUNNING = tuple(variant for variant in tiny_checkpoints.VARIANTS if variant not in WITHOUT)
# What a GGUF file of the family cannot say, as read from the directory, and the field that an error names.
UNSAID = {
    "gemma2_scaled": "attention_scale", "gemma3_layers": "attention_scale", "gemma3_nested": "attention_scale",
    "gpt_oss": "swiglu_limit", "llama_dynamic": "model", "llama_yarn_factor": "model", "llama_yarn_mscale": "model",
    "ministral": "layer_types", "qwen2_moe_mixed": "experts", "qwen2_window": "layer_types",
    "qwen3_moe_mixed": "experts", "qwen3_window": "layer_types", "smollm3_layers": "no_rope_layers",
}  # fmt: skip
# A GGUF file of the converter's conventions, and one that ``quantize`` wrote.
FILES = [(variant, "gguf") for variant in RUNNING if variant in tiny_gguf.VARIANTS]
FILES += [(variant, "written") for variant in RUNNING if variant not in UNSAID]


def load(variant: str, form: str, directory: Path) -> LLM:
    """The model of a variant, as a directory ("hub") or from one of FILES, with float32 weights."""
    checkpoint = tiny_checkpoints.read(variant)
    if form == "gguf":
        path = tiny_gguf.write_gguf(directory / "model.gguf", checkpoint)
    else:
        path = tiny_checkpoints.write_checkpoint(directory, checkpoint)
    if form == "written":
        path = quantize(path, directory / "written.gguf", "f32")
    return ruvllm.load(path, weights="f32", threads=1)


@pytest.mark.parametrize("variant", RUNNING)
def test_directories(variant: str, tmp_path: Path) -> None:
    """Beyond the window and the original context: all at once, token by token, with other numbers of threads.

    Each token of a greedy answer is the most likely one after the text before it, in one pass over that text.
    """
    expected = tiny_checkpoints.read(variant)
    model = load(variant, "hub", tmp_path).model
    together = logits(model, expected.ids)
    assert np.abs(together - expected.logits).max() <= 2e-4
    for parts in ([1] * len(expected.ids), [7, 1, 1, 20, len(expected.ids) - 29]):
        again = run(model, model.new_cache(len(expected.ids)), expected.ids, parts)
        np.testing.assert_array_equal(again, together)
    model.threads = 2
    np.testing.assert_array_equal(logits(model, expected.ids), together)
    prompt = expected.ids[:20]
    answer = [token.id for token in generate(model, model.new_cache(40), prompt, Sampling(), max_tokens=20)]
    best = model.forward(np.array([*prompt, *answer[:-1]]), model.new_cache(40)).argmax(-1)
    np.testing.assert_array_equal(best[len(prompt) - 1 :], answer)
    model.threads, model.fused = 1, False
    np.testing.assert_array_equal(logits(model, expected.ids), together)


@pytest.mark.parametrize(("variant", "form"), FILES)
def test_files(variant: str, form: str, tmp_path: Path) -> None:
    expected = tiny_checkpoints.read(variant)
    assert np.abs(logits(load(variant, form, tmp_path).model, expected.ids) - expected.logits).max() <= 2e-4


@pytest.mark.parametrize("variant", RUNNING)
def test_config_json_as_transformers_5_writes_it_means_the_same(variant: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoints.read(variant)
    old, new = (
        config_from_directory(tiny_checkpoints.write_checkpoint(tmp_path / "model", checkpoint, new=form))
        for form in (False, True)
    )
    windows = [[config.window(i) for i in range(config.num_hidden_layers)] for config in (old, new)]
    assert windows[0] == windows[1]
    plain = [dataclasses.replace(config, sliding_window=None, layer_types=()) for config in (old, new)]
    assert plain[0] == plain[1]


@pytest.mark.parametrize("variant", UNSAID)
def test_what_a_gguf_file_cannot_say_is_refused(variant: str, tmp_path: Path) -> None:
    directory = tiny_checkpoints.write_checkpoint(tmp_path / "model", tiny_checkpoints.read(variant))
    with pytest.raises(ModelFormatError, match=f": {UNSAID[variant]}: found "):
        quantize(directory, tmp_path / "written.gguf", "f32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("variant", ["gemma3", "olmo3"])
def test_a_scaling_of_windowed_layers_is_refused(variant: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoints.read(variant)
    rope = {**checkpoint.new_config["rope_parameters"], "sliding_attention": {"rope_type": "linear", "factor": 2.0}}
    scaled = dataclasses.replace(checkpoint, new_config={**checkpoint.new_config, "rope_parameters": rope})
    directory = tiny_checkpoints.write_checkpoint(tmp_path / "model", scaled, new=True)
    with pytest.raises(ModelFormatError, match="rope of layer 0: found base .*, scaling linear, factor 2"):
        quantize(directory, tmp_path / "written.gguf", "f32")
