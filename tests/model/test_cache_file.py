"""KV caches in files, and forks of them: what is read back is what was written, and nothing else is taken for it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ruvllm.errors import ModelFormatError
from ruvllm.model import Llama, LoraAdapter, LoraConfig, MicroLora, ModelConfig
from ruvllm.model.cache_file import load_cache
from tests.model.model_cases import SMALL, WINDOWED, small_model, text


@pytest.mark.parametrize("kv", ["f32", "int8"])
@pytest.mark.parametrize(("config", "tokens"), [(SMALL, 37), (WINDOWED, 700)])
def test_a_file_and_a_fork_go_on_as_the_cache_does(kv: str, config: ModelConfig, tokens: int, tmp_path: Path) -> None:
    model = small_model("int4", 1, config)
    cache = model.new_cache(800, kv)
    model.forward(text(tokens), cache, last_only=True)
    cache.truncate(len(cache) - 3)
    cache.save(tmp_path / "a.kv")
    read, fork = load_cache(model, tmp_path / "a.kv"), cache.fork()
    assert (len(read), read.max_tokens, read.dtype, read.oldest) == (len(cache), 800, kv, cache.oldest)
    expected = model.forward([1, 2, 3], cache)
    for other in (read, fork):
        np.testing.assert_array_equal(model.forward([1, 2, 3], other), expected)
        assert other.keep_common_prefix(np.append(text(tokens)[:-3], 5), model.filling) in (0, tokens - 3)
    np.testing.assert_array_equal(cache.ids[: len(cache) - 3], text(tokens)[:-3])
    larger = load_cache(model, tmp_path / "a.kv", max_tokens=900)
    np.testing.assert_array_equal(model.forward([1, 2, 3], larger), expected)
    assert larger.free_positions == 900 - len(cache)
    with pytest.raises(ValueError, match=f"max_tokens: expected at least {tokens - 3}"):
        load_cache(model, tmp_path / "a.kv", max_tokens=10)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Llama, Path]:
    model = small_model("f32", 1)
    cache = model.new_cache(40)
    model.forward(text(20), cache, last_only=True)
    cache.save(tmp_path / "a.kv")
    return model, tmp_path / "a.kv"


def test_files_that_are_cut_off_or_changed(saved: tuple[Llama, Path]) -> None:
    model, path = saved
    raw = path.read_bytes()
    for end in (0, 1, 100, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:end])
        with pytest.raises(ModelFormatError, match="expected a whole file of a KV cache"):
            load_cache(model, path)
    start = raw.index(b"values/0") + 200
    path.write_bytes(raw[:start] + bytes([raw[start] ^ 1]) + raw[start + 1 :])
    with pytest.raises(ModelFormatError, match="Bad CRC-32"):
        load_cache(model, path)
    path.write_bytes(b"no archive" * 100)
    with pytest.raises(ModelFormatError, match="expected a whole file"):
        load_cache(model, path)
    with pytest.raises(FileNotFoundError):
        load_cache(model, path.with_name("none"))


def rewritten(path: Path, **changes: object) -> None:
    """The same archive with other fields in its header; None leaves a field out. ``entry``: this one is left out."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries.pop(str(changes.pop("entry", "")), None)
    header = {**json.loads(entries["header.json"]), **changes}
    entries["header.json"] = json.dumps({k: v for k, v in header.items() if v is not None}).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": "another"}, "format: found another"), ({"model": "ab"}, "model: found ab"),
        ({"length": 21}, "length: found 21 tokens of 20"), ({"length": -1}, "length: found -1"),
        ({"length": True}, "header 'length': found True, expected int"), ({"reach": None}, "header 'reach'"),
        ({"max_tokens": 1 << 60}, "length: found"), ({"length": 19}, "ids: found 160 bytes"),
        ({"kv": "f16"}, "keys/0: found"), ({"kv": "f8"}, "kv: found f8, expected f32 or f16 or int8"),
        ({"entry": "values/1"}, "no item named 'values/1'"),
        ({"byteorder": "big"}, "byteorder: found big"),
    ],
)  # fmt: skip
def test_headers_that_do_not_fit(saved: tuple[Llama, Path], changes: dict[str, object], says: str) -> None:
    model, path = saved
    rewritten(path, **changes)
    with pytest.raises(ModelFormatError, match=says):
        load_cache(model, path)


def test_files_of_another_model_or_adapter(saved: tuple[Llama, Path]) -> None:
    model, path = saved
    for other in (small_model("int8", 1), Llama(SMALL, layout="f32", seed=8), small_model("f32", 1, WINDOWED)):
        with pytest.raises(ModelFormatError, match="model: found .*of this model"):
            load_cache(other, path)
    assert len(load_cache(small_model("f32", 1), path)) == 20  # the same model, loaded again
    cache = load_cache(model, path)
    MicroLora(model).attach(LoraAdapter(SMALL, LoraConfig(rank=2)))
    with pytest.raises(ModelFormatError, match="model: found"):
        load_cache(model, path)
    with pytest.raises(ValueError, match="expected tokens of the adapters that are active"):
        cache.save(path)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    model = small_model("f32", 1)
    cache = model.new_cache(40)
    model.forward(text(20), cache, last_only=True)
    (tmp_path / "directory").mkdir()
    for path, kind in ((tmp_path / "missing" / "a.kv", FileNotFoundError), (tmp_path / "directory", IsADirectoryError)):
        with pytest.raises(kind) as failed:
            cache.save(path)
        assert failed.value.filename == str(path) and str(failed.value).endswith(f": {str(path)!r}")
    assert [path.name for path in tmp_path.iterdir()] == ["directory"]
