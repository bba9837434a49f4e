"""Chats to token ids by a model's own template, in which messages are always plain text.

The origin of a control token decides its meaning. One that the template writes is that token; the same characters in a
message are text. So the control tokens in the template's own literals, and the template's `bos_token` and `eos_token`,
are replaced before rendering by marks that no message can contain, and after rendering only marks become control
tokens: whatever the template does with a message (trim, split, change case, join with others), it yields none.

Three cases, distinguished after rendering:

1. As plain text, the rendered chat has the marked control tokens and no others. This is every chat whose messages
   spell none; its ids are those of the plain rendering.
2. There are others. They came from messages, or the template assembles tokens from parts
   (``'<|' + message['role'] + '|>'``). To tell which, it is rendered once more with every visible character of the
   messages replaced by one that no token has. A control token that remains is the template's own.
3. The second rendering differs because the template inspects messages (``if '</think>' in content``).
   If it has no control tokens from parts, all others are the messages' text. If it has the same control tokens as the
   first, those are the template's. Otherwise the chat is refused with a ValueError.

Limits: ordinary text that marks turns, such as LLaMA-2's ``[INST]``, cannot be distinguished from a message's. Tokens
of the vocabulary that are not control tokens (``<think>``) are read from messages too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ruvllm.checkpoint.tokenizer import Tokenizer
from ruvllm.checkpoint.tool_schema import Tool, tool_schemas
from ruvllm.errors import ModelFormatError, printable

if TYPE_CHECKING:
    from ruvllm.checkpoint.template.sandbox import Template

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")

_GIVEN = "chat template"  # in place of a path, for a template that has no file
# Keys under which programs pass on reasoning. Templates read the first, some the second.
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_MAX_DEPTH = 32
_NAME = re.compile(r"[A-Za-z_$][\w.$-]*")
_DISGUISES = range(0x102000, 0x10FFFE)  # private use, and none of the tokenizer's marks

Message = Mapping[str, Any]


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    add_special: bool = True,
    tools: Sequence[Tool] | None = None,
    variables: Mapping[str, Any] | None = None,
    template: str | None = None,
) -> list[int]:
    """The ids of a chat in the format that the model was trained on; control tokens in messages stay text.

    Args:
        tokenizer: of the model; it has the template, too.
        messages: dicts with `role` (one of `ROLES`) and `content` (a str, or a list of ``{"type": "text", "text":
            ...}``; none if there are `tool_calls`); further keys are passed to the template, except those whose
            value is None.
        add_generation_prompt: end with the cue for the model's answer.
        add_special: begin with the model file's prefix (BOS), unless the template has written it.
        tools: functions that the model may call: JSON schemas as OpenAI has them, or Python functions with type hints
            and a docstring (see `tool_schema`).
        variables: further variables for the template (``{"enable_thinking": False}``).
        template: used in place of the tokenizer's: a template, or the name of one that the model has. Without it, a
            model that has one named "tool_use" uses that for `tools`, as transformers does.

    Raises:
        ValueError: the messages have another form, or the template does not accept them, or case 3 above.
        ModelFormatError: the template is damaged, asks for what is not allowed, or for more time or memory than any
            template needs (see `template.sandbox`).
    """
    source, path = chosen_template(tokenizer, template, tools is not None)
    controls = _Controls(tokenizer)
    named = tokenizer.special_tokens
    marks = {text: tokenizer.mark(i) for text, i in controls.ids.items() if text in source or text in named.values()}
    compiled = _compiled(source, tuple(marks.items()), path)
    marked_names = {name: marks.get(text, text) for name, text in named.items()}

    def render(values: Mapping[str, Any]) -> _Chat:
        return _Chat(_rendered(compiled, {**marked_names, **values}, path), marks, controls)

    given = _variables(messages, add_generation_prompt, tools, variables)
    chat = render(given)
    if chat.spelt == chat.marked:
        ids = tokenizer.encode(chat.plain, add_special=False)
    else:
        ids = tokenizer.encode_marked(_told_apart(chat, given, source, render, controls))
    return tokenizer.with_prefix(ids) if add_special else ids


def chosen_template(tokenizer: Tokenizer, template: str | None, with_tools: bool) -> tuple[str, str]:
    """The template that `encode_chat` uses, and its path, for errors. Raises: ValueError."""
    if tokenizer.missing is not None:
        raise ValueError(tokenizer.missing)
    named = tokenizer.named_templates
    if template is None and with_tools and "tool_use" in named:
        template = "tool_use"
    if template is not None:
        return (named[template], tokenizer.path) if template in named else (template, _GIVEN)
    if tokenizer.chat_template is None:
        has = (
            f"only chat templates of the names {', '.join(sorted(named))}: pass one of these"
            if named
            else ("no chat template: pass one")
        )
        raise ValueError(f"{tokenizer.path} has {has} as template=")
    return tokenizer.chat_template, tokenizer.path


def _told_apart(
    chat: _Chat, given: dict[str, Any], source: str, render: Callable[[Mapping[str, Any]], _Chat], controls: _Controls
) -> str:
    """The text of a chat with a mark for each control token of the template, including those made from parts."""
    disguise = _Disguise(given, source, controls)
    try:
        own = render(disguise.put_on(given))
    except ValueError:  # raised by the template, which inspects messages
        own = None
    if own is not None:
        if disguise.take_off(own.text) == chat.text:
            return disguise.take_off(controls.mark(own.text))
        if own.spelt == own.marked:
            return chat.text
        if own.spelt == chat.spelt:
            return controls.mark(chat.text)
    raise ValueError(
        "messages: they contain a control token, which cannot be distinguished from those of this chat template: it "
        "assembles them from parts and inspects messages"
    )


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Tool] | None = None,
    variables: Mapping[str, Any] | None = None,
    special_tokens: Mapping[str, str] | None = None,
    path: str = _GIVEN,
) -> str:
    """The text of a chat, for inspection. Encode chats with `encode_chat`: text does not show the origin of a token.

    Args:
        special_tokens: the template's `bos_token`, `eos_token`, ...
        path: the template's file, for error messages.
        others: as those of `encode_chat`.

    Raises: ValueError, ModelFormatError, as `encode_chat` does.
    """
    given = _variables(messages, add_generation_prompt, tools, variables)
    return _rendered(_compiled(template, (), path), {**(special_tokens or {}), **given}, path)


class _Controls:
    """The control tokens of a vocabulary by their spelling, and a pattern that finds them in text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.ids = {text: i for i in sorted(tokenizer.special_ids) if (text := tokenizer.id_to_piece(i))}
        self._mark = tokenizer.mark
        self._pattern = _any_of(tuple(self.ids))

    def within(self, text: str) -> list[str]:
        return self._pattern.findall(text)

    def mark(self, text: str) -> str:
        """The text with marks in place of the control tokens that it spells."""
        return self._pattern.sub(lambda found: self._mark(self.ids[found[0]]), text)


class _Chat:
    """A rendered chat: with marks and as plain text, and the control tokens of each form."""

    def __init__(self, text: str, marks: Mapping[str, str], controls: _Controls) -> None:
        spelling = {mark: spelt for spelt, mark in marks.items()}
        pattern = _any_of(tuple(spelling))
        self.text = text
        self.plain = pattern.sub(lambda found: spelling[found[0]], text)
        self.marked = [spelling[mark] for mark in pattern.findall(text)]
        self.spelt = controls.within(self.plain)


class _Disguise:
    """Replaces each visible character of the messages by a private-use one, and back.

    White space stays, so that templates trim and split as they would; so do keys, roles and other strings that are
    only a name: templates compare with those.
    """

    def __init__(self, given: Mapping[str, Any], source: str, controls: _Controls) -> None:
        seen = sorted({character for text in _texts(given) for character in text if not character.isspace()})
        taken = {*seen, *source}
        free = [code for code in _DISGUISES if chr(code) not in taken]
        if len(seen) > len(free):
            raise ValueError(f"messages: found {len(seen)} different characters, expected at most {len(free)}")
        self._on = dict(zip(map(ord, seen), free, strict=False))
        self._off = {code: chr(character) for character, code in self._on.items()}
        self._controls = controls

    def put_on(self, value: Any) -> Any:
        if isinstance(value, str):
            is_name = _NAME.fullmatch(value) and not self._controls.within(value)
            return value if is_name else value.translate(self._on)
        if isinstance(value, list):
            return [self.put_on(item) for item in value]
        if isinstance(value, dict):
            return {self.put_on(key): self.put_on(item) for key, item in value.items()}
        return value

    def take_off(self, text: str) -> str:
        return text.translate(self._off)


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for item in [*value, *value.values()] for text in _texts(item)]
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []


@lru_cache(maxsize=16)
def _any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern for the leftmost of these texts, the longest of several that begin there."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


@lru_cache(maxsize=16)
def _compiled(source: str, literals: tuple[tuple[str, str], ...], path: str) -> Template:
    from ruvllm.checkpoint.template.sandbox import Template, describe

    marks = dict(literals)
    pattern = _any_of(tuple(marks))
    try:
        return Template(source, lambda text: pattern.sub(lambda found: marks[found[0]], text))
    except Exception as error:  # hostile templates cause all of them: syntax, recursion, memory, overflow, ...
        raise _not_allowed(path, describe(error)) from None


def _rendered(template: Template, variables: Mapping[str, Any], path: str) -> str:
    from jinja2.exceptions import SecurityError

    from ruvllm.checkpoint.template.budget import Refused
    from ruvllm.checkpoint.template.functions import Raised
    from ruvllm.checkpoint.template.sandbox import describe

    try:
        return template.render(variables)
    except Raised as error:
        raise ValueError(f"messages: the chat template says: {printable(error)}") from None
    except (Refused, SecurityError, OverflowError, RecursionError, MemoryError) as error:
        raise _not_allowed(path, describe(error)) from None
    except Exception as error:  # any other failure of an expression on these messages
        raise ValueError(f"messages: the chat template cannot use them: {printable(describe(error))}") from None


def _not_allowed(path: str, found: str) -> ModelFormatError:
    field = "source" if path == _GIVEN else "tokenizer.chat_template"
    return ModelFormatError(path, field=field, found=found, expected="a template that can be run")


def _variables(
    messages: Sequence[Message],
    add_generation_prompt: bool,
    tools: Sequence[Tool] | None,
    variables: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The template's variables: checked messages and the rest, all copied to plain dicts, lists and strings."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        found = "none" if isinstance(messages, Sequence) and not messages else type(messages).__name__
        raise ValueError(f"messages: found {found}, expected a list of dicts with 'role' and 'content'")
    return {
        "documents": None,
        **_plain(dict(variables or {}), "variables"),
        "messages": [_message(message, f"messages[{n}]") for n, message in enumerate(messages)],
        "tools": None if tools is None else _plain(tool_schemas(tools), "tools"),
        "add_generation_prompt": bool(add_generation_prompt),
    }


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: found {type(message).__name__}, expected a dict with 'role' and 'content'")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}['role']: found {printable(repr(role))}, expected one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = "".join(_part(part, f"{where}['content'][{n}]") for n, part in enumerate(content))
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise ValueError(f"{where}['content']: found {type(content).__name__}, expected str")
    plain: dict[str, Any] = _plain({**message, "content": content}, where)
    # As in transformers: most templates would print None as a word, and handle a missing key.
    plain = {key: value for key, value in plain.items() if value is not None}
    thoughts = next((plain[key] for key in _THOUGHTS if key in plain), None)
    return plain if thoughts is None else {"thinking": thoughts, **plain, "reasoning_content": thoughts}


def _part(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise ValueError(f"{where}: found {printable(repr(part))}, expected {{'type': 'text', 'text': ...}}")


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy in which everything is exactly a dict, list, str, int, float, bool or None."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where}: found more than {_MAX_DEPTH} levels of nesting")
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError(f"{where}: found a key that is not a str")
        return {str(key): _plain(item, f"{where}[{printable(repr(key))}]", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{n}]", depth + 1) for n, item in enumerate(value)]
    raise ValueError(f"{where}: found {type(value).__name__}, expected plain data (as JSON has it)")
