"""`ruvllm.load`: files and directories, kinds of weights, tokenizers; and the logits of what was loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ruvllm
from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.errors import ContextFullError, ModelFormatError
from ruvllm.llm import LLM
from ruvllm.model.reference import reference_logits
from tests import llm_cases as cases
from tests.llm_cases import USER
from tests.model import tiny


def test_a_file_and_a_directory_of_the_same_weights_say_the_same(tmp_path: Path) -> None:
    ids, expected = tiny.golden("llama2_mha")
    from_file = ruvllm.load(tiny.write_gguf("llama2_mha", tmp_path / "tiny.gguf"), progress=False)
    from_directory = ruvllm.load(cases.write_directory(tmp_path / "tiny"), mmap=False)
    for llm in (from_file, from_directory):
        assert np.abs(llm.logits(ids) - expected).max() <= 2e-4
        assert llm.config.vocab_size == 97 and llm.config.num_hidden_layers == 2
    assert from_file.path == tmp_path / "tiny.gguf" and "tiny.gguf" in repr(from_file)
    for text in ("abc", "The 1st (of 2)!", "x  y"):
        assert from_file.tokenizer.encode(text) == from_directory.tokenizer.encode(text)
        assert from_file.tokenizer.decode(from_file.tokenizer.encode(text, add_special=False)) == text
    answers = [llm.generate("Hello there", max_tokens=20) for llm in (from_file, from_directory)]
    assert answers[0].ids == answers[1].ids
    assert answers[0].text == answers[1].text != ""


def test_a_continuation_keeps_the_space_that_begins_it_and_an_answer_does_not(tmp_path: Path, saying: Any) -> None:
    llm = ruvllm.load(tiny.write_gguf("llama2_mha", tmp_path / "tiny.gguf"))
    saying(llm.tokenizer.encode(" a", add_special=False)[1:])
    assert llm.generate("Once").text == " a"
    llm.tokenizer.chat_template = "{{ messages[0].content }}"
    assert llm.chat(USER).text == "a"


def test_how_weights_are_kept(tmp_path: Path) -> None:
    path = tiny.write_gguf("llama2_mha", tmp_path / "tiny.gguf", "F16")
    ids, _ = tiny.golden("llama2_mha")
    with open_checkpoint(path) as checkpoint:
        expected = reference_logits(checkpoint, ids)
    for weights, layout, tolerance in (("auto", "f16", 1e-9), ("f32", "f32", 1e-9), ("int8", "int8", 1e-2)):
        llm = ruvllm.load(path, weights=weights, threads=1)
        assert {linear.layout for linear in llm.model.linears().values()} == {layout}
        got = llm.logits(ids, llm.new_cache(len(ids), "f32"))
        assert np.square(got - expected).sum() <= tolerance * np.square(expected).sum()
        assert llm.model.threads == 1


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    path = tiny.write_gguf("llama2_mha", tmp_path / "tiny.gguf")
    with pytest.raises(ValueError, match="^weights: expected one of auto, f32, .*, found 'int3'$"):
        ruvllm.load(path, weights="int3")
    with pytest.raises(ValueError, match="^threads: expected a positive integer, found 0$"):
        ruvllm.load(path, threads=0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ruvllm.load(tmp_path / "nowhere.gguf")
    with pytest.raises(FileNotFoundError, match="smollm3"):
        ruvllm.load("smollm3")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelFormatError, match=r"tiny\.gguf"):
        ruvllm.load(path)


def test_one_rank_says_what_it_ignores(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tiny.write_gguf("llama2_mha", tmp_path / "tiny.gguf")
    given: list[tuple[dict[str, Any], str]] = [
        ({"shares": [3, 1]}, "shares"), ({"wire": "f16"}, "wire"), ({"shares": "auto", "wire": "f32"}, "shares, wire"),
    ]  # fmt: skip
    for options, said in given:
        caplog.clear()
        ruvllm.load(path, **options)
        assert caplog.messages == [f"{said}: ignored, as the model is not divided over ranks here"]
    caplog.clear()
    ruvllm.load(path)
    assert not caplog.messages
    with pytest.raises(TypeError, match="^comm: expected a communicator of mpi4py, such as MPI.COMM_WORLD, found 'x'$"):
        ruvllm.load(path, comm="x")
    with pytest.raises(ValueError, match="^wire: expected one of auto, exact, f32, f16, found 'f8'$"):
        ruvllm.load(path, wire="f8")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    """More tokens than the embedding has rows; fewer are usual, and the ids that are left have no text."""
    directory = cases.write_directory(tmp_path / "tiny")
    cases.write_byte_tokenizer(directory)
    expected = "tiny: tokenizer: found 260 tokens, expected at most 97, the rows of the embedding$"
    with pytest.raises(ModelFormatError, match=expected):
        ruvllm.load(directory)


def test_ids_beyond_the_tokenizer_have_no_text(tmp_path: Path) -> None:
    tokenizer = ruvllm.checkpoint.tokenizer.load_tokenizer(cases.write_byte_tokenizer(tmp_path), vocab_size=300)
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode([104, 299, 105]) == "hi"
    stream = tokenizer.stream_decoder()
    assert [stream.push(i) for i in (104, 260, 105)] == ["h", "", "i"]


def test_logits_and_the_cache_that_grows_with_them(llm: LLM) -> None:
    ids = llm.tokenizer.encode("a few bytes")
    every = llm.logits(ids)
    assert every.shape == (len(ids), cases.VOCABULARY) and every.dtype == np.float32
    last = llm.logits(ids, last_only=True)
    assert last.shape == (cases.VOCABULARY,)
    np.testing.assert_array_equal(last, every[-1])
    cache = llm.new_cache(max_tokens=20)
    parts = [llm.logits(ids[:4], cache), llm.logits(np.array(ids[4:5]), cache), llm.logits(ids[5:], cache)]
    assert len(cache) == len(ids) and cache.ids[: len(cache)].tolist() == ids
    assert np.abs(np.concatenate(parts) - every).max() <= 1e-5
    assert llm.new_cache().max_tokens == cases.CONFIG.max_position_embeddings


def test_a_full_context_is_refused_and_leaves_the_cache_usable(llm: LLM) -> None:
    cache = llm.new_cache(8)
    llm.logits([1, 2, 3], cache)
    with pytest.raises(ContextFullError, match="^context full: 6 more tokens do not fit, 3 of 8 are taken$"):
        llm.logits(range(6), cache)
    with pytest.raises(ContextFullError, match="^context full: 6 more tokens do not fit, 3 of 8 are taken$"):
        llm.stream([1, 2, 3, *range(6)], cache=cache)
    assert len(cache) == 3
    rest = llm.logits([4, 5], cache)
    assert np.abs(rest - llm.logits([1, 2, 3, 4, 5])[3:]).max() <= 1e-5
    with pytest.raises(ContextFullError, match="^context full: the prompt has 257 tokens, the model takes 256$"):
        llm.generate("x" * 257)
    llm.logits([6, 7, 8], cache)
    # An answer that reaches the end of its cache is an answer.
    answer = llm.generate([1, 2, 3], cache=cache, max_tokens=100)
    assert answer.finish_reason == "length" and len(answer.ids) == 8 - 3 + 1
