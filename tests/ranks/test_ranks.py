"""One model over several ranks: the same logits, answers and training as on one; and what happens when a rank fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ruvllm.kernels.threads.pool import physical_cores
from ruvllm.quantizing import quantize
from tests.model import tiny, tiny_checkpoints
from tests.ranks.namespaces import Namespaces, Unavailable, namespaces

pytest.importorskip("mpi4py", reason="mpi4py is not installed: it is in the extra ruvllm[mpi]")
MPIEXEC = Path(sys.executable).with_name("mpiexec")
if not MPIEXEC.exists():
    found = shutil.which("mpiexec")
    if found is None:
        pytest.skip("there is no mpiexec: install mpich or openmpi, as ruvllm[mpi] does", allow_module_level=True)
    MPIEXEC = Path(found)

OPEN_MPI = "Open MPI" in subprocess.run([MPIEXEC, "--version"], capture_output=True, text=True, check=True).stdout
ROOT = Path(__file__).parents[2]
SECONDS = 150  # in which a hanging rank is noticed; on an idle machine each run takes a few


def start(ranks: int, *command: str, joined: Namespaces | None = None) -> subprocess.Popen[str]:
    launch = [str(MPIEXEC), "-n", str(ranks)] if joined is None else joined.command(str(MPIEXEC))
    launch += [sys.executable, "-m", *command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    if ranks > physical_cores():  # MPICH's ranks wait without leaving their core: a message takes four times as long
        environment |= {"MPIR_CVAR_ENABLE_HEAVY_YIELD": "1", "MPIR_CVAR_POLLS_BEFORE_YIELD": "1"}
    if OPEN_MPI:  # which else refuses root, and more ranks than cores
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        environment |= {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    return subprocess.Popen(
        launch, env=environment, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def run(
    ranks: int, *command: str, stdin: str | None = None, joined: Namespaces | None = None
) -> tuple[int, str, str]:  # fmt: skip
    """Exit code, stdout and stderr."""
    process = start(ranks, *command, joined=joined)
    try:
        out, err = process.communicate(stdin, timeout=SECONDS)
    finally:
        process.kill()
    return process.returncode, out, said(err)


def said(err: str) -> str:
    """What ranks wrote to stderr, without what Open MPI's mpiexec adds to an exit code that is not 0."""
    return err.partition("-" * 70)[0] if OPEN_MPI else err


def case(ranks: int, name: str, *arguments: str, joined: Namespaces | None = None) -> dict[str, Any]:
    code, out, err = run(ranks, "tests.ranks.rank_cases", name, *arguments, joined=joined)
    assert code == 0, err
    answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    return answer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two kv heads with a tokenizer; its rows are whole blocks of 32."""
    return tiny.write_gguf("llama3_scaled_gqa", tmp_path_factory.mktemp("model") / "model.gguf")


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
    assert "not for a model that is split over ranks" in found["refused"]
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


def test_errors_are_one_line_of_rank_0(tmp_path: Path, model: Path) -> None:
    missing = tmp_path / "missing.gguf"
    code, out, err = run(2, "ruvllm", "generate", str(missing), "hi")
    assert (code, out) == (2, "")
    assert err.startswith("ruvllm: error: ") and str(missing) in err and err.count("\n") == 1
    code, out, err = run(2, "ruvllm", "generate", str(model), "hi", "--shares", "1,1,1")
    assert (code, out) == (2, "")
    assert err == "ruvllm: error: shares: expected 'auto' or 2 numbers, one for each rank, found [1.0, 1.0, 1.0]\n"
    code, out, err = run(3, "ruvllm", "train", str(model), "--split", "model", "--data", "x.jsonl")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and "--split model" in err


def test_ranks_must_have_the_same_version_and_file(model: Path, tmp_path: Path) -> None:
    found = case(2, "versions", str(model))
    assert "rank 1: expected the version of rank 0, found 0.0.9" in found["error"]
    content = bytearray(model.read_bytes())
    (tmp_path / "0.gguf").write_bytes(content)
    content[-7] ^= 1  # a weight
    (tmp_path / "1.gguf").write_bytes(content)
    found = case(2, "files", str(tmp_path / "%.gguf"))
    assert "rank 1: expected the file of rank 0" in found["error"]
    (tmp_path / "1.gguf").unlink()
    found = case(2, "files", str(tmp_path / "%.gguf"))
    assert found["type"] == "RankError" and "rank 1: " in found["error"] and "1.gguf" in found["error"]


def end_of(failure: str, model: Path) -> tuple[int, str]:
    """Exit code and stderr of two ranks of which one fails, all within 10 s after that."""
    process = start(2, "tests.ranks.rank_cases", failure, str(model))
    try:
        assert process.stdout is not None and process.stdout.readline() == "fails\n"
        _, err = process.communicate(timeout=10)
    finally:
        process.kill()
    return process.returncode, said(err)


def test_a_rank_that_is_killed_ends_all(model: Path) -> None:
    """The others are killed by mpiexec, which says why: no rank gets to say anything."""
    code, err = end_of("killed", model)
    assert code != 0
    assert "Traceback" not in err and "ruvllm" not in err


def test_a_rank_without_memory_ends_all(model: Path) -> None:
    code, err = end_of("out_of_memory", model)
    assert code == 2
    assert err == "ruvllm: error: rank 1: KV cache: 9.0 GB needed, 1.0 GB free\n"


@pytest.mark.skipif(OPEN_MPI, reason="Open MPI's mpiexec answers Ctrl-C itself: it ends all ranks")
def test_ctrl_c_ends_an_answer_and_not_the_model(model: Path) -> None:
    process = start(2, "tests.ranks.rank_cases", "interrupted", str(model))
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, err
    before, after = json.loads(out.splitlines()[-1])["answers"]
    assert before == after
