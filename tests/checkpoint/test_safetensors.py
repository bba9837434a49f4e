"""safetensors reader: what sound files and shards hold, against the safetensors package, and how others are refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from ruvllm.checkpoint.safetensors import SafetensorsFile, SafetensorsIndex, open_safetensors
from ruvllm.errors import ModelFormatError
from tests.checkpoint import corpus
from tests.checkpoint.corpus import Hostile

both_ways = pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
INDEX = "model.safetensors.index.json"


def write(directory: Path, data: bytes) -> Path:
    path = directory / "model.safetensors"
    path.write_bytes(data)
    return path


def refused(path: Path, mmap: bool = True) -> ModelFormatError:
    with pytest.raises(ModelFormatError) as caught:
        open_safetensors(path, mmap)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2000
    return caught.value


def write_shards(directory: Path, weight_map: Any = None) -> dict[str, np.ndarray]:
    """Two shards and their index; returns name -> float32 values."""
    halves = [{"a": 1, "b": 2}, {"c": 3}]
    values = {}
    for i, half in enumerate(halves):
        tensors: corpus.Tensors = {
            name: ("F32", (seed, 3), corpus.random_rows("F32", seed, 3, seed)) for name, seed in half.items()
        }
        (directory / f"s{i}.safetensors").write_bytes(corpus.valid_safetensors(tensors))
        values.update({name: raw.view("<f4") for name, (_, _, raw) in tensors.items()})
    right = {"a": "s0.safetensors", "b": "s0.safetensors", "c": "s1.safetensors"}
    index = {"metadata": {"total_size": 72}, "weight_map": right if weight_map is None else weight_map}
    (directory / INDEX).write_text(json.dumps(index))
    return values


@both_ways
@pytest.mark.parametrize("case", corpus.hostile_safetensors(), ids=str)
def test_table(case: Hostile, mmap: bool, tmp_path: Path) -> None:
    path = write(tmp_path, case.data)
    error = refused(path, mmap)
    assert str(error).startswith(str(path))
    assert case.says in str(error)
    assert error.offset is not None


@both_ways
def test_every_prefix(mmap: bool, tmp_path: Path) -> None:
    whole = corpus.valid_safetensors()
    path = write(tmp_path, whole)
    SafetensorsFile(path, mmap).close()
    for length in range(len(whole) - 1, -1, -1):
        os.truncate(path, length)
        refused(path, mmap)


@both_ways
def test_contents(mmap: bool, tmp_path: Path) -> None:
    with SafetensorsFile(write(tmp_path, corpus.valid_safetensors()), mmap) as file:
        assert file.metadata == {"format": "pt", "note": "naïve"}
        assert list(file.tensors) == list(corpus.safetensors_tensors())
        for name, (kind, shape, raw) in corpus.safetensors_tensors().items():
            info = file.tensors[name]
            assert (info.name, info.type, info.shape, info.nbytes) == (name, kind, shape, raw.nbytes)
            found = file.tensor(name).float32()
            dtype = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}[kind]
            expected = raw.reshape(-1).view(dtype).astype(np.float32)
            np.testing.assert_array_equal(found.reshape(-1), expected)
            assert found.shape == (int(np.prod(shape[:-1])), shape[-1] if shape else 1)


def test_equals_safetensors_package(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {
        "wide": rng.standard_normal((3, 65)).astype(np.float32),
        "half": rng.standard_normal((2, 3, 5)).astype(np.float16),
        "double": rng.standard_normal(11),
        "ids": np.arange(6).reshape(2, 3),
    }
    path = tmp_path / "written.safetensors"
    save_file(tensors, path, metadata={"by": "the package"})
    file = open_safetensors(path)
    assert file.metadata == {"by": "the package"}
    assert file.tensors.keys() == tensors.keys()
    for name in ("wide", "half", "double"):
        expected = tensors[name].astype(np.float32)
        np.testing.assert_array_equal(file.tensor(name).float32().reshape(expected.shape), expected)
    sound = {name: tensor for name, tensor in corpus.safetensors_tensors().items() if tensor[0] != "BF16"}
    ours = write(tmp_path, corpus.valid_safetensors(sound))
    for name, theirs in load_file(ours).items():
        np.testing.assert_array_equal(
            SafetensorsFile(ours).tensor(name).float32().reshape(theirs.shape), theirs.astype(np.float32)
        )


def test_known_types_are_listed_and_refused_by_name(tmp_path: Path) -> None:
    for kind, size in (("I64", 8), ("F8_E4M3", 1), ("BOOL", 1)):
        file = SafetensorsFile(write(tmp_path, corpus.safetensors({"a": corpus.st_entry(kind, [2], 0, 2 * size)},
                                                                  bytes(2 * size))))  # fmt: skip
        assert file.tensors["a"].type == kind
        with pytest.raises(ModelFormatError, match=f"tensor 'a' type: found {kind}, which is not supported"):
            file.tensor("a")


@both_ways
def test_unaligned_data(mmap: bool, tmp_path: Path) -> None:
    """The format does not align: a file may start its data anywhere."""
    for pad in range(9):
        raw = corpus.random_rows("F64", 2, 3, pad)
        header = json.dumps({"pad": corpus.st_entry("U8", [3], 0, 3), "a": corpus.st_entry("F64", [2, 3], 3, 51)})
        data = corpus.safetensors(header.encode() + b" " * pad, b"xyz" + raw.tobytes())
        found = SafetensorsFile(write(tmp_path, data), mmap).tensor("a").float32()
        np.testing.assert_array_equal(found, raw.view("<f8").astype(np.float32))


@both_ways
def test_shards(mmap: bool, tmp_path: Path) -> None:
    values = write_shards(tmp_path)
    for path in (tmp_path, tmp_path / INDEX):
        with open_safetensors(path, mmap) as model:
            assert isinstance(model, SafetensorsIndex)
            assert model.tensors.keys() == values.keys()
            for name, expected in values.items():
                np.testing.assert_array_equal(model.tensor(name).float32(), expected)
                np.testing.assert_array_equal(model.tensor(name).raw(), expected.view(np.uint8))
                assert model.tensor(name).path == str(tmp_path / ("s1" if name == "c" else "s0")) + ".safetensors"


def test_single_file_goes_before_shards(tmp_path: Path) -> None:
    write_shards(tmp_path)
    write(tmp_path, corpus.valid_safetensors())
    assert isinstance(open_safetensors(tmp_path), SafetensorsFile)


def test_row46_shard_missing(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "s1.safetensors").unlink()
    error = refused(tmp_path)
    assert "weight_map: found no file 's1.safetensors' next to it" in str(error)
    assert error.path == str(tmp_path / INDEX)


@pytest.mark.parametrize(
    "shard",
    ["/etc/s.safetensors", "../s0.safetensors", "x/../s0.safetensors", "sub/s.safetensors", "..", "", "a\0.safetensors",
     "..\\s0.safetensors", "sub\\s.safetensors", "C:s0.safetensors", "s0.bin", 7, None, ["s0.safetensors"]],
)  # fmt: skip
def test_row47_shard_elsewhere(shard: Any, tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": "s0.safetensors", "b": shard})
    assert "weight_map: found the shard" in str(refused(tmp_path))


def test_row48_index_and_shards_differ(tmp_path: Path) -> None:
    right = {"a": "s0.safetensors", "b": "s0.safetensors", "c": "s1.safetensors"}
    for wrong, says in (
        ({"a": "s0.safetensors", "c": "s1.safetensors"}, "1 tensors which only it holds, 'b'"),
        (right | {"d": "s1.safetensors"}, "1 tensors which that shard does not hold, 'd'"),
        (right | {"b": "s1.safetensors"}, "1 tensors which only it holds, 'b'"),
    ):
        write_shards(tmp_path, wrong)
        assert says in str(refused(tmp_path))


@pytest.mark.parametrize(
    ("index", "says"),
    [
        (b"{}", "weight_map: found None"),
        (b'{"weight_map": {}}', "weight_map: found {}"),
        (b'{"weight_map": []}', "weight_map: found []"),
        (b"[]", "found a JSON list"),
        (b"", "found no JSON"),
        (b"\xff", "found the byte 0xff"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "the key 'a' a second time"),
        (b'{"weight_map": ' + b"[" * 100_000, "nested too deep"),
        (b" " * 6_000_001, "file size: found 6000001"),
        (json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(1001)}}).encode(), "found 1001 shards"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsound_index(index: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(index)
    error = refused(tmp_path)
    assert says in str(error) and error.path == str(tmp_path / INDEX)


def test_unsound_shard_closes_the_others(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "s1.safetensors").write_bytes(b"")
    error = refused(tmp_path, mmap=False)
    assert error.path == str(tmp_path / "s1.safetensors")
    assert not [file.path for file in psutil.Process().open_files() if file.path.startswith(str(tmp_path))]


@both_ways
def test_closing(mmap: bool, tmp_path: Path) -> None:
    values = write_shards(tmp_path)
    with open_safetensors(tmp_path, mmap) as model:
        kept = model.tensor("a").raw()
        tensors = [model.tensor(name) for name in values]
    np.testing.assert_array_equal(kept, values["a"].view(np.uint8))  # views outlive the files
    for tensor in tensors:
        with pytest.raises(ValueError, match="closed"):
            tensor.float32()


class Planted:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth"])
def test_row49_pickle(name: str, tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    (tmp_path / name).write_bytes(pickle.dumps(Planted(trap)))
    for path in (tmp_path, tmp_path / name):
        assert f"found the pickle '{name}', whose loading can execute anything" in str(refused(path))
    with pytest.raises(ModelFormatError, match="pickle"):
        SafetensorsFile(tmp_path / name)
    assert not trap.exists()


def test_directory_without_weights(tmp_path: Path) -> None:
    assert "found no safetensors weights, expected model.safetensors" in str(refused(tmp_path))


@both_ways
def test_row51_special_files(mmap: bool, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert "found a FIFO, expected a regular file" in str(refused(tmp_path, mmap))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    assert "found a directory" in str(refused(tmp_path, mmap))
    assert "found a character device" in str(refused(Path("/dev/zero"), mmap))
    with pytest.raises(FileNotFoundError):
        open_safetensors(tmp_path / "absent.safetensors", mmap)
    with pytest.raises(FileNotFoundError):
        open_safetensors(tmp_path / "absent.json", mmap)
