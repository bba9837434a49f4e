"""GGUF models in several files, as `llama-gguf-split` writes them: ``name-00001-of-00003.gguf`` and its siblings.

The first part has all of the metadata, each has some of the tensors. Every part is opened and checked like a single
file; this module checks that they are all the parts of one model.
"""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from ruvllm.checkpoint.fields import Fields
from ruvllm.checkpoint.gguf import GGUFFile
from ruvllm.checkpoint.gguf_header import MAX_ENTRIES
from ruvllm.checkpoint.source import Closing
from ruvllm.checkpoint.tensor import Tensor, TensorInfo
from ruvllm.errors import ModelFormatError

MAX_PARTS = 1000

_NAME = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<parts>[0-9]{5})\.gguf", re.DOTALL)
_SPLIT = "split."
_OF_ONE_FILE = ("general.alignment",)  # the layout of a file, which its reader has used


class SplitName(NamedTuple):
    """The path of a part: ``stem``, its number from 0, and the number of parts."""

    stem: str
    number: int
    parts: int


def split_name(path: str) -> SplitName | None:
    """The SplitName of a part's path; None for any other path."""
    match = _NAME.fullmatch(path)
    if match is None or not 1 <= int(match["number"]) <= int(match["parts"]):
        return None
    return SplitName(match["stem"], int(match["number"]) - 1, int(match["parts"]))


def part_name(stem: str, number: int, parts: int) -> str:
    """The path of a part; see SplitName."""
    return f"{stem}-{number + 1:05d}-of-{parts:05d}.gguf"


class SplitGGUFFile(Closing):
    """The parts of one model as one file, with the attributes and methods of GGUFFile.

    Args:
        first: the first part, open; it is closed with the others, also where they are refused.
        mmap: as for GGUFFile.

    Raises:
        ModelFormatError: a part is missing, unsound or of another model, or it is not the first that was opened.
    """

    def __init__(self, first: GGUFFile, mmap: bool = True) -> None:
        self.path = first.path
        self.version = first.version
        with ExitStack() as opened:
            opened.callback(first.close)
            name, tensors = _first(first)
            parts = [first]
            for number in range(1, name.parts):
                part = _open(first, part_name(name.stem, number, name.parts), mmap)
                opened.callback(part.close)
                _check_part(first, part, number)
                parts.append(part)
                if sum(len(part.tensors) for part in parts) > tensors:
                    break  # refused below, without opening the others
            self._part_of: dict[str, GGUFFile] = {}
            for part in parts:
                twice = next((tensor for tensor in part.tensors if tensor in self._part_of), None)
                if twice is not None:
                    other = os.path.basename(self._part_of[twice].path)
                    raise _error(part, f"tensor {twice!r}", f"one that {other} holds too", "each tensor in one part")
                self._part_of |= dict.fromkeys(part.tensors, part)
            found = len(self._part_of)
            if found != tensors:
                more = "or more " if found > tensors else ""
                raise _error(first, "split.tensors.count", tensors, f"{found} {more}tensors, as the parts hold")
            self._opened = opened.pop_all()  # all is well: keep them open
        self._first = first
        self.identities = [part.identities[0] for part in parts]
        self.tensors: dict[str, TensorInfo] = {name: part.tensors[name] for name, part in self._part_of.items()}
        self.metadata: dict[str, Any] = {k: v for k, v in first.metadata.items() if not k.startswith(_SPLIT)}
        self.metadata_offsets = first.metadata_offsets

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name. Raises KeyError when no part has it."""
        return self._part_of[name].tensor(name)

    def metadata_bytes(self, key: str) -> bytes:
        """A metadata value as the first part has it; see GGUFFile."""
        return self._first.metadata_bytes(key)

    def close(self) -> None:
        """Close the files; arrays taken from mapped files stay valid."""
        self._opened.close()


AnyGGUF = GGUFFile | SplitGGUFFile


def open_gguf(path: str | os.PathLike[str], mmap: bool = True) -> AnyGGUF:
    """A GGUF model in one file, or in several of which ``path`` is the first.

    Raises:
        FileNotFoundError: there is no such file.
        ModelFormatError: it is not a sound GGUF file, or not the first of sound parts.
    """
    file = GGUFFile(path, mmap=mmap)
    try:
        parts = _fields(file).get("split.count", int)
    except BaseException:
        file.close()
        raise
    return file if parts is None or parts in (0, 1) else SplitGGUFFile(file, mmap)


def _fields(file: GGUFFile) -> Fields:
    return Fields(file.path, file.metadata, offsets=file.metadata_offsets)


def _error(file: GGUFFile, field: str, found: object, expected: object) -> ModelFormatError:
    return ModelFormatError(
        file.path, field=field, found=found, expected=expected, offset=file.metadata_offsets.get(field)
    )


def _first(file: GGUFFile) -> tuple[SplitName, int]:
    """The name of the first part, and how many tensors all parts have."""
    keys = _fields(file)
    count, number = keys.require("split.count", int), keys.require("split.no", int)
    if not 2 <= count <= MAX_PARTS:
        raise keys.error("split.count", count, f"1 to {MAX_PARTS} parts")
    name = split_name(file.path)
    if number != 0:
        expected = "0, the first part" + (f": open {part_name(name.stem, 0, count)}" if name is not None else "")
        raise keys.error("split.no", number, expected)
    if name is None or (name.number, name.parts) != (0, count):
        raise ModelFormatError(
            file.path, field="file name", found=os.path.basename(file.path),
            expected=f"one that ends in {part_name('', 0, count)}, since it is the first of {count} parts",
        )  # fmt: skip
    tensors = keys.require("split.tensors.count", int)
    if not 0 <= tensors <= MAX_ENTRIES:
        raise keys.error("split.tensors.count", tensors, f"0 to {MAX_ENTRIES}")
    return name, tensors


def _open(first: GGUFFile, path: str, mmap: bool) -> GGUFFile:
    try:
        return GGUFFile(path, mmap=mmap)
    except FileNotFoundError:
        found = f"no file {Path(path).name!r} next to it"
        raise _error(first, "split.count", found, "all parts of the model") from None


def _check_part(first: GGUFFile, part: GGUFFile, number: int) -> None:
    """Check a later part: it has its own number, and no metadata that differs from the first part's."""
    keys = _fields(part)
    expected = {"split.no": number, "split.count": first.metadata["split.count"]}
    if "split.tensors.count" in keys:
        expected["split.tensors.count"] = first.metadata["split.tensors.count"]
    for key, value in expected.items():
        if keys.require(key, int) != value:
            raise keys.error(key, part.metadata[key], f"{value}, as {os.path.basename(first.path)} has it")
    for key in part.metadata:
        if key.startswith(_SPLIT) or key in _OF_ONE_FILE:
            continue
        if key not in first.metadata or part.metadata_bytes(key) != first.metadata_bytes(key):
            raise keys.error(key, "a value that the first part does not have", "metadata in the first part alone")
