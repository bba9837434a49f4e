"""Tiny models cut into several GGUF files, as converters write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ruvllm.checkpoint.gguf_split import part_name
from tests.model import tiny, tiny_gguf

PARTS = 3


def write_parts(
    case: str, directory: Path, change: Callable[[int, dict[str, Any], dict[str, Any]], object] = lambda *_: None,
    empty_first: bool = False,
) -> Path:  # fmt: skip
    """A case in three files, of which the first is returned.

    ``change(number, metadata, tensors)`` alters a part before it is written.
    """
    values, tensors = contents(tiny.write_gguf(case, directory / "whole.gguf"))
    groups: list[Any] = np.array_split(list(tensors), PARTS - 1 if empty_first else PARTS)
    for number, chosen in enumerate([[], *groups] if empty_first else groups):
        metadata = dict(values) if number == 0 else {}
        metadata |= {
            "split.no": np.uint16(number), "split.count": np.uint16(PARTS), "split.tensors.count": len(tensors),
        }  # fmt: skip
        arrays = {str(name): tensors[name] for name in chosen}
        change(number, metadata, arrays)
        write_file(directory / part_name("tiny", number, PARTS), metadata, arrays)
    return directory / part_name("tiny", 0, PARTS)


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors of a file."""
    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return metadata, {tensor.name: tensor.data for tensor in reader.tensors}


def write_file(path: Path, metadata: dict[str, Any], arrays: dict[str, Any]) -> None:
    """A GGUF file of this metadata (NumPy's uint16 is kept) and these tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    if "general.architecture" not in metadata:
        del writer.kv_data[0]["general.architecture"]
    for key, value in metadata.items():
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif isinstance(value, np.uint16):
            writer.add_uint16(key, int(value))
        elif key != "general.architecture":
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, array in arrays.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    tiny_gguf.finish(writer)
