"""JSON from untrusted files: one object, each key once, no NaN, bounded depth and size."""

from __future__ import annotations

import json
import os
from typing import Any, NoReturn

from ruvllm.checkpoint.source import Source
from ruvllm.errors import ModelFormatError

# Every value takes 50 to 200 bytes in Python, however few in the file.
MAX_VALUES = 1 << 18


def read_json_object(path: str | os.PathLike[str], max_bytes: int) -> dict[str, Any]:
    """The JSON object that a file of at most ``max_bytes`` holds.

    Raises:
        FileNotFoundError: there is no such file.
        ModelFormatError: not a regular file, larger, or not a single sound JSON object in UTF-8.
    """
    with Source(path, mmap=False) as source:
        if source.size > max_bytes:
            raise ModelFormatError(path, field="file size", found=source.size, expected=f"at most {max_bytes} bytes")
        return parse_json_object(source.read(0, source.size).tobytes(), path, "file", 0)


def parse_json_object(raw: bytes, path: str | os.PathLike[str], field: str, offset: int) -> dict[str, Any]:
    """The JSON object in ``raw``, bytes ``offset``... of ``path``; ``field`` names them in errors.

    Raises:
        ModelFormatError: not UTF-8, not JSON, not an object, a key twice, too deep or too many values.
    """

    def fail(found: object, expected: object, at: int = 0) -> NoReturn:
        raise ModelFormatError(path, field=field, found=found, expected=expected, offset=offset + at) from None

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in pairs:
            if key in made:
                fail(f"the key {key!r} a second time", "each key once")
            made[key] = value
        return made

    values = sum(raw.count(mark) for mark in (b",", b"[", b"{"))
    if values > MAX_VALUES:
        fail(f"about {values} JSON values", f"at most {MAX_VALUES}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        fail(f"the byte {raw[error.start]:#04x}", "UTF-8 text", error.start)
    try:
        parsed = json.loads(text, object_pairs_hook=once, parse_constant=lambda name: fail(name, "a JSON value"))
        if "\\u" in text:  # an escape may be half of a surrogate pair, which no UTF-8 output can show
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except ModelFormatError:
        raise
    except json.JSONDecodeError as error:
        fail(f"no JSON: {error.msg}", "a JSON object", len(text[: error.pos].encode("utf-8")))
    except RecursionError:
        fail("JSON nested too deep", "a JSON object")
    except UnicodeEncodeError:
        fail("half of a surrogate pair", "valid Unicode")
    except ValueError as error:  # an integer of thousands of digits
        fail(error, "a JSON object")
    if not isinstance(parsed, dict):
        fail(f"a JSON {type(parsed).__name__}", "a JSON object")
    return parsed
