"""Tiny models with one thing changed, in either format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.model import tiny


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """edited(case, key=value, ...): a copy of a case with changes to config.json; `...` deletes a key."""

    def edit(case: str = "llama2_mha", **changes: Any) -> Path:
        directory = shutil.copytree(tiny.directory(case), tmp_path / "model", dirs_exist_ok=True)
        path = directory / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
        return directory

    return edit


@pytest.fixture
def rewritten(tmp_path: Path) -> Callable[..., Path]:
    """rewritten(case, metadata, tensors): a case as GGUF with changes to either; None deletes."""

    def rewrite(
        metadata: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None, case: str = "llama2_mha"
    ) -> Path:
        original = gguf.GGUFReader(tiny.write_gguf(case, tmp_path / "original.gguf"))
        path = tmp_path / "model.gguf"
        values = {key: field.contents() for key, field in original.fields.items() if not key.startswith("GGUF.")}
        values |= metadata or {}
        arrays = {tensor.name: tensor.data for tensor in original.tensors} | (tensors or {})
        writer = gguf.GGUFWriter(path, values.pop("general.architecture"))
        for key, value in values.items():
            if value is not None:
                writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
        for name, array in arrays.items():
            if array is not None:
                writer.add_tensor(name, np.ascontiguousarray(array))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return rewrite
