"""One model over several ranks: the same logits, answers and training as on one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ruvllm.quantizing import quantize
from tests.model import tiny_checkpoints
from tests.ranks.launching import OPEN_MPI, ROOT, SECONDS, case, run, run_each
from tests.ranks.namespaces import Unavailable, namespaces

# Biases, norms of heads and of rows, windows, sinks, experts with biases or with a shared one, one kv head, tied heads.
VARIANTS = ("gemma3", "gpt_oss_mxfp4", "olmo2", "qwen2", "qwen2_moe")


@pytest.mark.parametrize(("ranks", "parts"), [(2, [2, 1]), (3, [1, 1, 1])])
def test_sums_give_the_logits_of_one_rank(ranks: int, parts: list[float], tmp_path: Path) -> None:
    paths = {}
    for variant in VARIANTS if ranks == 2 else ("qwen3", "qwen2_moe"):
        directory = tiny_checkpoints.write_checkpoint(tmp_path / variant, tiny_checkpoints.read(variant))
        paths[str(directory)] = "f32"
    (tmp_path / "paths.json").write_text(json.dumps(paths))
    found = case(ranks, "logits", json.dumps(parts), "f32", str(tmp_path / "paths.json"))
    for path, differences in found.items():
        assert isinstance(differences, dict), (path, differences)
        assert differences.pop("changed by it") > 0.01
        for what, difference in differences.items():
            # A key that a sum in another order rounds the other way differs by a step of the cache's numbers.
            limit = 0.05 if "int8" in what else 0.01 if "f16" in what else 1e-4
            assert difference <= limit, (path, what)


@pytest.mark.parametrize(("ranks", "parts"), [(2, [2, 1]), (3, [1, 1, 1])])
def test_all_gathers_give_the_bits_of_one_rank(ranks: int, parts: list[float], tmp_path: Path) -> None:
    """Groups of 32 need not be whole on a rank, so what sums cannot divide is divided here."""
    paths = {}
    for variant in VARIANTS if ranks == 2 else ("qwen3", "qwen2_moe"):
        directory = tiny_checkpoints.write_checkpoint(tmp_path / variant, tiny_checkpoints.read(variant))
        paths[str(directory)] = "f32" if variant == "olmo2" else "int8"
    (tmp_path / "paths.json").write_text(json.dumps(paths))
    for path, differences in case(ranks, "logits", json.dumps(parts), "exact", str(tmp_path / "paths.json")).items():
        assert isinstance(differences, dict), (path, differences)
        assert differences.pop("changed by it") > 0.01
        assert not any(differences.values()), (path, differences)


@pytest.mark.parametrize("ranks", [2, 3])
def test_smollm2_says_on_ranks_what_it_says_on_one(ranks: int, smollm2_path: Path, tmp_path: Path) -> None:
    q8_0 = quantize(smollm2_path, tmp_path / "q8_0.gguf", "q8_0")
    models = [f"{smollm2_path}=auto", f"{q8_0}=auto", f"{smollm2_path}=f32"]
    found = case(ranks, "smollm2", *(models if ranks == 2 else models[:1]))
    for given, results in found.items():
        together, alone = results["answers"]
        assert together == alone and len(alone) == 64, given
        together, alone = results["perplexities"]
        assert together == pytest.approx(alone, rel=1e-4 if given.endswith("f32") else 0, abs=0), given
        assert results["difference"] <= (1e-3 if given.endswith("f32") else 0), given


@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_in_half_precision(ranks: int) -> None:
    found = case(ranks, "halves")
    # Each number, and each sum of two, is rounded by at most 2^-11 of itself.
    assert all(0 < error <= (1 + ranks) * 2**-11 for error in found["errors"])
    assert found["sent"] == 2 * (1 + 31 + 577 + 5)
    assert found["equal"] and found["refused"] == [True] * ranks


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA limits what a process allocates on Linux alone")
def test_a_model_loads_where_no_rank_could_hold_it(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUVLLM_PACKED_CACHE", "0")  # mapped weights are not allocated
    found = case(2, "limited", str(smollm2_path))
    assert found["refused"] == [True, True] and "allocate" in found["alone"]
    assert len(found["ids"]) == 8
    assert all(held < 0.6 * found["whole"] for held in found["held"])


def test_an_answer_is_that_of_one_rank(model: Path) -> None:
    found = case(2, "facade", str(model))
    together, alone = found["answers"]
    assert together == alone and sum(map(len, alone)) > 20
    assert found["perplexities"][0] == pytest.approx(found["perplexities"][1], rel=1e-4)
    assert len(found["refused"]) == 4
    assert all("not for a model that is split over ranks" in said for said in found["refused"])
    np.testing.assert_allclose(found["forks"][0], found["forks"][1], atol=1e-4)
    assert found["whole"]


@pytest.mark.parametrize("delay", ["", "0.5ms", "2ms"])
def test_ranks_in_two_namespaces_talk_over_their_network(delay: str, model: Path) -> None:
    if OPEN_MPI:
        pytest.skip("ranks are started in namespaces by MPICH's mpiexec alone")
    try:
        with namespaces(delay) as joined:
            before = joined.received()
            found = case(2, "facade", str(model), joined=joined)
            assert joined.received() - before > 100_000
    except Unavailable as error:
        pytest.skip(f"network namespaces: {error}")
    together, alone = found["answers"]
    assert together == alone and sum(map(len, alone)) > 20


def test_perplexity_and_training_over_data(model: Path) -> None:
    found = case(2, "data", str(model))
    assert found["perplexities"][0] == found["perplexities"][1]
    together, alone = found["losses"]
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert found["equal on all ranks"]
    assert all(said.startswith("rank 1: expected the text of rank 0, found 111 tokens") for said in found["refused"])


@pytest.mark.skipif(OPEN_MPI, reason="Open MPI 5 does not tell a rank that its stdin has ended")
@pytest.mark.parametrize("split", ["data", "model"])
def test_perplexity_of_what_rank_0_reads(split: str, model: Path) -> None:
    """Only rank 0 has stdin."""
    options = "perplexity", str(model), "-f", "-", "-c", "16", "--weights", "f32"
    wire = ("--wire", "exact") if split == "model" else ()
    code, out, err = run(2, "ruvllm", *options, "--split", split, *wire, stdin="ab ba " * 40)
    assert (code, err) == (0, "")
    alone = subprocess.run(
        [sys.executable, "-m", "ruvllm", *options], input="ab ba " * 40, text=True, cwd=ROOT, capture_output=True,
        timeout=SECONDS, check=True,
    )  # fmt: skip
    assert out == alone.stdout


def test_the_command_line(model: Path) -> None:
    """Rank 0 alone talks, and says what the command says without mpiexec."""
    options = ["-n", "12", "--raw", "--threads", "1", "--quiet"]
    # Open MPI 5 does not tell a rank that its stdin has ended.
    given: dict[str, Any] = {} if OPEN_MPI else {"stdin": "ab ba"}
    code, out, err = run(2, "ruvllm", "generate", str(model), *["ab ba"] * OPEN_MPI, *options, **given)
    alone = subprocess.run(
        [sys.executable, "-m", "ruvllm", "generate", str(model), *options], input="ab ba", text=True, cwd=ROOT,
        capture_output=True, timeout=SECONDS, check=True,
    )  # fmt: skip
    assert (code, out, err) == (0, alone.stdout, "")
    code, out, err = run(2, "ruvllm", "info", str(model), "--shares", "1,1")
    assert code == 0
    assert [line.split()[1] for line in out.splitlines() if line.startswith("  rank ")] == ["0", "1"]
    assert "heads 0-1 (key/value 0)" in out and "heads 2-3 (key/value 1)" in out


def test_info_shows_the_shares_of_a_wire(smollm2_path: Path) -> None:
    """Of SmolLM2 in 4 bits: sums need whole groups of 32 columns on each rank."""
    held = {}
    for wire in ("auto", "exact", "f32"):
        code, out, _ = run(2, "ruvllm", "info", str(smollm2_path), "--shares", "5,2", "--wire", wire)
        assert code == 0
        held[wire] = [line.partition("free; ")[2] for line in out.splitlines() if line.startswith("  rank ")]
    assert len(held["auto"]) == 2
    assert held["auto"] == held["exact"] != held["f32"]


def test_what_may_differ_between_ranks(model: Path, tmp_path: Path) -> None:
    """Threads, and where each machine has the model."""
    other = tmp_path / "copy.gguf"
    other.write_bytes(model.read_bytes())
    ask = "-m", "ruvllm", "generate"
    options = "-p", "ab ba", "--raw", "-n", "5"
    code, out, err = run_each(
        (*ask, str(model), *options, "--threads", "1", "--quiet"), (*ask, str(other), *options, "--threads", "2")
    )
    assert (code, err) == (0, "") and out


@pytest.mark.skipif(OPEN_MPI, reason="Open MPI 5 does not tell a rank that its stdin has ended")
def test_a_chat_shows_where_to_type(model: Path) -> None:
    """mpiexec hands rank 0 a pipe, also of what is typed."""
    options = "--chat-template", "{{ messages[-1].content }}", "-n", "3", "--temp", "0"
    code, out, err = run(2, "ruvllm", "chat", str(model), *options, stdin="ab\nba\n")
    assert code == 0 and out.count("\n") == 2, err
    assert "/help lists the commands" in err and err.count("> ") == 3
    code, quiet, err = run(2, "ruvllm", "chat", str(model), *options, "--quiet", stdin="ab\nba\n")
    assert (code, quiet, err) == (0, out, "")
