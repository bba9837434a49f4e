"""Models that transformers or llama.cpp load although something about them is odd: they load, and say what is odd."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

import ruvllm
from ruvllm.checkpoint.chat import encode_chat
from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.checkpoint.tokenizer import load_tokenizer
from ruvllm.cli import main
from ruvllm.errors import ModelFormatError
from ruvllm.quantizing import quantize
from tests import llm_cases
from tests.checkpoint.checks import close_to_golden
from tests.checkpoint.hostile_models import rewrite_gguf
from tests.model import tiny

VOCABULARY = 97  # of the case


def _edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}))


def _add_tokens(model: Path, *tokens: AddedToken) -> None:
    engine = Tokenizer.from_file(str(model / "tokenizer.json"))
    for token in tokens:
        (engine.add_special_tokens if token.special else engine.add_tokens)([token])
    engine.save(str(model / "tokenizer.json"))


# --- tokens that the embedding has no rows for ------------------------------------------------------------------------


@pytest.mark.parametrize("special", [True, False])
def test_a_pad_that_was_added_without_resizing_is_left_out(special: bool, tmp_path: Path, caplog: Any) -> None:
    model = llm_cases.write_directory(tmp_path / "model")
    before = load_tokenizer(model, VOCABULARY)
    _add_tokens(model, AddedToken("<pad>", special=special, normalized=False), AddedToken("<|x|>", special=special))
    _edit_json(model / "tokenizer_config.json", pad_token="<pad>")
    with open_checkpoint(model) as checkpoint:
        tokenizer = load_tokenizer(checkpoint.tokenizer_source, checkpoint.config.vocab_size)
    assert [r.getMessage().partition(": ")[2] for r in caplog.records] == [
        "no row of the embedding for <pad>, <|x|>: left out"
    ]
    assert tokenizer.vocab_size == VOCABULARY
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.special_ids) == (1, before.eos_ids, before.special_ids)
    for text in ("a <pad> b", "<|x|>", "<s>a</s>", "the 1st"):
        for parse in (True, False):
            ids = tokenizer.encode(text, parse_special=parse)
            assert ids == before.encode(text, parse_special=parse) and max(ids) < VOCABULARY


def test_an_end_token_without_a_row_is_left_out_where_another_ends_the_text(tmp_path: Path) -> None:
    model = llm_cases.write_directory(tmp_path / "model")
    _add_tokens(model, AddedToken("<|im_end|>", special=True))
    (model / "generation_config.json").unlink()
    _edit_json(model / "config.json", eos_token_id=2)
    _edit_json(model / "tokenizer_config.json", eos_token="<|im_end|>")
    assert load_tokenizer(model, VOCABULARY).eos_ids == (2,)
    _edit_json(model / "config.json", eos_token_id=None)
    assert load_tokenizer(model, VOCABULARY).eos_ids == (2,)  # "</s>", known by its spelling


def test_pieces_of_text_without_a_row_are_another_model_s(tmp_path: Path) -> None:
    model = llm_cases.write_directory(tmp_path / "model")
    with pytest.raises(ModelFormatError, match="tokenizer: found 97 tokens, expected at most 96"):
        load_tokenizer(model, VOCABULARY - 1)


@pytest.mark.parametrize("name", ["padding", "unknown"])
@pytest.mark.parametrize("found", [VOCABULARY, -1])
def test_a_padding_or_unknown_id_out_of_range_is_a_warning(name: str, found: int, tmp_path: Path, caplog: Any) -> None:
    """llama.cpp: "bad special token", and the default in its place."""
    key = f"tokenizer.ggml.{name}_token_id"
    path = rewrite_gguf(tmp_path, {key: found}, None)
    with open_checkpoint(path) as checkpoint:
        close_to_golden(checkpoint, "llama2_mha")
        tokenizer = load_tokenizer(checkpoint.tokenizer_source, VOCABULARY)
    assert f"{key} is {found}, which is no token" in caplog.text
    assert "pad_token" not in tokenizer.special_tokens
    with open_checkpoint(rewrite_gguf(tmp_path, {key: None}, None)) as checkpoint:
        assert tokenizer.encode("the 1st é") == load_tokenizer(checkpoint.tokenizer_source).encode("the 1st é")


# --- chat templates that have names -----------------------------------------------------------------------------------

TOOLS = "{% for m in messages %}[TOOL]{{ m.content }}{% endfor %}"
RAG = "{% for m in messages %}[RAG]{{ m.content }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "hi"}]


def _named(tmp_path: Path, form: str, **templates: str) -> Any:
    """A tokenizer whose file has templates of these names."""
    if form == "directory":
        model = llm_cases.write_directory(tmp_path / "model")
        listed = [{"name": name, "template": text} for name, text in templates.items()]
        _edit_json(model / "tokenizer_config.json", chat_template=listed)
        return load_tokenizer(model)
    if form == "files":  # as transformers 5 saves them
        model = llm_cases.write_directory(tmp_path / "model")
        _edit_json(model / "tokenizer_config.json", chat_template="not this one")
        (model / "additional_chat_templates").mkdir()
        for name, text in templates.items():
            file = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
            (model / file).write_text(text, "utf-8")
        return load_tokenizer(model)
    keys: dict[str, Any] = {"tokenizer.chat_templates": list(templates)}
    for name, text in templates.items():
        keys["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = text
    with open_checkpoint(rewrite_gguf(tmp_path, keys, None)) as checkpoint:
        return load_tokenizer(checkpoint.tokenizer_source)


FORMS = pytest.mark.parametrize("form", ["directory", "files", "gguf"])


@FORMS
def test_named_templates_without_a_default(form: str, tmp_path: Path) -> None:
    tokenizer = _named(tmp_path, form, tool_use=TOOLS, rag=RAG)
    assert tokenizer.chat_template is None
    with pytest.raises(ValueError, match=r"only chat templates of the names rag, tool_use: pass one of these as templ"):
        encode_chat(tokenizer, MESSAGES)
    for name, text in (("rag", "[RAG]hi"), ("tool_use", "[TOOL]hi"), ("own {{ messages[0].content }}", "own hi")):
        assert encode_chat(tokenizer, MESSAGES, template=name) == tokenizer.encode(text)


@FORMS
def test_the_template_for_tools_is_taken_for_tools(form: str, tmp_path: Path) -> None:
    """As transformers' `get_chat_template` chooses."""
    tokenizer = _named(tmp_path, form, default="plain", tool_use=TOOLS)
    assert encode_chat(tokenizer, MESSAGES) == tokenizer.encode("plain")
    assert encode_chat(tokenizer, MESSAGES, tools=[{"name": "f"}]) == tokenizer.encode("[TOOL]hi")
    assert encode_chat(tokenizer, MESSAGES, tools=[{"name": "f"}], template="x") == tokenizer.encode("x")


def test_named_templates_are_kept_in_a_gguf_file(tmp_path: Path) -> None:
    directory = _named(tmp_path, "directory", default="plain", rag=RAG)
    with open_checkpoint(quantize(directory.path, tmp_path / "tiny.gguf", "f32")) as checkpoint:
        tokenizer = load_tokenizer(checkpoint.tokenizer_source)
    assert (tokenizer.chat_template, tokenizer.named_templates) == ("plain", {"rag": RAG})


def test_the_command_line_names_them_too(tmp_path: Path, capsys: Any) -> None:
    model = llm_cases.write_directory(tmp_path / "model")
    _edit_json(model / "tokenizer_config.json", chat_template=[{"name": "rag", "template": RAG}])
    assert main(["generate", str(model), "hi", "-n", "1"]) == 2
    assert "only chat templates of the names rag: choose one with --chat-template" in capsys.readouterr().err
    assert main(["generate", str(model), "hi", "-n", "1", "--chat-template", "reg"]) == 2
    assert "Jinja, a file that holds one, or one of rag, found 'reg'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "templates",
    [[], [3], [{"name": "a"}], [{"name": "a", "template": 3}], [{"template": "x"}], [{"name": [1], "template": "x"}]],
)
def test_a_list_that_holds_no_templates_is_refused(templates: list[Any], tmp_path: Path) -> None:
    model = llm_cases.write_directory(tmp_path / "model")
    _edit_json(model / "tokenizer_config.json", chat_template=templates)
    with pytest.raises(ModelFormatError, match="chat_template: found list, expected a template, or a list of named"):
        load_tokenizer(model)


# --- no tokenizer at all ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ids_alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model without a tokenizer in either format."""
    folder = tmp_path_factory.mktemp("ids")
    without = {f"tokenizer.ggml.{key}": None for key in ("tokens", "scores", "token_type")}
    return {
        "directory": tiny.directory("llama2_mha"),
        "gguf": rewrite_gguf(folder, {**without, "tokenizer.ggml.model": "none"}, None),
    }


@pytest.mark.parametrize("form", ["directory", "gguf"])
def test_ids_in_logits_out(form: str, ids_alone: dict[str, Path], caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        llm = ruvllm.load(ids_alone[form], weights="f32", progress=False)
    assert "this model takes token ids, but no text" in caplog.text
    ids, logits = tiny.golden("llama2_mha")
    np.testing.assert_allclose(llm.logits(ids), logits, atol=2e-4)
    answer = llm.generate(ids[:5], max_tokens=4)
    assert answer.ids[0] == int(logits[4].argmax()) and answer.text == ""
    assert llm.tokenizer.eos_ids == llm.config.eos_token_ids != ()
    said = "tokenizer.json" if form == "directory" else "tokenizer.ggml.model is 'none'"
    calls = (
        lambda: llm.generate("text"),
        lambda: llm.chat(MESSAGES),
        lambda: llm.perplexity("text " * 50, context=8),
        lambda: llm.tokenizer.encode("text"),
        lambda: llm.tokenizer.decode([5]),
        lambda: llm.tokenizer.id_to_piece(5),
    )
    for call in calls:
        with pytest.raises(ValueError, match="takes token ids, but no text") as caught:
            call()
        assert said in str(caught.value)
    assert llm.perplexity(ids, context=8).tokens > 0


def test_the_command_line_says_what_is_missing(tmp_path: Path, capsys: Any) -> None:
    model = tiny.directory("llama2_mha")
    for command in (["generate", str(model), "hi"], ["chat", str(model)]):
        assert main(command) == 2
        assert f"error: {model}: no tokenizer.json" in capsys.readouterr().err


def test_a_tokenizer_of_another_form_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.missing is not None and "no tokenizer.json (tokenizer.model is there" in tokenizer.missing
    assert "save_pretrained" in tokenizer.missing


def test_without_a_tokenizer_it_becomes_a_gguf_without_one(tmp_path: Path) -> None:
    path = quantize(tiny.directory("llama2_mha"), tmp_path / "tiny.gguf", "f32")
    with open_checkpoint(path) as checkpoint:
        close_to_golden(checkpoint, "llama2_mha")
        tokenizer = load_tokenizer(checkpoint.tokenizer_source, checkpoint.config.vocab_size)
        assert tokenizer.missing is not None and tokenizer.eos_ids == checkpoint.config.eos_token_ids
