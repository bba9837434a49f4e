"""Text that commands read, from arguments, files and stdin, with errors that name where it came from."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path


def read_text(given: str | None, file: str | None, what: str) -> str:
    """A prompt or document: the text given, or that of a file, or of stdin for "-" or where stdin is a pipe.

    Raises:
        ValueError: there is none, it is given twice, is not in UTF-8, or holds nothing but white space.
    """
    if given is not None and file is not None:
        raise ValueError(f"{what} given twice")
    if given is not None and given != "-":
        text, source = checked(given, what), "it"
    elif file is not None and file != "-":
        text, source = _decoded(Path(file).read_bytes(), "utf-8", file), file
    elif given is None and file is None and sys.stdin.isatty():
        raise ValueError(f"no {what}: give one as an argument, with --file, or on stdin")
    else:
        raw = getattr(sys.stdin, "buffer", None)  # None: the caller of main put text there
        text, source = sys.stdin.read() if raw is None else _decoded(raw.read(), _encoding(), "stdin"), "stdin"
    if not text.strip():
        raise ValueError(f"no {what}: {source} is empty")
    return text


def read_line() -> str:
    """The next line of stdin, "" at its end. Raises ValueError where it is not in stdin's encoding."""
    raw = getattr(sys.stdin, "buffer", None)
    return sys.stdin.readline() if raw is None else _decoded(raw.readline(), _encoding(), "stdin")


def checked(text: str, source: str) -> str:
    """A typed text. Raises ValueError if it has bytes that Python could not decode and kept."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # as lone surrogates
        before = len(text[: error.start].encode())
        raise _undecodable(ord(text[error.start]) & 0xFF, before, "UTF-8", source) from None
    return text


def _encoding() -> str:
    """stdin's encoding, but UTF-8 where the locale's is ASCII."""
    name = codecs.lookup(sys.stdin.encoding).name
    return "utf-8" if name == "ascii" else name


def _decoded(content: bytes, encoding: str, source: str) -> str:
    """The text, with "\n" for any system's line ends."""
    try:
        return content.decode(encoding).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise _undecodable(content[error.start], error.start, encoding.upper(), source) from None


def _undecodable(byte: int, position: int, encoding: str, source: str) -> ValueError:
    return ValueError(f"{source}: expected a text in {encoding}, found byte {byte:#04x} at {position}")
