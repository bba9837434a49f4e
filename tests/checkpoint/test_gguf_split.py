"""GGUF models in several files: written by gguf-py as converters do, and whatever may be wrong with their parts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ruvllm.checkpoint.gguf import GGUFFile
from ruvllm.checkpoint.gguf_split import SplitGGUFFile, SplitName, open_gguf, part_name, split_name
from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.checkpoint.tokenizer import load_tokenizer
from ruvllm.errors import ModelFormatError
from ruvllm.quantizing import quantize
from tests.checkpoint.checks import close_to_golden
from tests.checkpoint.gguf_parts import PARTS, contents, write_file, write_parts
from tests.model import tiny

CASE = "llama3_scaled_gqa"  # its rotary factors are a tensor, in the last part


@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
@pytest.mark.parametrize("empty_first", [False, True])
def test_parts_are_the_model_that_was_cut(tmp_path: Path, mmap: bool, empty_first: bool) -> None:
    """With tensors in the first part, and as `llama-gguf-split --no-tensor-first-split` writes them."""
    path = write_parts(CASE, tmp_path, empty_first=empty_first)
    with open_checkpoint(path, mmap=mmap) as parts, open_checkpoint(tmp_path / "whole.gguf", mmap=mmap) as whole:
        assert isinstance(parts.tokenizer_source, SplitGGUFFile)
        assert (parts.config, parts.names(), parts.weight_dtypes) == (whole.config, whole.names(), whole.weight_dtypes)
        for name in whole.names():
            np.testing.assert_array_equal(parts.tensor(name).raw(), whole.tensor(name).raw())
        close_to_golden(parts, CASE)
        tokenizers = [load_tokenizer(c.tokenizer_source, c.config.vocab_size) for c in (parts, whole)]
        assert tokenizers[0].encode("the 1st") == tokenizers[1].encode("the 1st")


def test_parts_become_one_file_again(tmp_path: Path) -> None:
    """Quantised, they give the bytes that the model in one file gives: nothing of `split.*` is left."""
    path = write_parts(CASE, tmp_path)
    write_file(tmp_path / "one.gguf", *contents(tmp_path / "whole.gguf"))
    one, other = (quantize(p, tmp_path / f"{n}.q8", "q8_0") for n, p in enumerate((path, tmp_path / "one.gguf")))
    assert one.read_bytes() == other.read_bytes()


def test_parts_of_another_alignment(tmp_path: Path) -> None:
    def align(number: int, metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        metadata["general.alignment"] = 64 if number == 1 else 128

    with open_checkpoint(write_parts(CASE, tmp_path, align)) as checkpoint:
        close_to_golden(checkpoint, CASE)


def test_one_part_of_one_is_a_file_like_any(tmp_path: Path) -> None:
    path = tiny.write_gguf(CASE, tmp_path / "model.gguf")
    values, arrays = contents(path)
    for count in (0, 1):
        write_file(tmp_path / "one.gguf", values | {"split.count": np.uint16(count)}, arrays)
        with open_gguf(tmp_path / "one.gguf") as file:
            assert isinstance(file, GGUFFile)


def _set(part: int, **values: Any) -> Callable[[int, dict[str, Any], dict[str, Any]], object]:
    named = {key.replace("__", "."): value for key, value in values.items()}
    return lambda number, metadata, tensors: metadata.update(named) if number == part else None


def _first_tensor_twice(number: int, metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
    if number == 2:
        tensors.pop(next(iter(tensors)))
        tensors["token_embd.weight"] = np.ones((2, 32), np.float32)


def _without(part: int, key: str) -> Callable[[int, dict[str, Any], dict[str, Any]], object]:
    return lambda number, metadata, tensors: metadata.pop(key) if number == part else None


@pytest.mark.parametrize(
    ("change", "says", "at"),
    [
        (_set(0, split__count=np.uint16(4)), "ends in -00001-of-00004.gguf", 0),
        (_set(0, split__count=np.uint16(1001)), "split.count: found 1001, expected 1 to 1000", 0),
        (_set(0, split__count=-1), "split.count: found -1", 0),
        (_set(0, split__count="3"), "split.count: found '3' (str)", 0),
        (_set(0, split__no=np.uint16(1)), "split.no: found 1, expected 0, the first part: open ", 0),
        (_without(0, "split.no"), "split.no: found no such key", 0),
        (_without(0, "split.tensors.count"), "split.tensors.count: found no such key", 0),
        (_set(0, split__tensors__count=1 << 30), "split.tensors.count: found 1073741824", 0),
        (_without(2, "split.tensors.count"), None, 0),
        (_set(1, split__no=np.uint16(2)), "split.no: found 2, expected 1, as tiny-00001-of-00003.gguf has it", 1),
        (_without(1, "split.no"), "split.no: found no such key", 1),
        (_set(2, split__count=np.uint16(4)), "split.count: found 4, expected 3", 2),
        (_set(2, split__tensors__count=99), "split.tensors.count: found 99", 2),
        (_set(2, general__name="another"), "general.name: found a value that the first part does not have", 2),
        (_set(1, llama__block_count=2), None, 1),
        (_set(1, llama__block_count=3), "llama.block_count: found a value that the first part does not have", 1),
        (_set(2, some__list=["a", "b"]), "some.list: found a value that the first part does not have", 2),
        (_first_tensor_twice, "'token_embd.weight': found one that tiny-00001-of-00003.gguf holds too", 2),
        (lambda n, m, t: n == 1 and t.popitem(), "split.tensors.count: found 22, expected 21 tensors", 0),
        (lambda n, m, t: n == 1 and t.update(more=np.ones(2, np.float32)), "found 22, expected 23 or more", 0),
    ],
)  # fmt: skip
def test_parts_that_do_not_belong_together(
    tmp_path: Path, change: Callable[..., object], says: str | None, at: int
) -> None:
    path = write_parts(CASE, tmp_path, change)
    if says is None:
        open_gguf(path).close()
        return
    for mmap in (True, False):
        with pytest.raises(ModelFormatError) as caught:
            open_gguf(path, mmap)
        assert says in str(caught.value)
        assert Path(caught.value.path).name == part_name("tiny", at, PARTS)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    path = write_parts(CASE, tmp_path)
    (tmp_path / part_name("tiny", 1, PARTS)).unlink()
    with pytest.raises(ModelFormatError, match=r"found no file 'tiny-00002-of-00003\.gguf' next to it"):
        open_checkpoint(path)


def test_another_part_than_the_first_says_which_to_open(tmp_path: Path) -> None:
    write_parts(CASE, tmp_path)
    with pytest.raises(ModelFormatError, match=r"split\.no.*found 1.*open .*tiny-00001-of-00003\.gguf"):
        open_checkpoint(tmp_path / part_name("tiny", 1, PARTS))


def test_a_first_part_of_another_name(tmp_path: Path) -> None:
    path = write_parts(CASE, tmp_path)
    shutil.copy(path, tmp_path / "renamed.gguf")
    with pytest.raises(ModelFormatError, match=r"file name: found renamed\.gguf, expected .* -00001-of-00003\.gguf"):
        open_checkpoint(tmp_path / "renamed.gguf")


def test_every_part_is_checked_like_a_file_of_its_own(tmp_path: Path) -> None:
    path = write_parts(CASE, tmp_path)
    second = tmp_path / part_name("tiny", 1, PARTS)
    whole = second.read_bytes()
    for length in (0, 10, 100, len(whole) - 40):
        second.write_bytes(whole[:length])
        with pytest.raises(ModelFormatError) as caught:
            open_checkpoint(path)
        assert caught.value.path == str(second)


def test_names_of_parts() -> None:
    assert split_name("a/b-00002-of-00003.gguf") == SplitName("a/b", 1, 3)
    assert part_name("a/b", 1, 3) == "a/b-00002-of-00003.gguf"
    for other in ("a.gguf", "a-00000-of-00003.gguf", "a-00004-of-00003.gguf", "a-1-of-3.gguf", "-00001-of-00003.gguf"):
        assert split_name(other) is None
