"""Every row of the table of bad input: whole models with one thing wrong here, damaged files in the tests beside."""

from __future__ import annotations

from pathlib import Path

import pytest

from ruvllm.errors import ModelFormatError
from tests import llm_cases
from tests.checkpoint import corpus
from tests.checkpoint.hostile_models import HostileModel, hostile_adapters, hostile_models, read_adapter, read_all
from tests.model import tiny

CASES, ADAPTERS = hostile_models(), hostile_adapters()


@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_model(case: HostileModel, mmap: bool, tmp_path: Path) -> None:
    path = case.write(tmp_path)
    with pytest.raises(ModelFormatError) as caught:
        read_all(path, mmap)
    error = caught.value
    assert case.says in str(error)
    assert str(error).startswith(error.path) and str(error).isprintable() and len(str(error)) < 2000
    assert Path(error.path).is_relative_to(path) and error.path.endswith(case.at)
    assert error.field and str(error.expected)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("case", ADAPTERS, ids=str)
def test_adapter(case: HostileModel, tmp_path: Path) -> None:
    path = case.write(tmp_path)
    with pytest.raises(ModelFormatError) as caught:
        read_adapter(path)
    assert case.says in str(caught.value)
    assert str(caught.value).isprintable() and str(caught.value.path).endswith(case.at)


def test_no_row_is_forgotten() -> None:
    rows = {case.row for case in CASES + ADAPTERS}
    rows |= {case.row for case in [*corpus.hostile_gguf(), *corpus.hostile_safetensors()]}
    prefixes = {3}  # test_gguf.test_row03_every_prefix
    assert rows | prefixes == set(range(1, 52))


@pytest.mark.parametrize("case", tiny.CASES)
def test_sound_models_are_read(case: str, tmp_path: Path) -> None:
    """So that the others are refused for what is wrong with them."""
    read_all(tiny.write_gguf(case, tmp_path / "model.gguf"), mmap=True)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_every_prefix_of_a_json_file(name: str, tmp_path: Path) -> None:
    """Whether cut in the middle of a character, a string or an object: refused, and this file is named."""
    model = llm_cases.write_directory(tmp_path / "model")
    read_all(model, mmap=True)
    whole = (model / name).read_bytes().rstrip()
    step = max(1, len(whole) // 500)
    for length in range(0, len(whole), step):
        (model / name).write_bytes(whole[:length])
        with pytest.raises(ModelFormatError) as caught:
            read_all(model, mmap=False)
        assert caught.value.path == str(model / name)
