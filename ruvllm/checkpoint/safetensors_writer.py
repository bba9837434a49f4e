"""Writes a safetensors file: named float32 arrays, written atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import numpy as np

from ruvllm.paths import replacing

_ALIGNMENT = 8  # of the data, as the format's own writer pads its header


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``tensors`` as F32 under their names. The file appears when it is complete.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    arrays = {name: np.ascontiguousarray(tensors[name], "<f4") for name in sorted(tensors)}
    at = 0
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    raw = json.dumps(header, ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for array in arrays.values():
            file.write(array.data)
