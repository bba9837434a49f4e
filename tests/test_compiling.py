"""Compiling beforehand: what warm-up and a first load run, for every kind of file."""

from __future__ import annotations

import pytest

from ruvllm import compiling
from ruvllm.checkpoint.storage import BLOCKS
from ruvllm.model.weights import LAYOUTS, layout_for

PLAIN = [("F32", layout) for layout in LAYOUTS]
BY_FILE = [(dtype, layout_for("auto", dtype)) for dtype in BLOCKS]


def test_warm_up_asks_for_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(compiling, "compile_for", lambda kinds, progress: asked.extend(kinds))
    monkeypatch.setattr(compiling, "compile_training", lambda layouts, progress: None)
    compiling.warmup(progress=False)
    assert set(asked) >= set(PLAIN + BY_FILE)


@pytest.mark.parametrize(("dtype", "layout"), sorted(set(PLAIN + BY_FILE)))
def test_a_tiny_model_of_every_kind_loads_and_speaks(dtype: str, layout: str) -> None:
    compiling._run_tiny_model(dtype, layout)
