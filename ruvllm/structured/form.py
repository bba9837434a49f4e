"""Form: what an answer must look like, and llguidance's grammar of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ruvllm.brief import brief

# Whitespace of a JSON text between two tokens: a small model could else go on with it forever.
_JSON = {"whitespace_pattern": r"[ \n\t]{1,16}"}


@dataclass(frozen=True)
class Form:
    """What an answer must look like; at most one is given.

    schema: a JSON schema, as a dict or text, or a pydantic model.
    regex: a regular expression, as Rust's `regex` crate has them, that the whole answer matches; \\d is 0 to 9.
    grammar: a grammar, as Lark or GBNF has it.
    choices: the answers that are possible.

    Raises:
        ValueError: several are given, or one that is of another kind.
    """

    schema: Any = None
    regex: str | None = None
    grammar: str | None = None
    choices: Sequence[str] | None = None

    __repr__ = brief

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[1]}: an answer has one form, and {given[0]} is given")
        for name in ("regex", "grammar"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name}: expected text, found {type(getattr(self, name)).__name__}")
        found = self.choices
        if found is not None:
            listed = isinstance(found, Sequence) and not isinstance(found, str) and len(found) > 0
            if not listed or not all(isinstance(text, str) and text for text in found):
                raise ValueError(f"choices: expected a list of non-empty strings, found {found!r:.80}")
        if self.schema is not None:
            object.__setattr__(self, "schema", _schema(self.schema))

    @property
    def name(self) -> str | None:
        """Which of them is given."""
        return next((f.name for f in fields(self) if getattr(self, f.name) is not None), None)

    def compiled(self) -> str:
        """llguidance's grammar. Raises ValueError, with what is wrong and where; ImportError without llguidance."""
        llguidance = required()
        try:
            if self.schema is not None:
                return str(llguidance.LLMatcher.grammar_from_json_schema(self.schema, overrides=_JSON))
            if self.regex is not None:
                lark = f"start: /{llguidance.regex_to_lark(self.regex, 'd')}/"
                return str(llguidance.LLMatcher.grammar_from_lark(lark))
            if self.choices is not None:
                lark = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in self.choices)
                return str(llguidance.LLMatcher.grammar_from_lark(lark))
            return str(llguidance.grammar_from("grammar", self.grammar))
        except ValueError as error:
            raise ValueError(f"{self.name}: cannot be compiled: {error}") from None


def required() -> Any:
    """The library. Raises ImportError with what to install."""
    try:
        import llguidance
    except ImportError:
        raise ImportError("answers of a given form need llguidance: pip install 'ruvllm[structured]'") from None
    return llguidance


def _schema(given: Any) -> str:
    """The JSON text of a schema."""
    of_model = getattr(given, "model_json_schema", None)
    if isinstance(given, type) and callable(of_model):
        given = of_model()
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"schema: expected JSON, found {given!r:.80} ({error})") from None
    if given is False:
        raise ValueError("schema: no answer follows the schema false")
    given = {} if given is True else given
    if not isinstance(given, Mapping):
        raise ValueError(f"schema: expected a dict, JSON or a pydantic model, found {type(given).__name__}")
    try:
        return json.dumps(given)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"schema: cannot be written as JSON: {error}") from None
