"""GGUF reader: what sound files hold, against the gguf package, and that unsound ones end in one clear error."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import gguf as peer
import numpy as np
import psutil
import pytest

from ruvllm.checkpoint.gguf import GGUFFile
from ruvllm.errors import ModelFormatError
from tests.checkpoint import corpus
from tests.checkpoint.corpus import Hostile
from tests.model import tiny_gguf

both_ways = pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])


def write(directory: Path, data: bytes) -> Path:
    path = directory / "model.gguf"
    path.write_bytes(data)
    return path


def refused(path: Path, mmap: bool) -> ModelFormatError:
    with pytest.raises(ModelFormatError) as caught:
        GGUFFile(path, mmap)
    error = caught.value
    assert str(error).startswith(str(path))
    assert str(error).isprintable() and len(str(error)) < 2000
    return error


@both_ways
@pytest.mark.parametrize("case", corpus.hostile_gguf(), ids=str)
def test_table(case: Hostile, mmap: bool, tmp_path: Path) -> None:
    error = refused(write(tmp_path, case.data), mmap)
    assert case.says in str(error)
    assert error.offset is not None and 0 <= error.offset <= max(len(case.data), 0)


@both_ways
def test_row03_every_prefix(mmap: bool, tmp_path: Path) -> None:
    whole = corpus.small_gguf(data=bytes(32 + 68))
    path = write(tmp_path, whole)
    GGUFFile(path, mmap).close()
    for length in range(len(whole) - 1, -1, -1):
        os.truncate(path, length)
        refused(path, mmap)


@both_ways
def test_metadata_and_tensors(mmap: bool, tmp_path: Path) -> None:
    for version, alignment in ((3, None), (2, None), (3, 8), (3, 64)):
        path = write(tmp_path, corpus.valid_gguf(version, alignment))
        with GGUFFile(path, mmap) as file:
            assert file.version == version
            for key, (_, _, value) in corpus.SCALARS.items():
                found = file.metadata[key]
                assert type(found) is type(value)
                if isinstance(value, np.ndarray):
                    assert found.dtype == value.dtype
                    np.testing.assert_array_equal(found, value)
                else:
                    assert found == value
            assert list(file.tensors) == list(corpus.gguf_tensors())
            for name, (kind, shape, raw) in corpus.gguf_tensors().items():
                info = file.tensors[name]
                assert (info.name, info.type, info.shape, info.nbytes) == (name, kind, shape, raw.nbytes)
                assert info.offset % (alignment or 32) == 0
                np.testing.assert_array_equal(file.tensor(name).raw(), raw)
                assert not file.tensor(name).raw().flags.writeable


def test_offsets_point_at_values(tmp_path: Path) -> None:
    data = corpus.valid_gguf()
    file = GGUFFile(write(tmp_path, data))
    start = file.metadata_offsets["test.u32"]
    assert data[start : start + 4] == corpus.SCALARS["test.u32"][1]
    start = file.metadata_offsets["test.bytes"]
    assert data[start : start + 3] == b"abc"


def test_equals_gguf_package(tmp_path: Path) -> None:
    """What the gguf package writes is read; what it reads of our files is the same."""
    path = tmp_path / "written.gguf"
    writer = peer.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "Ġb", "🦙"] * 1000)
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0])
    values = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    kinds = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
    for kind in kinds:
        code = peer.GGMLQuantizationType[kind]
        writer.add_tensor(kind, peer.quants.quantize(values, code), raw_dtype=code)
    tiny_gguf.finish(writer)
    for source in (path, write(tmp_path, corpus.valid_gguf())):
        ours, theirs = GGUFFile(source), peer.GGUFReader(source)
        keys = [key for key in theirs.fields if not key.startswith("GGUF.")]
        assert list(ours.metadata) == keys
        for key in keys:
            found = ours.metadata[key]
            np.testing.assert_array_equal(found, theirs.fields[key].contents())
        assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
        for tensor in theirs.tensors:
            info = ours.tensors[tensor.name]
            assert info.shape == tuple(int(n) for n in reversed(tensor.shape))
            assert (info.type, info.nbytes) == (tensor.tensor_type.name, tensor.n_bytes)
            assert info.offset == tensor.data_offset
            expected = peer.quants.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(ours.tensor(tensor.name).float32().reshape(info.shape), expected)


def test_last_tensor_may_lack_padding(tmp_path: Path) -> None:
    for padding in range(29):
        path = write(tmp_path, corpus.small_gguf(data=bytes(100 + padding)))
        assert GGUFFile(path).tensor("b").raw().shape == (2, 34)


def test_vocabulary_without_tensors(tmp_path: Path) -> None:
    header = corpus.gguf([corpus.entry("k", corpus.U8, b"\x07")], [], b"")
    for data in (header, header.rstrip(b"\0")):
        file = GGUFFile(write(tmp_path, data))
        assert file.metadata == {"k": 7} and file.tensors == {}


@both_ways
def test_long_vocabulary(mmap: bool, tmp_path: Path) -> None:
    """More strings than one read of a file that is not mapped takes in."""
    tokens = [f"token {i} {'é' * (i % 50)}" for i in range(60_000)]
    payload = corpus.array(corpus.STRING, len(tokens), b"".join(map(corpus.text, tokens)))
    data = corpus.small_gguf(entries=[corpus.entry("tokens", corpus.ARRAY, payload), corpus.entry("z", 0, b"\x01")])
    assert len(data) > 3 << 20
    file = GGUFFile(write(tmp_path, data), mmap)
    assert file.metadata == {"tokens": tokens, "z": 1}


@both_ways
def test_too_many_strings(mmap: bool, tmp_path: Path) -> None:
    payload = corpus.array(corpus.STRING, (1 << 20) + 1, bytes(8 * ((1 << 20) + 1)))
    path = write(tmp_path, corpus.small_gguf(entries=[corpus.entry("k", corpus.ARRAY, payload)]))
    assert "1048577 strings, expected at most 1048576" in str(refused(path, mmap))


@both_ways
def test_header_limit(mmap: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    payload = corpus.array(corpus.U8, 100_000_000, b"")
    path.write_bytes(corpus.small_gguf(entries=[corpus.entry("k", corpus.ARRAY, payload)]))
    os.truncate(path, 1 << 30)
    assert "bytes of header, expected at most 100000000" in str(refused(path, mmap))


@both_ways
def test_row51_special_files(mmap: bool, tmp_path: Path) -> None:
    fifo, loop = tmp_path / "fifo.gguf", tmp_path / "loop.gguf"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    assert "found a FIFO, expected a regular file" in str(refused(fifo, mmap))
    assert "found a directory" in str(refused(tmp_path, mmap))
    assert "found a character device" in str(refused(Path("/dev/zero"), mmap))
    assert "expected a readable regular file" in str(refused(loop, mmap))
    with pytest.raises(FileNotFoundError):
        GGUFFile(tmp_path / "absent.gguf", mmap)


@both_ways
def test_row51_unreadable(mmap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, corpus.small_gguf())

    def denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    assert "found Permission denied, expected a readable regular file" in str(refused(path, mmap))


def test_file_that_shrinks_is_refused_when_read(tmp_path: Path) -> None:
    path = write(tmp_path, corpus.small_gguf())
    file = GGUFFile(path, mmap=False)
    os.truncate(path, path.stat().st_size - 60)
    np.testing.assert_array_equal(file.tensor("a").raw(), np.zeros((2, 16), np.uint8))
    with pytest.raises(ModelFormatError, match="file size: found .* while reading"):
        file.tensor("b").raw()


def opened(path: Path) -> int:
    """How many descriptors of this process, mapped or not, hold the file."""
    gc.collect()  # what an exception's traceback kept alive
    return sum(file.path == str(path) for file in psutil.Process().open_files())


@both_ways
def test_closing(mmap: bool, tmp_path: Path) -> None:
    path = write(tmp_path, corpus.valid_gguf())
    with GGUFFile(path, mmap) as file:
        kept = file.tensor("vector").raw()
        tensor = file.tensor("cube")
    np.testing.assert_array_equal(kept, corpus.gguf_tensors()["vector"][2])  # views outlive the file object
    with pytest.raises(ValueError, match="closed"):
        tensor.float32()
    file.close()


@both_ways
def test_nothing_stays_open(mmap: bool, tmp_path: Path) -> None:
    path = write(tmp_path, corpus.valid_gguf())
    file = GGUFFile(path, mmap)
    assert opened(path) == 1
    file.close()
    assert opened(path) == 0
    GGUFFile(path, mmap)  # and without a word, when nobody refers to it
    assert opened(path) == 0
    path.write_bytes(corpus.small_gguf(version=9))
    error = refused(path, mmap)
    assert mmap or opened(path) == 0  # (the traceback of an error that is kept looks into the map)
    del error
    assert opened(path) == 0
