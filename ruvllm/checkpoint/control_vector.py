"""Control vectors: one direction for each layer, in GGUF files as llama.cpp reads and writes them.

The tensor ``direction.N`` (F32, of the model's width) is added to the residual stream after layer N, counted from 0.
The format has no place for layer 0.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ruvllm.checkpoint.families import BY_TYPE
from ruvllm.checkpoint.fields import Fields
from ruvllm.checkpoint.gguf import GGUFFile
from ruvllm.checkpoint.gguf_writer import Described, encoded, pad, write_header
from ruvllm.errors import ModelFormatError
from ruvllm.model.config import ModelConfig
from ruvllm.paths import replacing

_ARCHITECTURE = "controlvector"
_NAME = re.compile(r"direction\.(0|[1-9]\d{0,5})")


def save_control_vector(path: str | os.PathLike[str], directions: Mapping[int, np.ndarray], model: ModelConfig) -> Path:
    """Write the directions (E,) of layers 1 and above; that of layer 0 is left out. The file appears when complete.

    Raises:
        ValueError: there is no layer above 0.
        OSError: it cannot be written; what was there before stays.
    """
    rows = {
        f"direction.{layer}": np.ascontiguousarray(directions[layer], "<f4") for layer in sorted(directions) if layer
    }
    if not rows:
        raise ValueError(f"directions: expected some of layers 1 and above, found layers {sorted(directions)}")
    metadata = {
        "general.architecture": encoded(_ARCHITECTURE),
        "controlvector.model_hint": encoded(BY_TYPE[model.model_type].architecture),
        "controlvector.layer_count": encoded(len(rows)),
    }
    with replacing(path) as temporary, open(temporary, "wb") as file:
        write_header(file, metadata, [Described(name, row.shape, "F32") for name, row in rows.items()])
        for row in rows.values():
            file.write(row.data)
            pad(file)
    return Path(path)


def load_control_vector(path: str | os.PathLike[str], model: ModelConfig) -> dict[int, np.ndarray]:
    """The direction (E,) of each layer that the file has one for.

    Raises:
        FileNotFoundError: there is no such file.
        ModelFormatError: it is unsound, no control vector, or one of a model with other sizes.
    """
    with GGUFFile(path) as file:
        fields = Fields(file.path, file.metadata, offsets=file.metadata_offsets)
        architecture = fields.require("general.architecture", str)
        if architecture != _ARCHITECTURE:
            raise fields.error("general.architecture", architecture, f"{_ARCHITECTURE}, a control vector")
        found: dict[int, np.ndarray] = {}
        last = model.num_hidden_layers - 1
        for name, info in file.tensors.items():
            match = _NAME.fullmatch(name)
            if match is None or not 1 <= int(match[1]) <= last:
                raise ModelFormatError(file.path, field="tensor", found=name, expected=f"direction.1 to .{last}")
            if info.shape != (model.hidden_size,):
                expected = f"({model.hidden_size},), the width of the model"
                raise ModelFormatError(file.path, field=f"tensor {name!r} shape", found=info.shape, expected=expected)
            row = np.array(file.tensor(name).float32().reshape(-1))
            if not np.isfinite(row).all():
                raise ModelFormatError(
                    file.path, field=f"tensor {name!r}", found="numbers that are not finite", expected="finite ones"
                )
            found[int(match[1])] = row
        if not found:
            raise ModelFormatError(file.path, field="tensors", found="none", expected=f"direction.1 to .{last}")
        return found
