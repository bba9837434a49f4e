"""A model for ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model import tiny


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two kv heads, with a tokenizer; its rows are whole blocks of 32."""
    return tiny.write_gguf("llama3_scaled_gqa", tmp_path_factory.mktemp("model") / "model.gguf")
