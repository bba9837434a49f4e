"""What is learned from files: chats, questions with answers, texts; and lines that are refused by their number."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from ruvllm.checkpoint.tokenizer import load_tokenizer
from ruvllm.cli import main
from ruvllm.llm import LLM
from ruvllm.model import LoraConfig
from ruvllm.model.training import TrainingConfig
from ruvllm.training_text import TrainingDataError, read_examples, to_example, to_examples
from tests.llm_cases import END, write_directory


def learned(llm: LLM, record) -> str:
    example = to_example(record, llm.tokenizer, 512)
    return llm.tokenizer.decode(example.ids[example.learn].tolist())


def test_only_answers_are_learned(llm: LLM) -> None:
    chat = [("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "See you.")]
    messages = [{"role": role, "content": content} for role, content in chat]
    assert learned(llm, {"messages": messages}) == "Hello!<|end|>See you.<|end|>"
    example = to_example({"messages": messages}, llm.tokenizer, 512)
    spelt = "<|user|>Hi<|end|><|assistant|>Hello!<|end|><|user|>Bye<|end|><|assistant|>See you.<|end|>"
    assert llm.tokenizer.decode(example.ids.tolist()) == spelt
    for key in ("completion", "response", "answer"):
        assert learned(llm, {"prompt": "2+2?", key: "4"}) == "4<|end|>"
    asked = {"instruction": "Add.", "input": "2 2", "output": "4"}
    assert learned(llm, asked) == "4<|end|>"
    both = llm.tokenizer.decode(to_example(asked, llm.tokenizer, 512).ids.tolist())
    assert both == "<|user|>Add.\n\n2 2<|end|><|assistant|>4<|end|>"


def test_of_a_template_that_changes_earlier_turns_the_last_answer_is_learned(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3's writes a thought, be it an empty one, before the last answer alone."""
    monkeypatch.setattr(
        llm.tokenizer,
        "chat_template",
        "{% for m in messages %}<|{{ m.role }}|>{{ '<think></think>' if loop.last and m.role == 'assistant' }}"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    )
    chat = [("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "See you.")]
    messages = [{"role": role, "content": content} for role, content in chat]
    assert learned(llm, {"messages": messages}) == "<think></think>See you.<|end|>"
    example = to_example({"messages": messages}, llm.tokenizer, 512)
    spelt = "<|user|>Hi<|end|><|assistant|>Hello!<|end|><|user|>Bye<|end|><|assistant|><think></think>See you.<|end|>"
    assert llm.tokenizer.decode(example.ids.tolist()) == spelt
    with pytest.raises(ValueError, match="the chat template changes earlier turns"):
        learned(llm, {"messages": messages[:3]})


def test_plain_texts(llm: LLM, tmp_path: Path) -> None:
    example = to_example("a b", llm.tokenizer, 512)
    assert example.learn.all() and example.ids.tolist() == [*b"a b", END]
    (tmp_path / "book.txt").write_text("abcdefghij" * 3)
    windows = read_examples(tmp_path / "book.txt", llm.tokenizer, 8)
    assert [len(e.ids) for e in windows] == [8, 8, 8, 6] and all(e.learn.all() for e in windows)


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    """SentencePiece with BOS and merges, no template: our tokenizer, and the one of `tokenizers`."""
    directory = write_directory(tmp_path_factory.mktemp("spm"), "bf16_sharded_tied")
    engine = Tokenizer.from_file(str(directory / "tokenizer.json"))
    engine.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    engine.save(str(directory / "tokenizer.json"))
    return load_tokenizer(directory), engine


CHAT_FORM = "<|user|>hi<|end|><|assistant|>hello"


@pytest.mark.parametrize("text", [CHAT_FORM, CHAT_FORM + "<|end|>", CHAT_FORM + "<|end|>\n", "a <|end|> b", "plain"])
def test_control_tokens_in_a_text_are_control_tokens(text: str, llm: LLM, tmp_path: Path) -> None:
    """As TRL's SFTTrainer reads `text`: the end token is put behind it unless it ends so, then all of it is encoded."""
    oracle = Tokenizer.from_file(str(llm.path / "tokenizer.json"))
    expected = oracle.encode(text if text.endswith("<|end|>") else text + "<|end|>").ids
    for record in (text, {"text": text}):
        example = to_example(record, llm.tokenizer, 512)
        assert example.ids.tolist() == expected and example.learn.all()
    path = tmp_path / "book.txt"
    path.write_text(text)
    assert read_examples(path, llm.tokenizer, 512)[0].ids.tolist() == oracle.encode(text).ids


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("<|user|>hi<|end|><|assistant|>", "yes"), ("Q: ", "A<|end|>"), ("<|user|>", "<|assistant|>x"), ("", "x")],
)
def test_control_tokens_in_a_prompt_without_a_template(
    prompt: str, completion: str, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = Tokenizer.from_file(str(llm.path / "tokenizer.json"))
    monkeypatch.setattr(llm.tokenizer, "chat_template", None)
    example = to_example({"prompt": prompt, "completion": completion}, llm.tokenizer, 512)
    whole = prompt + completion
    assert example.ids.tolist() == oracle.encode(whole if whole.endswith("<|end|>") else whole + "<|end|>").ids
    assert np.flatnonzero(~example.learn).tolist() == list(range(len(oracle.encode(prompt).ids)))


def test_a_prompt_in_chat_form_is_not_put_into_the_template_again(llm: LLM) -> None:
    oracle = Tokenizer.from_file(str(llm.path / "tokenizer.json"))
    for prompt in ("<|user|>hi<|end|><|assistant|>", "\n<|system|>x<|end|>"):
        example = to_example({"prompt": prompt, "completion": "yes<|end|>"}, llm.tokenizer, 512)
        assert example.ids.tolist() == oracle.encode(prompt + "yes<|end|>").ids
        assert llm.tokenizer.decode(example.ids[example.learn].tolist()) == "yes<|end|>"
    quoting = {"prompt": "What is <|user|>?", "completion": "A <|end|> token.<|end|>"}  # text, but for the last
    example = to_example(quoting, llm.tokenizer, 512)
    controls = [i for i in example.ids.tolist() if i >= END]
    assert controls == [END + 1, END, END + 2, END]
    assert llm.tokenizer.decode(example.ids[example.learn].tolist()) == "A <|end|> token.<|end|>"


def test_prompt_and_completion_are_one_text(with_bos: tuple[Any, Tokenizer]) -> None:
    """As in TRL: the completion of a SentencePiece prompt has no space before it that nobody wrote."""
    tokenizer, oracle = with_bos
    for prompt, completion in (("2+2=", "4"), ("<s>Q:", " no</s>"), ("one", " two</s>")):
        example = to_example({"prompt": prompt, "completion": completion}, tokenizer, 512)
        expected = oracle.encode(prompt.removeprefix("<s>") + completion.removesuffix("</s>") + "</s>").ids
        assert example.ids.tolist() == expected
        assert (~example.learn).sum() == len(oracle.encode(prompt.removeprefix("<s>")).ids)
    # Where one token would take the end of the prompt with it, the prompt stays what it is when it is asked.
    example = to_example({"prompt": "xa", "completion": "b"}, tokenizer, 512)
    assert example.ids[: (~example.learn).sum()].tolist() == oracle.encode("xa").ids
    assert tokenizer.decode(example.ids[example.learn].tolist(), continuation=True).strip() == "b</s>"


def test_a_file_that_asks_for_an_end_token_gets_one(with_bos: tuple[Any, Tokenizer]) -> None:
    tokenizer = Tokenizer.from_str(with_bos[1].to_str())
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    directory = Path(with_bos[0].path)
    tokenizer.save(str(directory / "tokenizer.json"))
    both = load_tokenizer(directory)
    assert to_example("hi", both, 64).ids.tolist() == tokenizer.encode("hi").ids
    pair = to_example({"prompt": "hi", "completion": "ho"}, both, 64).ids.tolist()
    assert (pair.count(1), pair.count(2), pair[0], pair[-1]) == (1, 1, 1, 2)


def test_long_examples_are_cut(llm: LLM) -> None:
    example = to_example({"prompt": "Q", "completion": "x" * 100}, llm.tokenizer, 20)
    assert len(example.ids) == 20 and example.learn.sum() == 20 - len("Q") - 3
    with pytest.raises(ValueError, match="its answer begins after 20 tokens"):
        to_example({"prompt": "Q" * 50, "completion": "x"}, llm.tokenizer, 20)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "line 3: not JSON"),
        ("[1, 2]", "line 3: expected an object"),
        ('{"question": "a", "completion": "b"}', "line 3: expected .*found the keys question, completion"),
        ('{"prompt": 1, "completion": "b"}', "line 3: prompt: expected a string, found int"),
        ('{"messages": []}', "line 3: messages"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "line 3: it holds nothing to be learned"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "line 3: messages: the first is the assistant's"),
        ('{"text": ""}', "line 3: it holds nothing to be learned"),
    ],
)
def test_bad_lines_are_named(line: str, message: str, llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(TrainingDataError, match=message):
        read_examples(path, llm.tokenizer, 64)


def test_empty_and_foreign_files(llm: LLM, tmp_path: Path) -> None:
    for name in ("data.jsonl", "data.txt"):
        (tmp_path / name).write_text("\n")
        (tmp_path / name).write_text("" if name.endswith("txt") else "\n\n")
        with pytest.raises(TrainingDataError, match="expected at least one example, found none"):
            read_examples(tmp_path / name, llm.tokenizer, 64)
    (tmp_path / "data.txt").write_bytes(b"abc\xff")
    with pytest.raises(TrainingDataError, match="byte 3 is not UTF-8"):
        read_examples(tmp_path / "data.txt", llm.tokenizer, 64)


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("x.csv", b"prompt,completion\nhello,world\n", "found .csv: write its rows as JSON lines"),
        ("x.TSV", b"prompt\tcompletion\n", "found .TSV: write its rows as JSON lines"),
        ("x.parquet", b"PAR1\xff", "found .parquet: write its rows as JSON lines"),
        ("x.jsonl.gz", b"\x1f\x8b", "found .gz: call it .txt if it is plain text"),
        ("x.yaml", b"a: b", "found .yaml: call it .txt"),
    ],
)
def test_kinds_of_files_that_are_not_read_are_not_learned_as_text(
    name: str, content: bytes, hint: str, llm: LLM, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainingDataError, match=re.escape(hint)) as caught:
        llm.examples(tmp_path / name)
    assert f"{name}: expected .jsonl, .ndjson, .json or a text (.txt, " in str(caught.value)


@pytest.mark.parametrize("name", ["book", "book.md", "book.TXT"])
def test_texts(name: str, llm: LLM, tmp_path: Path) -> None:
    (tmp_path / name).write_text("[abcdefghij]")
    assert [e.ids.tolist() for e in llm.examples(tmp_path / name, 64)] == [llm.tokenizer.encode("[abcdefghij]")]


def test_an_array_of_records(llm: LLM, tmp_path: Path) -> None:
    records = [{"prompt": "a", "completion": "b"}, {"text": "cde"}]
    array, lines = tmp_path / "array.json", tmp_path / "lines.json"
    array.write_text(json.dumps(records, indent=2))
    lines.write_text("\n".join(map(json.dumps, records)))
    got, expected = llm.examples(array), llm.examples(lines)
    assert [e.ids.tolist() for e in got] == [e.ids.tolist() for e in expected]
    assert [e.learn.tolist() for e in got] == [e.learn.tolist() for e in expected]
    for content, message in (
        ('[{"text": "cde"}, 3]', r"array\.json record 2: expected an object"),
        ('[{"text": "cde"}', r"array\.json: not JSON"),
        ("[]", r"array\.json: expected at least one example, found none"),
    ):
        array.write_text(content)
        with pytest.raises(TrainingDataError, match=message):
            llm.examples(array)


def test_the_facade_learns_and_adapts(llm: LLM) -> None:
    data = [{"prompt": "2+2?", "completion": "four"}]
    training = TrainingConfig(steps=20, lr=0.03)
    trainer = llm.fit(data, "sums", config=LoraConfig(4), training=training, on_step=lambda step, total: None)
    assert trainer.evaluate().loss < 0.5 * trainer.history[0].loss
    assert "sums" in llm.lora.active
    assert llm.adapt(data[0]) < trainer.history[0].loss
    with pytest.raises(TrainingDataError, match="example 1: text: expected a string"):
        llm.fit([data[0], {"text": 3}])
    for name in list(llm.lora.adapters):
        llm.lora.detach(name)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trains, measures, writes; goes on with --resume; the result changes what generate says; errors are one line."""
    model = str(write_directory(tmp_path / "model"))
    lines = [json.dumps({"prompt": "ab", "completion": "cd" * n}) for n in range(1, 7)]
    data, out = tmp_path / "data.jsonl", str(tmp_path / "out")
    data.write_text("\n".join(lines))
    command = ["train", model, "--data", str(data), "-o", out, "--steps", "4", "-b", "2", "--lr", "0.01", "-t", "1"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "5 examples" in printed and "1 held out" in printed and "step 4/4" in printed
    measured = [line for line in printed.splitlines() if line.startswith(("before:", "after:"))]
    before, after = (float(line.split()[2].rstrip(",")) for line in measured)
    assert after < before
    assert main(command) == 2 and "is not empty: --resume" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0 and "resumed after step 4 of 4" in capsys.readouterr().out
    assert main([*command, "--resume", "--rank", "4"]) == 2
    assert "rank was 8 there, and is 4 here" in capsys.readouterr().err

    speak = ["generate", model, "--raw", "-p", "ab", "-n", "8", "-q", "-t", "1"]
    answers = []
    for more in ([], ["--lora", out], ["--lora", f"{out}=0"], ["--lora", f"{out}=0.5", "--lora", f"{out}=0.5"]):
        assert main([*speak, *more]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[2] and answers[1] == answers[3]
    assert main([*speak, "--lora", str(tmp_path / "none")]) == 2
    assert "no such adapter" in capsys.readouterr().err.lower()
    data.write_text(lines[0] + "\nnot json\n")
    assert main(["train", model, "--data", str(data), "-o", str(tmp_path / "other")]) == 2
    assert "line 2: not JSON" in capsys.readouterr().err
    assert main(["train", model]) == 2 and "which data?" in capsys.readouterr().err


def test_a_model_of_a_short_context_takes_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without -c: windows of 512 tokens, or as many as the model has."""
    model = write_directory(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    data = tmp_path / "data.txt"
    data.write_text("abcdefgh" * 60)
    out = str(tmp_path / "out")
    assert (
        main(["train", str(model), "--data", str(data), "-o", out, "--steps", "1", "--eval-share", "0", "-t", "1"]) == 0
    )
    assert "8 examples" in capsys.readouterr().out
    assert main(["perplexity", str(model), str(data), "-t", "1"]) == 0
    assert "windows of 64" in capsys.readouterr().out
    assert main(["perplexity", str(model), str(data), "-t", "1", "-c", "512"]) == 2
    assert "--context (-c): expected at most 64 tokens, the model's own, found 512" in capsys.readouterr().err


def test_one_record_is_no_list_of_records(llm: LLM) -> None:
    record = {"prompt": "2+2?", "completion": "4"}
    for one in (record, "a text"):
        with pytest.raises(TypeError, match="^data: expected a list of records"):
            to_examples(one, llm.tokenizer, 512)
    for context in (1, 0, -3, 40.5, None):
        with pytest.raises(ValueError, match="^context: expected an integer >= 2"):
            llm.examples([record], context)  # type: ignore[arg-type]


def test_a_mark_at_the_beginning_of_a_file_is_no_text(llm: LLM, tmp_path: Path) -> None:
    lines, text = tmp_path / "data.jsonl", tmp_path / "data.txt"
    lines.write_text(json.dumps({"text": "hello"}) + "\n", encoding="utf-8-sig")
    text.write_text("hello", encoding="utf-8-sig")
    assert llm.tokenizer.decode(read_examples(lines, llm.tokenizer, 64)[0].ids.tolist()).startswith("hello")
    assert llm.tokenizer.decode(read_examples(text, llm.tokenizer, 64)[0].ids.tolist()) == "hello"


def test_where_nothing_can_be_written_nothing_is_learned(llm: LLM, tmp_path: Path, capsys) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": "hello"}) + "\n")
    assert main(["train", "no-such-model", "--data", str(data), "--out", str(data)]) == 2
    assert "--out: nothing can be written into" in capsys.readouterr().err
