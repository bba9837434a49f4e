"""The text of answers that may call tools: shown as it comes, and held back where it may be a call."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

from ruvllm.checkpoint.reasoning import may_begin
from ruvllm.checkpoint.tool_calls import ToolCall

_MARKS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")


class Shown:
    """The text before the first call, as it comes. What may be a call is held until the answer ends."""

    def __init__(self) -> None:
        self._held = ""
        self._begun = False  # whether text was shown
        self._calling = False

    def push(self, text: str) -> str:
        """The part of the text so far that is certain to be no call."""
        self._held += text
        if not self._begun and self._held.lstrip().startswith("{"):  # Llama 3: an answer that is a call alone
            self._calling = True
        if self._calling or not self._held.strip():
            return ""
        cut = min((i for i in map(self._held.find, _MARKS) if i >= 0), default=-1)
        self._calling = cut >= 0
        ready = cut if self._calling else len(self._held) - may_begin(self._held, _MARKS)
        shown, self._held = self._held[:ready], self._held[ready:]
        self._begun = self._begun or bool(shown)
        return shown

    def finish(self, calls: Sequence[ToolCall]) -> str:
        """What is still to be shown at the end of an answer that makes these calls."""
        rest, self._held = self._held, ""
        return "" if calls else rest


def content_without_calls(text: str, calls: Sequence[ToolCall]) -> str | None:
    """The text of a whole answer, without the calls in it; None if nothing is left."""
    if not calls:
        return text
    shown = Shown()
    return shown.push(text).strip() or None


def numbered(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """Calls as OpenAI writes them: with an id each, and arguments as JSON text."""
    return [
        {
            "id": f"call_{secrets.token_hex(12)}", "type": "function",
            "function": {
                "name": call["function"]["name"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in calls
    ]  # fmt: skip
