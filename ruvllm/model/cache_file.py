"""Files of KV caches: a zip archive, not compressed, of a header in JSON, token ids, and each layer's arrays.

The archive's checksums tell whether a file is whole. Sizes are compared with those that the model needs before
anything is allocated.

Nothing here imports the classes of models and caches, which import it.
"""

from __future__ import annotations

import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ruvllm.errors import ModelFormatError
from ruvllm.model.checks import is_integer
from ruvllm.model.kv_size import KV_TYPES
from ruvllm.paths import replacing

_FORMAT = "ruvllm KV cache 1"
_MOST_HEADER = 1 << 16  # bytes
_FIELDS: dict[str, type] = {
    "format": str, "model": str, "byteorder": str, "kv": str, "max_tokens": int, "length": int, "reach": int
}  # fmt: skip


def save_cache(model: Any, cache: Any, path: str | os.PathLike[str]) -> None:
    """Write the tokens of a cache that has some with their keys and values; the file appears when it is complete.

    Raises:
        ValueError: the tokens were computed with other weights or adapters than those that are active now, or with
            edits.
        OSError: the file cannot be written; what was there before stays.
    """
    cache.claim(model)
    if not cache.filled_with(model.filling) or len(model.filling) > 2:
        raise ValueError("cache: expected tokens of the adapters that are active, without edits, found others")
    header = {
        "format": _FORMAT, "model": model.identity(), "byteorder": sys.byteorder, "kv": cache.dtype,
        "max_tokens": cache.max_tokens, "length": cache.length, "reach": cache.reach,
    }  # fmt: skip
    with replacing(_path(path)) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("header.json", json.dumps(header))
        archive.writestr("ids", cache.ids[: cache.length].tobytes())
        for layer, (keys, values) in enumerate(cache.filled()):
            for name, arrays in (("keys", keys), ("values", values)):
                with archive.open(f"{name}/{layer}", "w", force_zip64=True) as file:
                    for array in arrays:
                        file.write(array.data.cast("B"))


def load_cache(model: Any, path: str | os.PathLike[str], max_tokens: int | None = None) -> Any:
    """Read a file that ``save_cache`` wrote for the same model; ``max_tokens`` of the cache: as it had if None.

    Raises:
        FileNotFoundError: there is no such file.
        ModelFormatError: it is unsound, cut off, or of another model, other adapters or another machine.
        TypeError: path is neither text nor a path.
        ValueError: max_tokens is less than the file's tokens need, or changes the model's rotary embedding.
    """
    where = _path(path)
    if max_tokens is not None and not is_integer(max_tokens):
        raise ValueError(f"max_tokens: expected an integer or None, found {max_tokens!r:.60}")
    try:
        with zipfile.ZipFile(where) as archive:
            return _read(archive, model, where, max_tokens)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, KeyError) as error:
        raise ModelFormatError(where, field="archive", found=error, expected="a whole file of a KV cache") from None


def _path(given: str | os.PathLike[str]) -> Path:
    if not isinstance(given, str | os.PathLike):
        raise TypeError(f"path: expected that of a file, found {given!r:.60}")
    return Path(given)


def _read(archive: zipfile.ZipFile, model: Any, path: Path, max_tokens: int | None) -> Any:
    header = _header(archive, path)
    for name, expected in (("format", _FORMAT), ("byteorder", sys.byteorder), ("model", model.identity())):
        if header[name] != expected:
            raise ModelFormatError(path, field=name, found=header[name], expected=f"{expected}, of this model")
    if header["kv"] not in KV_TYPES:
        raise ModelFormatError(path, field="kv", found=header["kv"], expected=" or ".join(KV_TYPES))
    length, reach, before = header["length"], header["reach"], header["max_tokens"]
    if not 0 < length <= reach <= before <= model.config.max_position_embeddings:
        found = f"{length} tokens of {reach} in a cache for {before}"
        raise ModelFormatError(path, field="length", found=found, expected="what this model takes")
    most = before if max_tokens is None else max_tokens
    if most < length:
        raise ValueError(f"max_tokens: expected at least {length}, the tokens of the file, found {most}")
    if model.rope.kinds(most) != model.rope.kinds(before):
        raise ValueError(f"max_tokens: expected {before}: this model's rotary embedding depends on it, found {most}")
    cache = model.new_cache(most, header["kv"])
    cache.claim(model)
    cache.expect(length, reach, before)
    _fill(archive, "ids", path, [cache.ids[:length]])
    for layer, (keys, values) in enumerate(cache.filled()):
        _fill(archive, f"keys/{layer}", path, keys)
        _fill(archive, f"values/{layer}", path, values)
    if cache.ids[:length].min() < 0 or cache.ids[:length].max() >= model.config.vocab_size:
        raise ModelFormatError(path, field="ids", found="an id outside the vocabulary", expected="token ids")
    cache.refill(model.filling)
    return cache


def _header(archive: zipfile.ZipFile, path: Path) -> dict[str, Any]:
    info = archive.getinfo("header.json")
    if info.file_size > _MOST_HEADER:
        raise ModelFormatError(path, field="header", found=f"{info.file_size} bytes", expected=f"up to {_MOST_HEADER}")
    try:
        header = json.loads(archive.read(info))
    except ValueError:
        raise ModelFormatError(path, field="header", found="no JSON", expected="an object") from None
    for name, kind in _FIELDS.items():
        value = header.get(name) if isinstance(header, dict) else None
        if type(value) is not kind:
            raise ModelFormatError(path, field=f"header {name!r}", found=repr(value), expected=kind.__name__)
    return header


def _fill(archive: zipfile.ZipFile, name: str, path: Path, arrays: list[np.ndarray]) -> None:
    """Read an entry into arrays, one after the other."""
    info, expected = archive.getinfo(name), sum(array.nbytes for array in arrays)
    if info.file_size != expected or info.compress_type != zipfile.ZIP_STORED:
        raise ModelFormatError(path, field=name, found=f"{info.file_size} bytes", expected=f"{expected}, stored")
    with archive.open(info) as file:
        for array in arrays:
            array[...] = np.frombuffer(file.read(array.nbytes), array.dtype).reshape(array.shape)
        file.read()  # at the end of the entry, its checksum is compared
