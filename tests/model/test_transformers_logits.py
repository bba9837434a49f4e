"""Every architecture against the logits of transformers, from each form that its files have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ruvllm
from ruvllm.errors import ModelFormatError
from ruvllm.llm import LLM
from ruvllm.model.generate import Sampling, generate
from ruvllm.quantizing import quantize
from tests.model import tiny_checkpoints, tiny_gguf
from tests.model.model_cases import logits, run

WITHOUT = {"olmoe_clipped"}  # refused by name
RUNNING = tuple(variant for variant in tiny_checkpoints.VARIANTS if variant not in WITHOUT)
# What a GGUF file of the family cannot say, as read from the directory, and the field that an error names.
UNSAID = {
    "gemma2_scaled": "attention_scale", "gemma3_layers": "attention_scale", "gpt_oss": "swiglu_limit",
    "llama_dynamic": "model", "llama_yarn_factor": "model", "llama_yarn_mscale": "model", "ministral": "layer_types",
    "qwen2_moe_mixed": "experts", "qwen2_window": "layer_types", "qwen3_moe_mixed": "experts",
    "qwen3_window": "layer_types", "smollm3_layers": "no_rope_layers",
}  # fmt: skip
# A directory whose config.json is as the Hub's files have it, one as transformers 5 writes it, a GGUF file of the
# converter's conventions, and one that ``quantize`` wrote.
CASES = [(variant, form) for variant in RUNNING for form in ("hub", "new")]
CASES += [(variant, "gguf") for variant in RUNNING if variant in tiny_gguf.VARIANTS]
CASES += [(variant, "written") for variant in RUNNING if variant not in UNSAID]


def load(variant: str, form: str, directory: Path, threads: int = 1) -> LLM:
    """The model of a variant in one of its forms, with float32 weights."""
    checkpoint = tiny_checkpoints.read(variant)
    if form == "gguf":
        path = tiny_gguf.write_gguf(directory / "model.gguf", checkpoint)
    else:
        path = tiny_checkpoints.write_checkpoint(directory, checkpoint, new=form == "new")
    if form == "written":
        path = quantize(path, directory / "written.gguf", "f32")
    return ruvllm.load(path, weights="f32", threads=threads)


@pytest.mark.parametrize(("variant", "form"), CASES)
def test_logits(variant: str, form: str, tmp_path: Path) -> None:
    """Beyond the window and the original context: all at once, token by token, with other numbers of threads."""
    expected = tiny_checkpoints.read(variant)
    model = load(variant, form, tmp_path).model
    together = logits(model, expected.ids)
    assert np.abs(together - expected.logits).max() <= 2e-4
    for parts in ([1] * len(expected.ids), [7, 1, 1, 20, len(expected.ids) - 29]):
        again = run(model, model.new_cache(len(expected.ids)), expected.ids, parts)
        np.testing.assert_array_equal(again, together)
    model.threads = 2
    np.testing.assert_array_equal(logits(model, expected.ids), together)
    model.threads, model.fused = 1, False
    np.testing.assert_array_equal(logits(model, expected.ids), together)


@pytest.mark.parametrize(("variant", "form"), CASES)
def test_greedy_text(variant: str, form: str, tmp_path: Path) -> None:
    """Each token of a greedy answer is the most likely one after the text before it, in one pass over that text."""
    prompt = tiny_checkpoints.read(variant).ids[:20]
    model = load(variant, form, tmp_path, threads=2).model
    answer = [token.id for token in generate(model, model.new_cache(40), prompt, Sampling(), max_tokens=20)]
    best = model.forward(np.array([*prompt, *answer[:-1]]), model.new_cache(40)).argmax(-1)
    np.testing.assert_array_equal(best[len(prompt) - 1 :], answer)


@pytest.mark.parametrize("variant", UNSAID)
def test_what_a_gguf_file_cannot_say_is_refused(variant: str, tmp_path: Path) -> None:
    directory = tiny_checkpoints.write_checkpoint(tmp_path / "model", tiny_checkpoints.read(variant))
    with pytest.raises(ModelFormatError, match=f": {UNSAID[variant]}: found "):
        quantize(directory, tmp_path / "written.gguf", "f32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
