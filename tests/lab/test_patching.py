"""lab.patch against runs from the beginning with the same array put in place."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from ruvllm import lab
from ruvllm.llm import LLM
from tests.llm_cases import CONFIG, byte_llm

CLEAN, CORRUPTED = "When Ann saw", "When Bob saw"


@pytest.mark.parametrize(
    "at", ["layers.*.residual", "layers.*.attention.heads", "blocks.1.hook_mlp_out", "layers.*.heads.2"]
)
def test_each_patch_is_a_run_from_the_beginning(llm: LLM, at: str) -> None:
    found = lab.patch(llm, CLEAN, CORRUPTED, at, metric=("a", "b"))
    with llm.trace(CLEAN) as clean:
        pass
    if at.endswith(".2"):
        assert found.names == ["layers.0.attention.heads.2", "layers.1.attention.heads.2"]
    else:
        assert found.names == llm.names().matching(at)
    assert found.tokens == list(CORRUPTED)
    assert found.values.shape == (len(found.names), 12)
    for row, name in enumerate(found.names):
        for position in range(12):
            value = clean[name.removesuffix(".2")][position]
            with llm.edit(name, value[2] if name.endswith(".2") else value, positions=position):
                logits = llm.logits(llm.tokenizer.encode(CORRUPTED))[-1]
            assert found.values[row, position] == logits[97] - logits[98]


def test_the_changed_tokens_restore_the_clean_run(llm: LLM) -> None:
    one = lab.patch(llm, "When A saw", "When B saw", metric=lambda logits: float(logits[5] ** 2))
    assert one.values[0, 5] == one.clean != one.corrupted and one.restored[0, 5] == 1
    np.testing.assert_array_equal(one.values[0, [0, 1, 2, 3, 4, 6]], one.corrupted)
    np.testing.assert_array_equal(one.restored[:, :5], 0)  # nothing that comes before is different
    assert "restores" in str(one) and "<table>" in one._repr_html_()
    assert one.plot().get_yticklabels()[1].get_text() == "layers.1.residual"


def test_a_window_that_moved_on(tmp_path: Path) -> None:
    """Its layers have dropped what an earlier position needs: the text is computed from the beginning."""
    config = dataclasses.replace(CONFIG, sliding_window=8, max_position_embeddings=400)
    llm = byte_llm(tmp_path, threads=1, config=config)
    clean, corrupted = (f"{name}{' and then they went on' * 12}, {name} too" for name in ("Ann", "Bob"))
    with llm.trace(clean) as source, pytest.raises(ValueError, match="layers with a window"):
        source.keep("layers.1.residual")
        cache = llm.new_cache(len(source.ids))
        llm.logits(source.ids, cache)
        cache.truncate(9)
    found = lab.patch(llm, clean, corrupted, "layers.1.residual", metric=lambda logits: float(logits[3]))
    for position in (1, 9, len(clean) - 6, len(clean) - 1):
        with llm.edit("layers.1.residual", source["layers.1.residual"][position], positions=position):
            assert found.values[0, position] == llm.logits(llm.tokenizer.encode(corrupted), last_only=True)[3]
    assert found.values[0, -6] != found.corrupted


def test_what_cannot_be_patched(llm: LLM) -> None:
    with pytest.raises(ValueError, match="corrupted: expected 12 tokens, as clean has, found 13"):
        lab.patch(llm, CLEAN, CORRUPTED + "!")
    with pytest.raises(ValueError, match="metric: expected two numbers that differ, found 1.0 and 1.0"):
        lab.patch(llm, CLEAN, CORRUPTED, metric=lambda logits: 1.0)
    with pytest.raises(ValueError, match="metric: '.*' is likeliest in both runs"), llm.edit("logits", scale=0):
        lab.patch(llm, CLEAN, CORRUPTED)
    with pytest.raises(KeyError, match="no array has this name"):
        lab.patch(llm, CLEAN, CORRUPTED, at="blocks.9.*")
    with pytest.raises(ValueError, match="layers.0.attention.pattern: it is computed to be looked at"):
        lab.patch(llm, CLEAN, CORRUPTED, at="layers.*.attention.pattern")
