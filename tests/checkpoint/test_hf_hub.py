"""Models on the Hugging Face Hub: the real `huggingface_hub` and a small hub on loopback, in processes of their own.

`huggingface_hub` reads its settings when it is imported.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ruvllm.checkpoint import hf_hub, hub
from ruvllm.checkpoint.hf_config import refuse_other_architectures
from ruvllm.checkpoint.hf_hub import HubName
from ruvllm.errors import DownloadError
from tests.checkpoint.fake_hub import FakeHub, Repository, fake_hub
from tests.checkpoint.gguf_parts import write_parts
from tests.model import tiny, tiny_checkpoints

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:9"  # nothing listens there
LLAMA = json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}).encode()
Q4, Q8 = b"4" * 1500, b"8" * 3000


class Outcome:
    """Exit code, output and errors of a command."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr

    @property
    def path(self) -> Path:
        assert self.code == 0, self.err
        return Path(self.out.rstrip("\n"))

    @property
    def said(self) -> str:
        """The error, which must be one line and all that is shown."""
        assert self.code == 2 and self.out == "", (self.code, self.out)
        assert self.err.startswith("ruvllm: error: ") and self.err.count("\n") == 1, self.err
        return self.err[len("ruvllm: error: ") : -1]


class User:
    """Somebody with an empty cache, who runs commands."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def run(self, *argv: str, url: str, **environment: str) -> Outcome:
        given = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        given |= {"HF_ENDPOINT": url, "HF_HOME": str(self.home / "hf"), "PYTHONPATH": str(ROOT), **environment}
        done = subprocess.run(
            [sys.executable, *argv], env=given, cwd=self.home, capture_output=True, text=True, check=False, timeout=120
        )
        return Outcome(done)

    def pull(self, hub: FakeHub | str, *argv: str, **environment: str) -> Outcome:
        url = hub if isinstance(hub, str) else hub.url
        return self.run("-m", "ruvllm", "pull", *argv, url=url, **environment)


@pytest.fixture
def user(tmp_path: Path) -> User:
    return User(tmp_path)


def gguf_repository(**more: bytes) -> Repository:
    files = {
        "README.md": b"words", "imatrix.gguf": b"i", "mmproj-F16.gguf": b"m", "tiny-Q4_K_M.gguf": Q4,
        "tiny-Q4_K_S.gguf": b"s", "tiny-Q8_0.gguf": Q8, "UD/tiny-UD-Q4_K_M.gguf": b"u",
    }  # fmt: skip
    return Repository(files | more)


def directory_repository(case: str = "bf16_sharded_tied", **more: bytes) -> Repository:
    """A tiny model with what stands beside models: other formats, pictures, weights in folders."""
    files = {path.name: path.read_bytes() for path in tiny.directory(case).iterdir() if path.suffix != ".npz"}
    files |= {
        "README.md": b"words", "pytorch_model.bin": b"pickle", "consolidated.safetensors": b"the same again",
        "original/model.safetensors": b"and again", "onnx/model.onnx": b"o", "tokenizer.model": b"t",
        "tokenizer_config.json": b"{}", "additional_chat_templates/rag.jinja": b"{{ messages }}",
    }  # fmt: skip
    return Repository(files | more)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("owner/name", HubName("owner/name")),
        ("TheBloke/Llama-2-7B-GGUF:Q4_K_M", HubName("TheBloke/Llama-2-7B-GGUF", tag="Q4_K_M")),
        ("o/n.v1/dir/file-Q8_0.gguf", HubName("o/n.v1", file="dir/file-Q8_0.gguf")),
        ("models/llama.gguf", None),  # a file that is not there
        ("llama", None),
        ("./owner/name", None),
        ("../owner/name", None),
        ("~/owner/name", None),
        ("/owner/name", None),
        ("owner/name/", None),
        ("owner\\name", None),
        ("C:/models/llama", None),
        ("https://huggingface.co/owner/name", None),
        ("", None),
    ],
)
def test_names(text: str, name: HubName | None) -> None:
    assert hf_hub.parse(text) == name


SIZES: dict[str, int | None] = {
    "a-Q4_K_M.gguf": 1, "a-Q4_K_S.gguf": 1, "a.q8_0.gguf": 1, "a-UD-Q4_K_M.gguf": 1, "a-IQ2_XS.gguf": 1,
    "mmproj-a-f16.gguf": 1, "sub/a-bf16-00001-of-00002.gguf": 5, "sub/a-bf16-00002-of-00002.gguf": 1,
    "other.gguf": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("o/n:Q4_K_M", ["a-Q4_K_M.gguf"]),
        ("o/n:q4_k_s", ["a-Q4_K_S.gguf"]),
        ("o/n:UD-Q4_K_M", ["a-UD-Q4_K_M.gguf"]),
        ("o/n:UD", ["a-UD-Q4_K_M.gguf"]),
        ("o/n:Q8", ["a.q8_0.gguf"]),
        ("o/n:IQ", ["a-IQ2_XS.gguf"]),
        ("o/n:other", ["other.gguf"]),
        ("o/n:BF16", ["sub/a-bf16-00001-of-00002.gguf", "sub/a-bf16-00002-of-00002.gguf"]),
        ("o/n/sub/a-bf16-00002-of-00002.gguf", ["sub/a-bf16-00001-of-00002.gguf", "sub/a-bf16-00002-of-00002.gguf"]),
        ("o/n/sub", ["sub/a-bf16-00001-of-00002.gguf", "sub/a-bf16-00002-of-00002.gguf"]),
        ("o/n/a-Q4_K_M.gguf", ["a-Q4_K_M.gguf"]),
        ("o/n/a-Q4_K_M", ["a-Q4_K_M.gguf"]),
        ("o/n/a.", ["a.q8_0.gguf"]),
    ],
)
def test_which_files_a_name_means(text: str, files: list[str]) -> None:
    name = hf_hub.parse(text)
    assert name is not None and hf_hub._choose(name, SIZES) == files


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("o/n:Q4", "which file? there are o/n:Q4_K_M (1 bytes), o/n:Q4_K_S (1 bytes)"),
        ("o/n/a-Q4", "which file? there are o/n:Q4_K_M (1 bytes), o/n:Q4_K_S (1 bytes)"),
        ("o/n:Q3_K_M", "no such file; there are o/n:IQ2_XS (1 bytes), o/n:Q4_K_M"),
        ("o/n/mmproj-a-f16.gguf", "no such file; there are"),
        ("o/n", "o/n:bf16 (6 bytes)"),
    ],
)
def test_a_name_that_means_none_or_several_lists_the_choices(text: str, said: str) -> None:
    name = hf_hub.parse(text)
    assert name is not None
    with pytest.raises(DownloadError) as caught:
        hf_hub._choose(name, SIZES)
    assert said in str(caught.value) and "mmproj" not in str(caught.value).partition(";")[2]


def test_two_files_of_one_type_are_listed_by_their_paths() -> None:
    with pytest.raises(DownloadError, match=r"o/n/x/a-Q8_0\.gguf, o/n/y/a-Q8_0\.gguf"):
        hf_hub._choose(HubName("o/n", tag="Q8_0"), {"x/a-Q8_0.gguf": None, "y/a-Q8_0.gguf": None})


def test_a_part_that_the_repository_lacks() -> None:
    with pytest.raises(DownloadError, match="a-00002-of-00002.gguf, a part of it, is not there"):
        hf_hub._choose(HubName("o/n"), {"a-00001-of-00002.gguf": 1})


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["config.json", "pytorch_model.bin"], r"only pickles \(pytorch_model.bin\), which can run code"),
        (["README.md"], "neither GGUF files nor config.json with safetensors"),
        (["model.safetensors"], "neither GGUF files nor config.json with safetensors"),
    ],
)
def test_a_repository_with_nothing_to_load(files: list[str], said: str) -> None:
    with pytest.raises(DownloadError, match=said):
        hf_hub._choose(HubName("o/n"), dict.fromkeys(files, 1))


def test_paths_that_leave_the_directory_are_not_taken() -> None:
    assert hf_hub._is_plain("sub/a.gguf")
    for path in ("../a.gguf", "/etc/a.gguf", "a\\b.gguf", "C:a.gguf", "sub//a.gguf", "./a.gguf", "a\0.gguf"):
        assert not hf_hub._is_plain(path)


# --- fetching ---------------------------------------------------------------------------------------------------------


def test_pull_of_a_file(user: User) -> None:
    with fake_hub(o__tiny=gguf_repository()) as hub:
        path = user.pull(hub, "o/tiny:Q4_K_M").path
        assert path.read_bytes() == Q4 and path.name == "tiny-Q4_K_M.gguf"
        assert path.is_relative_to(user.home / "hf" / "hub")
        assert user.pull(hub, "o/tiny/tiny-Q8_0.gguf", "o/tiny:Q4_K_M").out.splitlines()[1] == str(path)
        assert hub.fetched() == ["tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf"]  # each once, and no others


def test_pull_of_a_directory_takes_what_is_needed_and_no_pickles(user: User) -> None:
    with fake_hub(o__tiny=directory_repository()) as hub:
        folder = user.pull(hub, "o/tiny").path
        shards = [f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)]
        needed = ["config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer_config.json"]
        needed.append("additional_chat_templates/rag.jinja")
        assert sorted(hub.fetched()) == sorted([*needed, *shards])
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        assert sorted(files) == sorted([*needed, *shards])
        assert (folder / shards[2]).read_bytes() == (tiny.directory("bf16_sharded_tied") / shards[2]).read_bytes()


def test_pull_takes_settings_of_quantised_weights_that_stand_beside_config_json(user: User) -> None:
    settings = {"quantize_config.json": b'{"bits": 4}', "quant_config.json": b'{"w_bit": 4}'}
    with fake_hub(o__tiny=Repository(directory_repository().files | settings)) as hub:
        user.pull(hub, "o/tiny")
        assert settings.keys() <= set(hub.fetched())


def test_a_mirror_that_lists_files_by_the_tree_alone(user: User) -> None:
    with fake_hub(o__tiny=Repository({"a-Q4_0.gguf": Q4, "a-Q8_0.gguf": b"small"}, tree=True)) as hub:
        for name, content in (("o/tiny:Q4_0", Q4), ("o/tiny:Q8_0", b"small")):
            assert user.pull(hub, name, "--verify").path.read_bytes() == content


def test_a_single_file_goes_before_an_index(user: User) -> None:
    files = {"config.json": LLAMA, "model.safetensors": b"w", "model.safetensors.index.json": b"not even read"}
    with fake_hub(o__tiny=Repository(files)) as hub:
        assert sorted(path.name for path in user.pull(hub, "o/tiny").path.iterdir()) == [
            "config.json",
            "model.safetensors",
        ]


def test_a_repository_with_one_gguf_model_needs_no_more_words(user: User) -> None:
    files = {"a-00001-of-00002.gguf": b"1", "a-00002-of-00002.gguf": b"2", "mmproj.gguf": b"m", "config.json": LLAMA}
    with fake_hub(o__tiny=Repository(files)) as hub:
        path = user.pull(hub, "o/tiny").path
        assert path.name == "a-00001-of-00002.gguf"
        assert path.with_name("a-00002-of-00002.gguf").read_bytes() == b"2"
        assert hub.fetched() == ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"]


LOAD = (
    "import ruvllm, sys; llm = ruvllm.load(sys.argv[1]); print(llm.logits([5, 6, 7], last_only=True).tobytes().hex())"
)


def test_load_takes_the_same_names(user: User, tmp_path: Path) -> None:
    """A tiny model by name, as a file, in parts and as a directory, gives the logits that its file gives by path."""
    path = tiny.write_gguf("llama2_mha", tmp_path / "tiny-F32.gguf")
    by_path = user.run("-c", LOAD, str(path), url=NOWHERE)
    assert by_path.code == 0, by_path.err
    (tmp_path / "cut").mkdir()
    parts = sorted(write_parts("llama2_mha", tmp_path / "cut").parent.glob("*-of-*.gguf"))
    files = {"tiny-F32.gguf": path.read_bytes(), "tiny-F16.gguf": b"x"}
    files |= {f"cut/{part.name}": part.read_bytes() for part in parts}
    with fake_hub(o__tiny=Repository(files), o__dir=directory_repository("llama2_mha")) as hub:
        for name in ("o/tiny:F32", "o/tiny/tiny-F32.gguf", "o/tiny/cut", "o/dir"):
            loaded = user.run("-c", LOAD, name, url=hub.url)
            assert loaded.out == by_path.out, (name, loaded.err)
        assert hub.fetched().count("tiny-F32.gguf") == 1 and "tiny-F16.gguf" not in hub.fetched()


def test_a_new_version_is_fetched_and_what_stayed_is_not(user: User) -> None:
    with fake_hub(o__tiny=directory_repository("llama2_mha")) as hub:
        old = user.pull(hub, "o/tiny").path
        hub.repositories["o/tiny"].files["generation_config.json"] = b'{"eos_token_id": 7}'
        hub.served.clear()
        new = user.pull(hub, "o/tiny").path
        assert new != old and (new / "generation_config.json").read_bytes() == b'{"eos_token_id": 7}'
        assert (new / "model.safetensors").read_bytes() == (old / "model.safetensors").read_bytes()
        assert hub.fetched() == ["generation_config.json"]


@pytest.mark.parametrize("name", ["o/tiny", "o/two:Q4_K_M"])
def test_what_was_fetched_needs_no_network(user: User, name: str) -> None:
    with fake_hub(o__tiny=directory_repository(), o__two=gguf_repository()) as hub:
        path = user.pull(hub, name).path
    unreachable = user.pull(NOWHERE, name)
    assert unreachable.path == path
    assert (
        "failed" in unreachable.err and "taken from the cache" in unreachable.err and unreachable.err.count("\n") == 1
    )
    offline = user.pull(NOWHERE, name, HF_HUB_OFFLINE="1")
    assert offline.path == path
    assert "HF_HUB_OFFLINE" in offline.err or offline.err == ""


def test_a_directory_that_was_fetched_in_part_does_not_serve_alone(user: User) -> None:
    with fake_hub(o__tiny=directory_repository()) as hub:
        folder = user.pull(hub, "o/tiny").path
    (folder / "model-00003-of-00004.safetensors").unlink()
    assert "not in the cache" in user.pull(NOWHERE, "o/tiny", HF_HUB_OFFLINE="1").said


def test_verify_finds_a_flipped_byte(user: User) -> None:
    with fake_hub(o__tiny=gguf_repository(**{"tiny-F16.gguf": b"small"})) as hub:
        for name, damaged in (("o/tiny:Q4_K_M", b"5" + Q4[1:]), ("o/tiny:F16", b"smell")):
            path = user.pull(hub, name).path
            whole = path.read_bytes()
            path.resolve().write_bytes(damaged)
            assert user.pull(hub, name).path.read_bytes() == damaged
            assert user.pull(hub, name, "--verify").path.read_bytes() == whole


def test_a_download_that_breaks_off_is_resumed(user: User) -> None:
    """By `huggingface_hub` itself, of which older versions leave it to the next call."""
    content = os.urandom(1 << 20) * 32
    with fake_hub(o__tiny=Repository({"a.gguf": content})) as hub:
        hub.cuts = [len(content) - 1]
        broken = user.pull(hub, "o/tiny")
        done = broken if broken.code == 0 else user.pull(hub, "o/tiny")
        assert done.path.read_bytes() == content
        first, second = (place for method, path, place in hub.served if method == "GET" and path.endswith("a.gguf"))
    assert first is None and second is not None
    assert int(second.removeprefix("bytes=").removesuffix("-")) >= len(content) // 2


# --- what goes wrong is one line --------------------------------------------------------------------------------------


def test_no_such_repository(user: User) -> None:
    with fake_hub() as hub:
        assert user.pull(hub, "o/none").said == (
            f"o/none: no such model on {hub.url}; if it is a private one, log in with `hf auth login` or set HF_TOKEN"
        )
        said = user.run("-m", "ruvllm", "generate", "o/none", "Hi", url=hub.url).said
        assert said.startswith("o/none: no such model on ")
        assert said.endswith("(nor is there a file or directory called 'o/none')")


def test_a_name_that_no_repository_can_have(user: User) -> None:
    with fake_hub() as hub:
        assert "not a valid name: expected OWNER/NAME" in user.pull(hub, "o/a--b").said
        assert hub.served == []


def test_no_such_file(user: User) -> None:
    with fake_hub(o__tiny=gguf_repository()) as hub:
        said = user.pull(hub, "o/tiny:Q3_K_L").said
        assert said.startswith("o/tiny:Q3_K_L: no such file; there are o/tiny:UD-Q4_K_M (1 bytes), o/tiny:Q4_K_M (1500")
        assert user.pull(hub, "o/tiny").said.startswith("o/tiny: which file? there are ")
        assert hub.fetched() == []


def test_no_network(user: User) -> None:
    said = user.pull(NOWHERE, "o/tiny").said
    assert said.startswith(f"o/tiny: the connection to {NOWHERE} failed (") and "check the network" in said
    assert "not in the cache, and HF_HUB_OFFLINE forbids" in user.pull(NOWHERE, "o/tiny", HF_HUB_OFFLINE="1").said


def test_a_gated_model(user: User) -> None:
    with fake_hub(o__tiny=Repository({"a.gguf": Q4}, gated=True)) as hub:
        said = user.pull(hub, "o/tiny").said
        assert said.startswith("o/tiny: gated: ask for access") and "hf auth login" in said and "HF_TOKEN" in said


@pytest.mark.parametrize(("status", "said"), [(401, "asks for a token"), (500, "answers with status 500")])
def test_a_hub_that_answers_with_an_error(user: User, status: int, said: str) -> None:
    with fake_hub(o__tiny=Repository({"a.gguf": Q4}, status=status)) as hub:
        assert said in user.pull(hub, "o/tiny").said


def test_a_connection_that_breaks_for_good(user: User) -> None:
    script = "import time; time.sleep = lambda s: None; from ruvllm.cli import main; raise SystemExit(main())"
    with fake_hub(o__tiny=Repository({"a.gguf": Q8})) as hub:
        hub.cuts = [1000] + [0] * 50
        said = user.run("-c", script, "pull", "o/tiny", url=hub.url).said
    assert said.startswith(f"o/tiny: the connection to {hub.url} failed (") and "try again" in said


def test_too_little_room_is_found_before_fetching(user: User) -> None:
    with fake_hub(o__tiny=Repository({"a.gguf": Q4}, sizes={"a.gguf": 1 << 62})) as hub:
        said = user.pull(hub, "o/tiny").said
        assert said.startswith("o/tiny: 4611686018427 MB needed in ") and "HF_HOME" in said
        assert hub.fetched() == []


def test_a_disk_that_fills_up(user: User) -> None:
    """No file may have more than 2000 bytes here: the system refuses to write more, as on a full disk."""
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); import sys; "
        "sys.dont_write_bytecode = True; from ruvllm.cli import main; raise SystemExit(main())"
    )
    with fake_hub(o__tiny=gguf_repository()) as hub:
        assert user.run("-c", script, "pull", "o/tiny:Q4_K_M", url=hub.url).path.read_bytes() == Q4
        said = user.run("-c", script, "pull", "o/tiny:Q8_0", url=hub.url).said
    assert said.startswith("o/tiny: no space left in ") and "HF_HOME" in said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
        (OSError(errno.EACCES, "Permission denied", "/x"), "cannot write /x: Permission denied"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "the connection to"),
        (ValueError("line\n\nline"), "failed (ValueError: line); check"),
    ],
)
def test_reasons(error: Exception, said: str) -> None:
    assert said in hf_hub._reason(error)


def test_a_cache_that_is_a_file(user: User) -> None:
    (user.home / "hf").write_bytes(b"")
    with fake_hub(o__tiny=gguf_repository()) as hub:
        assert "HF_HOME" in user.pull(hub, "o/tiny:Q4_K_M").said


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "architectures: found MambaForCausalLM"),
        (
            {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "hqq"}},
            "found HQQ: quantised weights",
        ),
    ],
)
def test_another_architecture_is_refused_before_its_weights_are_fetched(
    user: User, config: dict[str, Any], said: str
) -> None:
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": b"large", "tokenizer.json": b"{}"}
    with fake_hub(o__tiny=Repository(files)) as hub:
        assert said in user.pull(hub, "o/tiny").said
        assert "model.safetensors" not in hub.fetched()


@pytest.mark.parametrize("variant", tiny_checkpoints.VARIANTS)
def test_no_family_that_runs_is_refused(variant: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoints.read(variant)
    for config in (checkpoint.config, checkpoint.new_config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        refuse_other_architectures(tmp_path)


def test_an_index_of_a_stranger_is_refused(user: User) -> None:
    files = {"config.json": LLAMA, "model.safetensors.index.json": b'{"weight_map": {"a": "../../etc/x.safetensors"}}'}
    with fake_hub(o__tiny=Repository(files)) as hub:
        assert "weight_map: found the shard '../../etc/x.safetensors'" in user.pull(hub, "o/tiny").said


def test_an_existing_path_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hf_hub, "fetch", None)
    assert hub.resolve("owner/name") == Path("owner/name")
    with pytest.raises(FileNotFoundError, match="OWNER/NAME on the Hugging Face Hub"):
        hub.resolve("owner/name.gguf")
