"""Calls of tools in literal answers of models."""

from __future__ import annotations

from typing import Any

import pytest

from ruvllm.checkpoint.tool_calls import tool_calls


def calls(*found: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in found]


WEATHER = ("get_weather", {"city": "Paris", "days": 2})
CLOCK: tuple[str, dict[str, Any]] = ("clock", {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Hermes, Qwen
        ('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>', [WEATHER]),
        (
            'See:\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>\n'
            '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>',
            [WEATHER, CLOCK],
        ),
        ('<tool_call>[{"name": "clock", "arguments": {}}]</tool_call>', [CLOCK]),
        ('<tool_call>{"name": "clock", "arguments": "{}"}</tool_call>', [CLOCK]),
        ('<tool_call>\n{"name": "clock", "arguments": {}}', [CLOCK]),  # its end is a token that ends the text
        ('<tool_call>\n{"name": "clock", "argum', []),  # cut at max_tokens
        ('<tool_call>{"name": "say", "arguments": {"text": "</tool>"}}</tool_call>', [("say", {"text": "</tool>"})]),
        # Mistral
        ('[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}, {"name": "clock", '
         '"arguments": {}, "id": "VvvODy9mT"}]', [WEATHER, CLOCK]),
        ('[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 2}[TOOL_CALLS]clock[ARGS]{}', [WEATHER, CLOCK]),
        ('[TOOL_CALLS]get_weather{"city": "Paris", "days": 2}', [WEATHER]),
        ('[TOOL_CALLS]clock[CALL_ID]VvvODy9mT[ARGS]{}', [CLOCK]),
        ('[TOOL_CALLS] [{"name": "clock"', []),
        # Llama 3
        ('{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}', [WEATHER]),
        ('<|python_tag|>{"name": "clock", "parameters": {}}; {"name": "clock", "parameters": {}}', [CLOCK, CLOCK]),
        ('{"name": "clock", "parameters": {}}\nThat is it.', []),
        # no calls
        ("The weather is fine.", []),
        ("", []),
        ("[1, 2]", []),
        ('{"name": "Ann", "age": 3}', []),
        ('{"name": 3, "parameters": {}}', []),
        ("[" * 100_000, []),
        ('<tool_call>' + "[" * 100_000, []),
    ],
)  # fmt: skip
def test_calls_are_read(text: str, expected: list[tuple[str, dict[str, Any]]]) -> None:
    assert tool_calls(text) == calls(*expected)
