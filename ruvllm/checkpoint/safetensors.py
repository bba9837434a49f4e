"""safetensors files, alone or sharded over a directory: validated structure and tensors, memory-mapped or read.

A file is 8 bytes of header length, a JSON header and the data, which the tensors must cover without overlap or gap.
Source: the format description of the safetensors project.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ruvllm.checkpoint.source import Closing, Identity, Source
from ruvllm.checkpoint.storage import SAFETENSORS_BITS
from ruvllm.checkpoint.strict_json import parse_json_object, read_json_object
from ruvllm.checkpoint.tensor import Tensor, TensorInfo
from ruvllm.errors import ModelFormatError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The format allows 100 MB, which Python would need several seconds and a gigabyte to parse; 30 000 tensors, more than
# any published file has, need 4 MB.
MAX_HEADER_BYTES = 6_000_000
_MAX_INDEX_BYTES = 6_000_000
_MAX_AXES = 8
_MAX_SHARDS = 1000
_MAX_SIZE = (1 << 63) - 1
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class SafetensorsFile(Closing):
    """One safetensors file whose structure has been validated.

    Attributes:
        path: as given.
        metadata: the header's ``__metadata__``, str -> str.
        tensors: name -> TensorInfo, in the header's order. ``TensorInfo.type`` may be a type that exists in the format
            but cannot be decoded ("I64", "F8_E4M3"): such a tensor is listed, and refused on access.
        identities: of the file.

    Args:
        path: the file.
        mmap: map the file (nothing is copied, but a file that shrinks meanwhile kills the process with SIGBUS),
            or else read each tensor on demand.

    Raises:
        FileNotFoundError: there is no such file.
        ModelFormatError: it is not a sound safetensors file; a pickle is refused by name.
    """

    def __init__(self, path: str | os.PathLike[str], mmap: bool = True) -> None:
        _refuse_pickle(Path(path))
        self._source = Source(path, mmap=mmap)
        self.identities = [self._source.identity]
        try:
            self.path = self._source.path
            header, data_start = _read_header(self._source)
            self.metadata: dict[str, str] = _metadata(self.path, header.pop("__metadata__", {}))
            self.tensors: dict[str, TensorInfo] = {
                name: _describe(self.path, name, entry, data_start) for name, entry in header.items()
            }
            _check_cover(self.path, self.tensors, data_start, self._source.size)
        except BaseException:
            self._source.close()
            raise

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name.

        Raises:
            KeyError: the file has none of this name.
            ModelFormatError: it has, in a type that cannot be decoded.
        """
        return Tensor(self.tensors[name], self._source)

    def stored(self, name: str) -> tuple[TensorInfo, Source]:
        """A tensor of any type, as stored. Raises KeyError when there is none of this name."""
        return self.tensors[name], self._source

    def close(self) -> None:
        """Close the file; arrays taken from a mapped file stay valid."""
        self._source.close()


class SafetensorsIndex(Closing):
    """The shards of one model as one file, with the attributes and methods of SafetensorsFile.

    Args:
        path: a ``model.safetensors.index.json``; the shards that it names must be in its directory and hold exactly
            the tensors that it says they hold.
        mmap: as for SafetensorsFile.

    Raises:
        FileNotFoundError: there is no index of this name.
        ModelFormatError: index or a shard is unsound, a shard is missing, or they contradict each other.
    """

    def __init__(self, path: str | os.PathLike[str], mmap: bool = True) -> None:
        self.path = os.fspath(path)
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self.identities: list[Identity] = []
        self._shard_of: dict[str, SafetensorsFile] = {}
        with ExitStack() as opened:
            for shard_name, names in shards_of(self.path).items():
                try:
                    shard = SafetensorsFile(Path(self.path).parent / shard_name, mmap)
                except FileNotFoundError:
                    found = f"no file {shard_name!r} next to it"
                    raise ModelFormatError(self.path, field="weight_map", found=found, expected="every shard") from None
                opened.callback(shard.close)
                _check_shard(self.path, shard_name, names, set(shard.tensors))
                self.tensors.update(shard.tensors)
                self.metadata.update(shard.metadata)
                self.identities += shard.identities
                self._shard_of.update(dict.fromkeys(shard.tensors, shard))
            self._opened = opened.pop_all()  # all is well: keep them open

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name; KeyError and ModelFormatError as for SafetensorsFile."""
        return self._shard_of[name].tensor(name)

    def stored(self, name: str) -> tuple[TensorInfo, Source]:
        """A tensor of any type, as stored. Raises KeyError when there is none of this name."""
        return self._shard_of[name].stored(name)

    def close(self) -> None:
        """Close the files; arrays taken from mapped files stay valid."""
        self._opened.close()


def open_safetensors(path: str | os.PathLike[str], mmap: bool = True) -> SafetensorsFile | SafetensorsIndex:
    """The weights at ``path``: a .safetensors file, an index.json, or a directory that holds ``model.safetensors`` or
    ``model.safetensors.index.json`` (the former first, as transformers does).

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ModelFormatError: the weights are unsound, or there are none but pickles, which could execute anything.
    """
    place = Path(path)
    if not place.is_dir():
        return SafetensorsIndex(place, mmap) if place.name.endswith(".json") else SafetensorsFile(place, mmap)
    for name, reader in ((SINGLE_FILE, SafetensorsFile), (INDEX_FILE, SafetensorsIndex)):
        if (place / name).exists():
            return reader(place / name, mmap)
    for pickle in _pickles_in(place):
        _refuse_pickle(pickle)
    expected = f"{SINGLE_FILE} or {INDEX_FILE}"
    raise ModelFormatError(place, field="directory", found="no safetensors weights", expected=expected)


def _pickles_in(directory: Path) -> Iterator[Path]:
    # "pytorch_model.bin.index.json" goes with "pytorch_model-00001-of-00002.bin", which is found here.
    return (entry for entry in sorted(directory.iterdir()) if entry.suffix in PICKLES)


def _refuse_pickle(path: Path) -> None:
    if path.suffix in PICKLES:
        found = f"the pickle {path.name!r}, whose loading can execute anything"
        raise ModelFormatError(path, field="file", found=found, expected="weights in safetensors or GGUF")


def _read_header(source: Source) -> tuple[dict[str, Any], int]:
    """The header's JSON object and the position of the data after it."""

    def fail(field: str, found: object, expected: object) -> ModelFormatError:
        return ModelFormatError(source.path, field=field, found=found, expected=expected, offset=0)

    if source.size < 8:
        raise fail("header length", f"a file of {source.size} bytes", "8 bytes of it")
    length = int.from_bytes(source.read(0, 8).tobytes(), "little")
    if length > MAX_HEADER_BYTES:
        raise fail("header length", length, f"at most {MAX_HEADER_BYTES}")
    if not 2 <= length <= source.size - 8:
        raise fail("header length", length, f"2 to the {source.size - 8} bytes that follow")
    if source.read(8, 1)[0] != ord("{"):
        raise ModelFormatError(source.path, field="header", found="no '{'", expected="a JSON object", offset=8)
    return parse_json_object(source.read(8, length).tobytes(), source.path, "header", 8), 8 + length


def _metadata(path: str, metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        found = reprlib.repr(metadata)
        raise ModelFormatError(path, field="__metadata__", found=found, expected="strings under names", offset=8)
    return metadata


def _describe(path: str, name: str, entry: Any, data_start: int) -> TensorInfo:
    """Type, shape and place of one tensor, its own numbers checked against each other."""
    field = f"tensor {name!r}"

    def fail(what: str, found: object, expected: object) -> ModelFormatError:
        return ModelFormatError(path, field=f"{field} {what}".rstrip(), found=found, expected=expected, offset=8)

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise fail("", reprlib.repr(entry), "an object of dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in SAFETENSORS_BITS:
        raise fail("dtype", f"the unknown type {reprlib.repr(kind)}", "one of " + ", ".join(SAFETENSORS_BITS))
    if not _are_sizes(shape) or len(shape) > _MAX_AXES:
        raise fail("shape", reprlib.repr(shape), f"at most {_MAX_AXES} integers from 0 to {_MAX_SIZE}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fail("data_offsets", reprlib.repr(offsets), "[begin, end] with begin <= end")
    bits = math.prod(shape) * SAFETENSORS_BITS[kind]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise fail("data_offsets", f"{offsets[1] - offsets[0]} bytes", f"{bits} bits for {kind} {shape}")
    return TensorInfo(name, tuple(shape), kind, data_start + offsets[0], offsets[1] - offsets[0])


def _are_sizes(values: object) -> bool:
    # type() and not isinstance(): JSON's true is an int to Python
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= _MAX_SIZE for value in values)


def _check_cover(path: str, tensors: dict[str, TensorInfo], data_start: int, size: int) -> None:
    """Check that the tensors fill the file from the header's end, without gap or overlap."""
    expected = data_start
    for info in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if info.offset != expected:
            fault = "overlaps the one before" if info.offset < expected else "leaves a hole before it"
            raise ModelFormatError(
                path,
                field=f"tensor {info.name!r} data_offsets",
                found=f"{info.offset - data_start}, which {fault}",
                expected=expected - data_start,
                offset=info.offset,
            )
        expected += info.nbytes
    if expected != size:
        raise ModelFormatError(path, field="file size", found=size, expected=f"{expected} bytes", offset=data_start)


def shards_of(path: str) -> dict[str, set[str]]:
    """Shard file -> the tensors that an index.json says it holds, in order of first mention.

    Raises: ModelFormatError; FileNotFoundError if there is no index.
    """

    def fail(found: object, expected: object) -> ModelFormatError:
        return ModelFormatError(path, field="weight_map", found=found, expected=expected)

    weight_map = read_json_object(path, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise fail(reprlib.repr(weight_map), "an object of tensor name -> shard")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise fail(f"the shard {shard!r}", "the name of a .safetensors file next to the index")
        shards.setdefault(shard, set()).add(name)
    if len(shards) > _MAX_SHARDS:
        raise fail(f"{len(shards)} shards", f"at most {_MAX_SHARDS}")
    return shards


def _is_plain_name(shard: str) -> bool:
    # No separator of any system, no drive, no "..": the file can only be in the index's directory.
    return shard.endswith(".safetensors") and not any(mark in shard for mark in ("/", "\\", ":", "\0", ".."))


def _check_shard(path: str, shard: str, named: set[str], held: set[str]) -> None:
    for missing, where in ((named - held, "which that shard does not hold"), (held - named, "which only it holds")):
        if missing:
            found = f"{len(missing)} tensors {where}, {min(missing)!r} among them"
            raise ModelFormatError(path, field=f"weight_map of {shard!r}", found=found, expected="the same tensors")
