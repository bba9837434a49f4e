"""Training data: JSON lines and plain text become the tokens of examples, with the answers marked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ruvllm.checkpoint.chat import encode_chat
from ruvllm.errors import RuvllmError, printable
from ruvllm.model.training_data import Example

_FORMS = '{"messages": [...]}, {"prompt": ..., "completion": ...}, {"instruction": ..., "output": ...} or {"text": ...}'
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_PLAIN_TEXT = ("", ".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org", ".tex", ".log")
_TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xls", ".xlsx", ".ods", ".db", ".sqlite")
_ANSWERS = ("completion", "response", "answer")

Record = Mapping[str, Any] | str | Example


class TrainingDataError(RuvllmError, ValueError):
    """Data that cannot be learned from: which file and line, and why."""


def read_examples(path: str | os.PathLike[str], tokenizer: Any, context: int) -> list[Example]:
    """The examples of a file: one a line of .jsonl (see ``to_example``), or windows of ``context`` tokens of a text.

    A .json file may hold them in one array.

    Raises:
        OSError: it cannot be read.
        TrainingDataError: it is empty, of a kind that is not read, or a line is not JSON or has no known form; names
            the line.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (*_JSON_LINES, *_PLAIN_TEXT):
        hint = "write its rows as JSON lines" if kind in _TABLES else "call it .txt if it is plain text"
        known = f"{', '.join(_JSON_LINES)} or a text ({', '.join(_PLAIN_TEXT[1:])})"
        raise TrainingDataError(f"{printable(path)}: expected {known}, found {printable(path.suffix)}: {hint}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    except UnicodeDecodeError as error:
        raise TrainingDataError(f"{printable(path)}: byte {error.start} is not UTF-8") from None
    if kind == ".json" and text.lstrip().startswith("["):
        examples = [
            _numbered(f"{printable(path)} record {number}", _from_json, record, tokenizer, context)
            for number, record in enumerate(_array(text, path), 1)
        ]
    elif kind in _JSON_LINES:
        examples = [
            _numbered(f"{printable(path)} line {number}", _parsed, line, tokenizer, context)
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    else:
        examples = list(_windows(text, tokenizer, context))
    if not examples:
        raise TrainingDataError(f"{printable(path)}: expected at least one example, found none")
    return examples


def to_examples(data: Iterable[Record], tokenizer: Any, context: int) -> list[Example]:
    """Records in memory as examples.

    Raises:
        TypeError: one record where several are expected.
        TrainingDataError: nothing can be learned from a record, which is named by its number from 0.
    """
    if isinstance(data, Mapping | str):
        raise TypeError(f"data: expected a list of records, found one {type(data).__name__}")
    examples = [_numbered(f"example {n}", to_example, record, tokenizer, context) for n, record in enumerate(data)]
    if not examples:
        raise TrainingDataError("data: expected at least one example, found none")
    return examples


def to_example(record: Record, tokenizer: Any, context: int) -> Example:
    """One record as tokens; those of answers are learned.

    Args:
        record: {"messages": [{"role": ..., "content": ...}, ...]}, a chat: what the assistant says is learned (only
            its last answer where the template drops what was thought in earlier turns, as Qwen3's does);
            {"prompt": ..., "completion": ...} ("response" or "answer" for "completion"; {"instruction": ..., "input":
            ..., "output": ...} likewise): a chat of two messages where the model has a chat template and the prompt
            does not begin with a control token (it would have the form of a chat already), else one text;
            {"text": ...} or a str: all of it is learned; an Example: as it is. Control tokens written in a text are
            read as such, as in a prompt; in messages they are text. One end token closes each text.
        tokenizer: of the model.
        context: longer examples are cut to this many tokens.

    Raises:
        ValueError: it has none of these forms, or nothing is left to be learned.
    """
    if isinstance(record, Example):
        return record
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, Mapping):
        raise ValueError(f"expected {_FORMS}, found {type(record).__name__}")
    if "messages" in record:
        ids, learn = _chat(record["messages"], tokenizer)
    elif "text" in record:
        ids = _ended(tokenizer.encode(_text(record, "text")), tokenizer)
        learn = np.ones(len(ids), bool)
    else:
        ids, learn = _pair(*_question_and_answer(record), tokenizer)
    if len(ids) > 1 and learn[1:].any() and not learn[1:context].any():
        raise ValueError(f"its answer begins after {context} tokens, the context")
    if not learn[1:].any():
        raise ValueError("it holds nothing to be learned")
    return Example(np.array(ids[:context]), learn[:context])


def _question_and_answer(record: Mapping[str, Any]) -> tuple[str, str]:
    if "instruction" in record and "output" in record:
        more = _text(record, "input") if record.get("input") else ""
        return _text(record, "instruction") + (f"\n\n{more}" if more else ""), _text(record, "output")
    answers = [key for key in _ANSWERS if key in record]
    if "prompt" not in record or len(answers) != 1:
        raise ValueError(f"expected {_FORMS}, found the keys {printable(', '.join(map(str, record)) or 'none')}")
    return _text(record, "prompt"), _text(record, answers[0])


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f"{key}: expected a string, found {type(value).__name__}")
    return value


def _pair(question: str, answer: str, tokenizer: Any) -> tuple[list[int], np.ndarray]:
    if tokenizer.chat_template is not None and not _in_chat_form(question, tokenizer):
        answer = answer.removesuffix(tokenizer.decode(_end(tokenizer)))  # the template writes it too
        return _chat([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], tokenizer)
    before = tokenizer.with_prefix(tokenizer.encode(question, add_special=False))
    ids = tokenizer.with_prefix(tokenizer.encode(question + answer, add_special=False))
    if ids[: len(before)] != before:  # a token spans the two, but prompts are encoded alone
        ids = before + tokenizer.encode(answer, add_special=False)
    ids = _ended(ids, tokenizer)
    return ids, np.arange(len(ids)) >= len(before)


def _in_chat_form(prompt: str, tokenizer: Any) -> bool:
    """Whether a prompt begins with a control token: then it has gone through a template already."""
    ids = tokenizer.encode(prompt.lstrip(), add_special=False)
    return bool(ids) and ids[0] in tokenizer.special_ids


def _end(tokenizer: Any) -> list[int]:
    """The token that ends a text, if the model has one."""
    return list(tokenizer.eos_ids)[:1]


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    """The ids followed by the token that ends a text, if the model has one, unless they end with it already."""
    end = _end(tokenizer)
    return ids if ids[-1:] == end else ids + end


def _chat(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> tuple[list[int], np.ndarray]:
    """A chat in the model's own format; learned are the tokens from the assistant's cue to the end of its turn.

    Templates of models that think change a turn once others follow it: there only the last answer is as it was given.
    """
    if tokenizer.chat_template is None:
        raise ValueError("messages: the model has no chat template; give prompt and completion, or text")
    ids = encode_chat(tokenizer, messages, add_generation_prompt=False)
    learn = np.zeros(len(ids), bool)
    ends = set(tokenizer.eos_ids)
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    if answers[:1] == [0]:
        raise ValueError("messages: the first is the assistant's: it answers nothing")
    for n in answers:
        cue = encode_chat(tokenizer, messages[:n], add_generation_prompt=True)
        turn = encode_chat(tokenizer, messages[: n + 1], add_generation_prompt=False)
        if turn[: len(cue)] != cue or ids[: len(turn)] != turn:
            if n != answers[-1]:
                continue
            raise ValueError("messages: the chat template changes earlier turns, so answers cannot be told apart")
        closing = [i for i in range(len(cue), len(turn)) if turn[i] in ends]
        learn[len(cue) : closing[-1] + 1 if closing else len(turn)] = True
    return ids, learn


def _windows(text: str, tokenizer: Any, context: int) -> Iterator[Example]:
    ids = np.array(tokenizer.encode(text), np.int64)
    for lo in range(0, len(ids), context):
        part = ids[lo : lo + context]
        if len(part) > 1:
            yield Example(part, np.ones(len(part), bool))


def _parsed(line: str, tokenizer: Any, context: int) -> Example:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {printable(error)}") from None
    return _from_json(record, tokenizer, context)


def _array(text: str, path: Path) -> list[Any]:
    try:
        found: list[Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TrainingDataError(f"{printable(path)}: not JSON: {printable(error)}") from None
    return found


def _from_json(record: Any, tokenizer: Any, context: int) -> Example:
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, {_FORMS}, found a JSON {type(record).__name__}")
    return to_example(record, tokenizer, context)


def _numbered(where: str, make: Any, record: Any, tokenizer: Any, context: int) -> Example:
    try:
        example: Example = make(record, tokenizer, context)
    except ValueError as error:
        raise TrainingDataError(f"{where}: {error}") from None
    return example
