"""Calls of tools in a model's answer, in the formats that templates teach: Hermes and Qwen, Mistral, Llama 3."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

ToolCall = dict[str, Any]

_HERMES = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_MISTRAL = "[TOOL_CALLS]"
_MISTRAL_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(?=\{)")
_LLAMA = "<|python_tag|>"
_DECODER = json.JSONDecoder()


def tool_calls(text: str) -> list[ToolCall]:
    """The calls in an answer, as chat templates and OpenAI have them; none where the text holds no complete call.

    Each is {"type": "function", "function": {"name": ..., "arguments": {...}}}: pass them on in the messages, as
    {"role": "assistant", "tool_calls": [...]}. Formats:

    - ``<tool_call>{"name": "f", "arguments": {...}}</tool_call>``, repeated (Hermes, Qwen, SmolLM3);
    - ``[TOOL_CALLS][{"name": "f", "arguments": {...}}, ...]`` or ``[TOOL_CALLS]f[ARGS]{...}``, repeated (Mistral);
    - ``{"name": "f", "parameters": {...}}``, several after each other or with ";" between, and nothing else (Llama 3).
    """
    if "<tool_call>" in text:
        return [call for match in _HERMES.finditer(text) for call in _calls(_values(match[1]))]
    if _MISTRAL in text:
        return [call for part in text.split(_MISTRAL)[1:] for call in _mistral(part)]
    return list(_calls(_values(text.strip().removeprefix(_LLAMA), whole=True)))


def _mistral(part: str) -> Iterator[ToolCall]:
    named = _MISTRAL_NAMED.match(part)
    if named is None:
        yield from _calls(_values(part))
    else:
        arguments = _values(part[named.end() :])[:1]
        yield from _calls([{"name": named[1], "arguments": value} for value in arguments])


def _values(text: str, whole: bool = False) -> list[Any]:
    """The JSON values at the beginning of a text; ``whole``: none unless there is nothing else."""
    found: list[Any] = []
    text = text.strip()
    while text:
        try:
            value, end = _DECODER.raw_decode(text)
        except (ValueError, RecursionError):
            return [] if whole else found
        found.append(value)
        text = text[end:].lstrip().removeprefix(";").lstrip()
    return found


def _calls(values: list[Any]) -> Iterator[ToolCall]:
    """The calls among JSON values, which may be lists of them."""
    for value in values:
        if isinstance(value, list):
            yield from _calls(value)
        elif isinstance(value, dict) and isinstance(value.get("name"), str):
            arguments = value.get("arguments", value.get("parameters"))
            if isinstance(arguments, str):  # JSON in JSON
                inner = _values(arguments, whole=True)
                arguments = inner[0] if len(inner) == 1 else None
            if isinstance(arguments, dict):
                yield {"type": "function", "function": {"name": value["name"], "arguments": arguments}}
