"""Packed weights that are kept: they are the same weights, and used only where they are this model's and untouched."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ruvllm import loading
from ruvllm.checkpoint import packed_cache, packed_file
from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.checkpoint.packed_cache import PackedModel, Place, kept, limit, place_of
from ruvllm.cli import main
from ruvllm.kernels.quant.panels import Panels
from ruvllm.model.llama import Llama, choose_layouts
from tests.model import tiny

IDS = np.arange(5, 30)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache directory of its own. What is compiled is found in the user's, which is known by now."""
    from ruvllm.kernels.jit.cache import kernel_cache_directory

    kernel_cache_directory()
    monkeypatch.setenv("RUVLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(packed_cache.VARIABLE, "1GB")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.write_gguf("mlp_bias_f16", tmp_path / "tiny.gguf", "Q8_0")


def place(model: Path, weights: str = "auto") -> Place:
    with open_checkpoint(model) as checkpoint:
        found = place_of(checkpoint, weights, choose_layouts(checkpoint.config, checkpoint, weights))
    assert found is not None
    return found


def logits(model: Path, weights: str = "auto", from_cache: bool = False) -> np.ndarray:
    with open_checkpoint(model) as checkpoint:
        source: Any = checkpoint
        if from_cache:
            matrices = place(model, weights).find()
            assert matrices is not None
            source = PackedModel(checkpoint, matrices)
        llama = Llama(checkpoint.config, source, weights)
    return llama.forward(IDS, llama.new_cache(64))


# --- the same weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["auto", "f32", "f16", "bf16", "int4", "int8"])
def test_kept_weights_give_the_same_bits(model: Path, weights: str) -> None:
    expected = logits(model, weights)
    assert place(model, weights).find() is None
    loading.pack(model, weights)
    assert np.array_equal(logits(model, weights, from_cache=True), expected)


def test_a_directory_has_them_too(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny.directory("bf16_sharded_tied"), model)
    expected = logits(model)
    loading.pack(model)
    assert np.array_equal(logits(model, from_cache=True), expected)
    settings = model / "config.json"
    settings.write_text(settings.read_text() + "\n")
    assert place(model).find() is None


def test_a_load_keeps_them_and_the_next_one_maps_them(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_WORTH_KEEPING", 0)
    monkeypatch.setattr(Place, "keep_later", Place.keep)
    expected = loading.load(model, progress=False).logits(IDS)
    assert place(model).find() is not None
    read: list[str] = []
    monkeypatch.setattr("ruvllm.checkpoint.tensor.load_panels", lambda tensor, *_, **__: read.append(tensor.name))
    assert np.array_equal(loading.load(model, progress=False).logits(IDS), expected)
    assert read == []


def test_a_load_that_does_not_map_uses_none(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loading.pack(model)
    monkeypatch.setattr(Place, "find", lambda self: pytest.fail("it was looked for"))
    loading.load(model, mmap=False, progress=False)


def test_another_thread_writes_them(model: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        llama = Llama(checkpoint.config, checkpoint)
    found = place(model)
    thread = found.keep_later({name: linear.weights for name, linear in llama.linears().items()})
    thread.join(30)
    assert found.find() is not None


def test_a_write_that_is_stopped_leaves_nothing(model: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        llama = Llama(checkpoint.config, checkpoint)
    found, answers = place(model), iter([True, True, False])
    matrices = {name: linear.weights for name, linear in llama.linears().items()}
    assert not packed_file.write_packed(found.path, matrices, {"key": found.key}, lambda: next(answers))
    assert list(found.path.parent.iterdir()) == []


def test_other_programs_can_read_the_file(model: Path) -> None:
    path = loading.pack(model, "f32")
    tensors = load_file(path)
    with open_checkpoint(model) as checkpoint:
        stored = checkpoint.tensor("layers.0.up").float32()
    panels = tensors["layers.0.up"]
    assert np.array_equal(panels.transpose(0, 2, 1).reshape(-1, panels.shape[1])[: len(stored)], stored)


def test_writing_to_mapped_weights_changes_no_file(model: Path) -> None:
    path = loading.pack(model)
    before = path.read_bytes()
    matrices = place(model).find()
    assert matrices is not None
    panels = matrices["layers.0.up"].panels
    assert isinstance(panels, Panels)
    panels.blocks[:] = 0
    del panels, matrices
    assert path.read_bytes() == before


# --- only untouched files of this model ----------------------------------------------------------------------------


def _keep_time(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """The change, with the time of modification as it was before."""

    def changed(path: Path) -> None:
        before = path.stat()
        change(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    return changed


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 64)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def _lengthen(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(bytes(64))


def _write_at(at: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[at] ^= 1
        path.write_bytes(raw)

    return change


def _link(path: Path) -> None:
    path.rename(path.with_suffix(".there"))
    path.symlink_to(path.with_suffix(".there"))


SPOILT = {
    "written to": _write_at(-1),
    "cut": _keep_time(_cut),
    "cut within its header": _keep_time(lambda path: os.truncate(path, 100)),
    "empty": _keep_time(lambda path: os.truncate(path, 0)),
    "lengthened": _keep_time(_lengthen),
    "another header": _keep_time(_write_at(200)),
    "another checksum": _keep_time(_write_at(8 + len('{"__metadata__": {"checksum": "'))),
    "a huge header": _keep_time(_write_at(6)),
    "writable by the group": lambda path: path.chmod(0o620),
    "writable by all": lambda path: path.chmod(0o602),
    "a link": _link,
    "a directory that others can write": lambda path: path.parent.chmod(0o770),
    "a FIFO": _fifo,
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=list(SPOILT))
def test_a_file_that_was_touched_is_not_used(model: Path, spoil: Callable[[Path], None]) -> None:
    expected = logits(model)
    found = place(model)
    path = loading.pack(model)
    assert found.find() is not None
    spoil(path)
    if path.parent.stat().st_mode & 0o022:
        with open_checkpoint(model) as checkpoint:
            assert place_of(checkpoint, "auto", choose_layouts(checkpoint.config, checkpoint, "auto")) is None
        path.parent.chmod(0o700)
    else:
        assert found.find() is None
    if spoil is not _link:
        loading.pack(model)
        assert np.array_equal(logits(model, from_cache=True), expected)


def test_a_file_of_another_user_is_not_used(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = place(model)
    loading.pack(model)
    monkeypatch.setattr(os, "getuid", lambda: os.stat(model).st_uid + 1)
    assert found.find() is None


def test_a_file_of_another_model_is_not_used(model: Path, tmp_path: Path) -> None:
    other = tiny.write_gguf("llama2_mha", tmp_path / "other.gguf", "Q8_0")
    there = loading.pack(other)
    shutil.copy2(there, place(model).path)
    assert place(model).find() is None


@pytest.mark.parametrize("as_before", [True, False])
def test_weights_of_a_model_that_has_changed_are_not_used(model: Path, as_before: bool) -> None:
    """Even where its size and time are what they were."""
    loading.pack(model)
    before = model.stat()
    raw = bytearray(model.read_bytes())
    raw[-40] ^= 1
    model.write_bytes(raw)
    if as_before:
        os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert place(model).find() is None
    assert [file.fault for file in kept()] == ["the model has changed"]


def test_weights_of_another_version_are_not_used(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loading.pack(model)
    monkeypatch.setattr(packed_cache, "_stamp", lambda: "another")
    assert place(model).find() is None
    assert [file.fault for file in kept()] == ["made by another version of ruvllm"]


def test_each_choice_of_weights_has_a_file_of_its_own(model: Path) -> None:
    assert loading.pack(model, "int8") != loading.pack(model, "int4")
    assert {file.weights for file in kept()} == {"int4", "int8"}


# --- how much is kept -----------------------------------------------------------------------------------------------


def _three(model: Path) -> list[Path]:
    """Three files, made in this order and used in another: the second longest ago."""
    paths = [loading.pack(model, weights) for weights in ("int8", "f16", "bf16")]
    for path, used in zip(paths, (2000, 1000, 3000), strict=True):
        os.utime(path, ns=(used * 10**9, path.stat().st_mtime_ns))
    return paths


def test_the_least_recently_used_go_first(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    int8, f16, bf16 = _three(model)
    total = sum(path.stat().st_size for path in (int8, f16, bf16))
    monkeypatch.setenv(packed_cache.VARIABLE, str(total))
    loading.pack(model, "int4")
    assert not f16.exists() and int8.exists() and bf16.exists()


def test_using_a_file_makes_it_the_last_to_go(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    int8, f16, bf16 = _three(model)
    assert place(model, "f16").find() is not None
    monkeypatch.setenv(packed_cache.VARIABLE, str(sum(path.stat().st_size for path in (int8, f16, bf16))))
    loading.pack(model, "int4")
    assert not int8.exists() and f16.exists() and bf16.exists()


def test_what_is_larger_than_the_limit_is_not_kept_and_nothing_is_removed(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = loading.pack(model, "int8")
    monkeypatch.setenv(packed_cache.VARIABLE, "1KB")
    with pytest.raises(OSError, match="limit"):
        loading.pack(model, "int4")
    assert [file.path for file in kept()] == [path]


def test_a_short_disk_keeps_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**11, 95 * 10**9, 5 * 10**9))
    with pytest.raises(OSError, match="the disk is short"):
        loading.pack(model)
    assert kept() == []


def test_zero_turns_it_off(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(packed_cache.VARIABLE, "0")
    monkeypatch.setattr(loading, "_WORTH_KEEPING", 0)
    loading.load(model, progress=False)
    with pytest.raises(OSError, match=packed_cache.VARIABLE):
        loading.pack(model)
    assert not (tmp_path / "cache" / "packed").exists()


@pytest.mark.parametrize(("said", "expected"), [("", 20e9), ("0", 0), ("1500", 1500), ("50GB", 50e9), ("0.5 tb", 5e11)])
def test_the_limit(said: str, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(packed_cache.VARIABLE, said)
    assert limit() == expected


@pytest.mark.parametrize("said", ["-1", "much", "5 XB", "1e9"])
def test_no_limit(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(packed_cache.VARIABLE, said)
    with pytest.raises(ValueError, match=f"^{packed_cache.VARIABLE}: .*found '{said}'"):
        limit()


def test_files_that_were_never_completed_go(model: Path) -> None:
    path = loading.pack(model)
    old, new = path.with_name("a.1.part"), path.with_name("b.2.part")
    for part in (old, new):
        part.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    loading.pack(model, "int4")
    assert not old.exists() and new.exists()


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_command_lists_and_prunes(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    int8, f16, bf16 = _three(model)
    assert main(["cache"]) == 0
    listed = capsys.readouterr().out
    assert all(weights in listed for weights in ("int8", "f16", "bf16")) and listed.count("ready") == 3
    assert main(["cache", "size"]) == 0
    assert "3 files" in capsys.readouterr().out
    assert main(["cache", "prune"]) == 0
    assert "removed 0 files" in capsys.readouterr().out
    assert main(["cache", "prune", "--to", str(int8.stat().st_size + bf16.stat().st_size)]) == 0
    assert "removed 1 files" in capsys.readouterr().out and not f16.exists()
    bf16.write_bytes(b"spoilt")
    assert main(["cache", "prune"]) == 0
    assert "removed 1 files, 6 B" in capsys.readouterr().out and int8.exists()
    assert main(["cache", "prune", "--all"]) == 0
    assert kept() == []


@pytest.mark.parametrize("words", [["remove"], ["list", "all"], ["list", "--all"], ["prune", "--to", "much"]])
def test_a_command_that_makes_no_sense(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", *words]) == 2
    assert capsys.readouterr().err.startswith("ruvllm: error: ")


def test_pull_packs(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ruvllm.checkpoint.hub.pull", lambda name, verify: model)
    assert main(["pull", str(model), "--pack"]) == 0
    _, packed = capsys.readouterr().out.split()
    header = json.loads(Path(packed).read_bytes()[8:4096].rstrip(b"\0"))
    assert header["__metadata__"]["model"] == str(model.resolve())
