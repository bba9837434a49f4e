"""The fields of a request's body, taken one by one with the checks that the library does not do itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from ruvllm.errors import printable
from ruvllm.model.checks import is_integer
from ruvllm.serving.errors import ApiError


def parse_body(content: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises ApiError for anything else."""
    try:
        body = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(f"the body: expected a JSON object, found {type(body).__name__}", code="invalid_json")
    return body


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"found {name}")


class Fields:
    """What a body holds; null is as good as absent. ``refuse_rest`` refuses what was not taken."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.body = body
        self._left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, default: Any = None) -> Any:
        """A field, whatever it is."""
        return self._left.pop(name, default)

    def expect(self, name: str, default: Any, ok: Callable[[Any], bool], expected: str) -> Any:
        """A field of which ``ok`` holds."""
        value = self.take(name)
        if value is None:
            return default
        if not ok(value):
            raise wrong(name, expected, value)
        return value

    def flag(self, name: str) -> bool:
        """True or false."""
        return bool(self.expect(name, False, lambda v: isinstance(v, bool), "true or false"))

    def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        """An integer from ``low`` to ``high``."""
        found = self.expect(
            name, default, lambda v: is_integer(v) and low <= v <= high, f"an integer from {low} to {high}"
        )
        return None if found is None else int(found)

    def refuse_rest(self) -> None:
        """Raise ApiError for a field that nothing took."""
        for name in self._left:
            raise ApiError(
                f"Unrecognized request argument supplied: {printable(name)}", param=printable(name),
                code="unknown_parameter",
            )  # fmt: skip


def wrong(name: str, expected: str, found: object) -> ApiError:
    """An error of one field."""
    shown = printable(json.dumps(found), limit=80)
    return ApiError(f"{name}: expected {expected}, found {shown}", param=name, code="invalid_value")


def unsupported(name: str, why: str) -> ApiError:
    """An error of a field that OpenAI has and this server cannot follow."""
    return ApiError(f"{name}: {why}", param=name, code="unsupported_parameter")
