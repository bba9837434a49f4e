"""The keywords of an answer: each is a field of one of several groups."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ruvllm.model.sampling.options import Sampling
from ruvllm.structured.form import Form

if TYPE_CHECKING:
    from ruvllm.checkpoint.tool_schema import Tool


_OTHERS = ("sampling", "max_tokens", "stop", "logprobs", "cache", "kv", "draft")  # that ``LLM.stream`` takes


@dataclass(frozen=True)
class ChatOptions:
    """How messages become a prompt.

    template: a chat template (Jinja) in place of the model's, or the name of one that it has.
    tools: functions that the model may call: Python functions with type hints and a docstring, or JSON schemas as
        OpenAI has them.
    enable_thinking: whether a model that can do both thinks before it answers; None: its template's default.
    template_args: additional variables of the template.
    """

    template: str | None = None
    tools: Sequence[Tool] | None = None
    enable_thinking: bool | None = None
    template_args: Mapping[str, Any] | None = None

    @classmethod
    def among(cls, keywords: Mapping[str, Any]) -> ChatOptions:
        """Those that are among the keywords of an answer."""
        return cls(**_taken(dict(keywords), cls))

    @property
    def given(self) -> Iterator[str]:
        """The names of the options that are given."""
        return (f.name for f in fields(self) if getattr(self, f.name) is not None)


@dataclass(frozen=True)
class AnswerOptions:
    """The keywords of ``LLM.stream`` by group."""

    sampling: Sampling
    chat: ChatOptions
    form: Form

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> AnswerOptions:
        """Sort keywords into groups. ``sampling``: a Sampling, which fields of it override.

        Raises:
            TypeError: no group has a field of this name, or ``sampling`` is no Sampling.
            ValueError: a value outside its range.
        """
        given = dict(keywords)
        sampling = given.pop("sampling", None)
        if not isinstance(sampling, Sampling | None):
            raise TypeError(f"sampling: expected a Sampling, found {type(sampling).__name__}")
        changes = _taken(given, Sampling)
        chat, form = ChatOptions(**_taken(given, ChatOptions)), Form(**_taken(given, Form))
        if given:
            known = [*_OTHERS, *(f.name for group in (Sampling, ChatOptions, Form) for f in fields(group))]
            name = next(iter(given))
            near = difflib.get_close_matches(name, known, 1)
            raise TypeError(f"unexpected keyword argument {name!r}{f': did you mean {near[0]!r}?' if near else ''}")
        return cls(Sampling(**changes) if sampling is None else replace(sampling, **changes), chat, form)


def _taken(given: dict[str, Any], group: type) -> dict[str, Any]:
    """The keywords that are fields of a group, taken off ``given``."""
    names = [f.name for f in fields(group) if f.name in given]
    return {name: given.pop(name) for name in names}
