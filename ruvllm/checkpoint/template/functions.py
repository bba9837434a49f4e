"""What chat templates may call: filters, tests and functions, with checks before anything large is made.

A check gets the budget and the operands of an operation and weighs the result in advance. It raises `Refused`
if that is too large, and SecurityError for arguments that no template needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError
from jinja2.utils import Namespace

from ruvllm.checkpoint.template.budget import MAX_BITS, MAX_ITEMS, Budget, Refused, allow, current, transparent

_LARGEST_ARGUMENT = 1000  # widths and precisions
_LARGEST_SET = 4096  # distinct numbers can be made to hash alike, and then take quadratic time
_WIDE = re.compile(r"[0-9]{4}|\*")
_NESTED_BRACES = re.compile(r"\{[^}]*\{")


class Raised(TemplateError):
    """A template refuses the messages that it was given, in its own words."""


class ValueNamespace(Namespace):
    """Jinja's namespace, whose values are weighed, and have no names with an underscore in front."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may call an attribute "self"
        Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **kwargs).items():
            args[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(name, str) or name.startswith("_"):
            raise SecurityError(f"namespace attribute {name!r} is unsafe")
        current.get().weigh(value)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def make_range(*args: Any) -> range:
    """``range``, refused where it is longer than any loop may run."""
    made = range(*args)
    if made and (made[-1] - made[0]) // made.step >= MAX_ITEMS:  # len() overflows
        raise Refused(f"it makes a range of more than {MAX_ITEMS} numbers")
    return made


def make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """``dict``."""
    return dict(*args, **kwargs)


def raise_exception(message: Any) -> None:
    """How a template refuses a chat."""
    raise Raised(str(message))


def strftime_now(pattern: str) -> str:
    """The current date and time in a short format."""
    if not isinstance(pattern, str) or len(pattern) > 256:
        raise SecurityError("strftime_now takes a format of at most 256 characters")
    return datetime.now().strftime(pattern)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as transformers writes it into prompts: not escaped for HTML, not limited to ASCII."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def check_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """What `left operator right` would make."""
    if operator == "%" and isinstance(left, str):
        _check_percents(budget, left, right)
    elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        first, second = budget.weigh(left), budget.weigh(right)
        allow(first.items + second.items, first.characters + second.characters)
    elif operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(value, str | list | tuple):
                items, characters, *_ = budget.weigh(value)
                allow(1 if isinstance(value, str) else items * max(times, 0), characters * max(times, 0))
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * abs(right) > MAX_BITS:
            raise SecurityError(f"powers of more than {MAX_BITS} bits are unsafe")


def check_method(budget: Budget, text: str, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """What a method of a string would make."""
    if method == "replace":
        _check_replace(budget, text, *args, **kwargs)
    elif method == "join" and args:
        _check_join(budget, args[0], text)


def check_braces(budget: Budget, text: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """What `text.format(...)` would make."""
    if _WIDE.search(text) or _NESTED_BRACES.search(text):
        raise SecurityError("widths of more than three digits, or taken from arguments, are unsafe")
    given = transparent(budget.weigh_all([*args, *kwargs.values()]), "a format")
    each = given.characters + _LARGEST_ARGUMENT
    allow(1, len(text) + text.count("{") * each)


def _check_percents(budget: Budget, text: str, values: Any) -> None:
    if _WIDE.search(text):
        raise SecurityError("widths of more than three digits, or taken from arguments, are unsafe")
    allow(1, len(text) + text.count("%") * (budget.weigh(values).characters + _LARGEST_ARGUMENT))


def _check_format(budget: Budget, text: Any, *args: Any, **kwargs: Any) -> None:
    _check_percents(budget, str(text), kwargs or args)


def _check_replace(budget: Budget, text: Any, old: Any = "", new: Any = "", count: Any = None) -> None:
    text, old, new = str(text), str(old), str(new)
    allow(1, len(text) + text.count(old) * max(len(new) - len(old), 0))


def _check_join(budget: Budget, values: Any, d: Any = "", attribute: Any = None) -> None:
    count = len(values) if hasattr(values, "__len__") else 0
    allow(1, budget.weigh(values).characters + count * len(str(d)))


def _check_indent(budget: Budget, text: Any, width: Any = 4, first: bool = False, blank: bool = False) -> None:
    text = str(text)
    each = len(width) if isinstance(width, str) else _small(width)
    allow(1, len(text) + (text.count("\n") + 1) * each)


def _check_round(budget: Budget, value: Any, precision: Any = 0, method: Any = "common") -> None:
    _small(precision)


def _check_sum(budget: Budget, values: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):  # summing lists is quadratic
        raise SecurityError("a sum of anything but numbers is unsafe")


def _check_items(budget: Budget, values: Any, *args: Any, **kwargs: Any) -> None:
    allow(len(values) if hasattr(values, "__len__") else 0, 0)


def _check_unique(budget: Budget, values: Any, *args: Any, **kwargs: Any) -> None:
    if hasattr(values, "__len__") and len(values) > _LARGEST_SET:
        raise SecurityError(f"unique of more than {_LARGEST_SET} items is unsafe")


def _check_json(
    budget: Budget,
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> None:
    weight = budget.weigh(value)
    spaces = 0 if indent is None else _small(indent) * weight.depth
    between = 4 if separators is None else budget.weigh(separators).characters
    allow(weight.items, weight.characters + weight.items * (spaces + between))


def _small(number: Any) -> int:
    if not isinstance(number, int) or abs(number) > _LARGEST_ARGUMENT:
        raise SecurityError(f"an argument that is not a number up to {_LARGEST_ARGUMENT} is unsafe")
    return abs(number)


# The allowed filters, each with the check that precedes it if its result can be larger than its operand.
FILTERS: dict[str, Callable[..., None] | None] = dict.fromkeys((
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "int", "items", "last",
    "length", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe", "select", "selectattr",
    "string", "title", "trim", "upper",
)) | {
    "format": _check_format, "indent": _check_indent, "join": _check_join, "list": _check_items,
    "replace": _check_replace, "round": _check_round, "sort": _check_items, "sum": _check_sum, "tojson": _check_json,
    "unique": _check_unique,
}  # fmt: skip

REPLACED: dict[str, Callable[..., Any]] = {"tojson": tojson}

# Those that take a list as a list of objects, not of texts.
SHALLOW = frozenset({
    "count", "d", "default", "first", "items", "last", "length", "list", "map", "reject", "rejectattr", "reverse",
    "safe", "select", "selectattr",
})  # fmt: skip

TESTS = (
    "boolean", "callable", "defined", "divisibleby", "even", "false", "float", "integer", "iterable", "lower",
    "mapping", "none", "number", "odd", "sameas", "sequence", "string", "true", "undefined", "upper",
    "==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge", "<", "lt", "lessthan", "<=", "le", "in",
)  # fmt: skip

GLOBALS: dict[str, Callable[..., Any]] = {
    "dict": make_dict,
    "namespace": ValueNamespace,
    "range": make_range,
    "raise_exception": raise_exception,
    "strftime_now": strftime_now,
}
