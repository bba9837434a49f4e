"""LLM.perplexity, of text and of ids, against logits and float64."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

import ruvllm
from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.llm import LLM
from ruvllm.model.reference import reference_logits
from tests import llm_cases as cases


def test_perplexity_of_text_and_of_ids(
    llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Of text, é is two bytes. <|end|> " * 4  # which says the name of a control token, and not the token
    result = llm.perplexity(text, context=32)
    ids = np.array(list(text.encode()))
    losses = []
    for start in range(0, len(ids) - 31, 32):
        rows = llm.logits(ids[start : start + 32]).astype(np.float64)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        losses += [-rows[j, ids[start + j + 1]] for j in range(16, 31)]
    assert result.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert (result.tokens, result.windows) == (len(losses), len(ids) // 32)
    assert result.bits_per_byte == pytest.approx(np.mean(losses) / math.log(2), rel=1e-5)  # a byte is a token
    monkeypatch.setattr("ruvllm.llm._SLOW_SECONDS", 0)
    capsys.readouterr()
    by_ids = llm.perplexity(ids, context=32, progress=True)
    assert "perplexity" in capsys.readouterr().err
    llm.perplexity(ids, context=32, progress=False)
    assert capsys.readouterr().err == ""
    assert by_ids == dataclasses.replace(result, bits_per_byte=None)


@pytest.mark.parametrize("named", [False, True])
def test_perplexity_begins_each_window_with_what_encoding_puts_before_a_text(named: bool, tmp_path: Path) -> None:
    """A directory of config.json, tokenizer.json and weights: only the post-processor says that texts begin so."""
    directory = cases.write_directory(tmp_path / "tiny")
    if not named:
        (directory / "tokenizer_config.json").unlink()
    engine = Tokenizer.from_file(str(directory / "tokenizer.json"))
    engine.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    engine.save(str(directory / "tokenizer.json"))
    llm = ruvllm.load(directory, weights="f32")
    text = "The quick brown fox jumps over the lazy dog. " * 3
    ids = np.array(engine.encode(text, add_special_tokens=False).ids)
    assert llm.tokenizer.encode(text) == [1, *ids] and llm.tokenizer.bos_id == 1
    losses = []
    with open_checkpoint(directory) as checkpoint:
        for start in range(0, len(ids) - 15, 16):
            window = np.concatenate([[1], ids[start + 1 : start + 16]])
            rows = reference_logits(checkpoint, window)
            rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
            losses += [-rows[j, window[j + 1]] for j in range(8, 15)]
    assert llm.perplexity(text, context=16).value == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)


def test_without_a_context_that_of_a_small_model_is_taken(llm: LLM, tmp_path: Path) -> None:
    """512 where the model takes as many; 256 are all that this one does."""
    ids = np.arange(600) % 200
    assert llm.perplexity(ids) == llm.perplexity(ids, context=256)
    assert llm.divergence(ids, llm).perplexity == llm.perplexity(ids, context=256)
    larger = cases.byte_llm(tmp_path, threads=1, config=dataclasses.replace(cases.CONFIG, max_position_embeddings=2048))
    assert larger.perplexity(ids).context == 512
    with pytest.raises(ValueError, match="context: expected 4 to 256, found 512"):
        llm.perplexity(ids, context=512)
