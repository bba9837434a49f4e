"""Arrays, attention and patching as TransformerLens has them, by its names: tests/data/make_transformer_lens.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ruvllm import lab
from ruvllm.checkpoint.tokenizer import load_tokenizer
from ruvllm.llm import LLM
from tests.llm_cases import write_byte_tokenizer
from tests.model import tiny_checkpoints
from tests.model.model_cases import load

DATA = Path(__file__).parents[1] / "data" / "transformer_lens"


@pytest.mark.parametrize(("variant", "layers"), [("llama3", 3), ("qwen2", 4)])
def test_arrays_and_patching(variant: str, layers: int, tmp_path: Path) -> None:
    model = load(
        tiny_checkpoints.write_checkpoint(tmp_path / "model", tiny_checkpoints.read(variant)), "f32", threads=1
    )
    llm = LLM(model, load_tokenizer(write_byte_tokenizer(tmp_path)), tmp_path)
    with np.load(DATA / f"{variant}.npz") as file:
        expected = dict(file)
    ids, corrupted, targets, patched = (expected.pop(n) for n in ("ids", "corrupted", "targets", "patched"))
    with llm.trace(ids) as t:
        t.keep("blocks.*", "ln_final.hook_normalized")
    assert len(expected) == 13 * layers + 1
    for name, array in expected.items():
        np.testing.assert_allclose(t[name], array, rtol=0, atol=1e-4, err_msg=name)
    found = lab.patch(llm, ids, corrupted, at="blocks.*.hook_resid_pre", metric=tuple(map(int, targets)))  # type: ignore[arg-type]
    np.testing.assert_allclose(found.values, patched, rtol=0, atol=1e-4)
    assert np.ptp(patched) > 1
