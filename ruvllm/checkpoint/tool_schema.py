"""Tools that a model may call, as chat templates take them: a JSON schema each, given or made from a Python function.

The format is OpenAI's. Type hints and docstrings are translated like transformers' `get_json_schema`: the summary
before "Args:", one line for each argument there, followed by choices as ``(choices: ["a", "b"])``.
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ruvllm.errors import printable

Tool = Mapping[str, Any] | Callable[..., Any]

_BASIC: dict[Any, dict[str, Any]] = {
    int: {"type": "integer"}, float: {"type": "number"}, str: {"type": "string"}, bool: {"type": "boolean"},
    type(None): {"type": "null"}, list: {"type": "array"}, tuple: {"type": "array"}, dict: {"type": "object"}, Any: {},
}  # fmt: skip
_SCALARS = (int, float, str, bool, type(None))
_SECTION = re.compile(r"^\s*(Args|Returns|Raises):[ \t]*$", re.MULTILINE)
_ARGUMENT = re.compile(r"(\w+)(?:[ \t]*\([^()\n]*\))?:[ \t]*(.*)")
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def tool_schemas(tools: Sequence[Tool]) -> list[Mapping[str, Any]]:
    """The schema of each tool: of those that are dicts the dict itself.

    Raises: ValueError naming the tool that is neither a dict nor a function with all that a schema needs.
    """
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise ValueError(f"tools: found {type(tools).__name__}, expected a list of JSON schemas or functions")
    return [tool if isinstance(tool, Mapping) else _described(tool, f"tools[{n}]") for n, tool in enumerate(tools)]


def _described(function: Any, where: str) -> dict[str, Any]:
    if not inspect.isroutine(function):
        raise ValueError(f"{where}: found {type(function).__name__}, expected a JSON schema or a function")
    name = function.__name__
    where = f"{where} ({printable(name)})"
    summary, arguments, returned = _sections(inspect.getdoc(function) or "")
    if not summary:
        raise ValueError(f"{where}: found no docstring, expected one that says what the function does")
    try:
        hints = get_type_hints(function)
    except NameError as error:
        raise ValueError(f"{where}: found a type hint that cannot be read: {printable(error)}") from None
    properties: dict[str, Any] = {}
    required = []
    for argument, parameter in inspect.signature(function).parameters.items():
        if argument not in hints:
            raise ValueError(f"{where}: found no type hint of {argument}, expected one")
        if argument not in arguments:
            raise ValueError(f"{where}: found nothing of {argument} in the docstring, expected a line under Args:")
        properties[argument] = _property(hints[argument], arguments[argument], f"{where}: {argument}")
        if parameter.default is inspect.Parameter.empty:
            required.append(argument)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    described: dict[str, Any] = {"name": name, "description": summary, "parameters": parameters}
    if "return" in hints:
        with suppress(ValueError):  # a return type without a schema is left out
            described["return"] = _schema(hints["return"], where) | ({"description": returned} if returned else {})
    return {"type": "function", "function": described}


def _sections(doc: str) -> tuple[str, dict[str, str], str]:
    """Of a docstring in Google's style: the text before its sections, the arguments, the description of the result."""
    parts = _SECTION.split(doc)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    arguments: dict[str, str] = {}
    name = None
    for line in inspect.cleandoc(sections.get("Args", "")).splitlines():
        found = None if line[:1].isspace() else _ARGUMENT.match(line)
        if found:
            name = found[1]
            arguments[name] = found[2].strip()
        elif name is not None and line.strip():
            arguments[name] = f"{arguments[name]} {line.strip()}".strip()
    return parts[0].strip(), arguments, sections.get("Returns", "").strip()


def _property(hint: Any, description: str, where: str) -> dict[str, Any]:
    schema = _schema(hint, where)
    choices = _CHOICES.search(description)
    if choices:
        try:
            schema["enum"] = [choice.strip() for choice in json.loads(choices[1])]
        except (ValueError, AttributeError, TypeError):
            found = printable(choices[1])
            raise ValueError(f"{where}: found the choices {found}, expected a JSON list of strings") from None
        description = description[: choices.start()].strip()
    return {**schema, "description": description}


def _schema(hint: Any, where: str) -> dict[str, Any]:
    """The JSON schema of a type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is None and isinstance(hint, type) and issubclass(hint, Enum):
        return _one_of([member.value for member in hint], where)
    if origin is Literal:
        return _one_of(list(args), where)
    if origin is list:
        return {"type": "array", "items": _schema(args[0], where)}
    if origin is tuple and len(args) > 1 and ... not in args:
        return {"type": "array", "prefixItems": [_schema(item, where) for item in args]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(args[1], where)}
    if origin in (Union, types.UnionType):
        return _union(args, where)
    if origin is None and hint in _BASIC:
        return dict(_BASIC[hint])
    expected = "int, float, str, bool, Any, an Enum, or list, tuple, dict, Literal and unions of these"
    raise ValueError(f"{where}: found the type {printable(hint)}, expected {expected}")


def _union(args: tuple[Any, ...], where: str) -> dict[str, Any]:
    parts = [_schema(arg, where) for arg in args if arg is not type(None)]
    if len(parts) == 1:
        schema = parts[0]
    elif all(part.keys() == {"type"} for part in parts):
        names = sorted({part["type"] for part in parts})
        schema = {"type": names[0] if len(names) == 1 else names}
    else:
        schema = {"anyOf": parts}
    return schema | ({"nullable": True} if type(None) in args else {})


def _one_of(values: list[Any], where: str) -> dict[str, Any]:
    if not values or not all(type(value) in _SCALARS for value in values):
        raise ValueError(f"{where}: found the values {printable(values)}, expected numbers, strings, True, False, None")
    kinds = list(dict.fromkeys(_BASIC[type(value)]["type"] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}
