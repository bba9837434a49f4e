"""Tiny models with one thing changed, in either format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.hostile_models import edit_config, rewrite_gguf


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """edited(case, key=value, ...): a copy of a case with changes to config.json; `...` deletes a key."""

    def edit(case: str = "llama2_mha", **changes: Any) -> Path:
        return edit_config(tmp_path, case, **changes)

    return edit


@pytest.fixture
def rewritten(tmp_path: Path) -> Callable[..., Path]:
    """rewritten(metadata, tensors, case): a case as GGUF with changes to either; None deletes."""

    def rewrite(
        metadata: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None, case: str = "llama2_mha"
    ) -> Path:
        return rewrite_gguf(tmp_path, metadata, tensors, case)

    return rewrite
