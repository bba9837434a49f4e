"""When a rank fails, or differs from the others: all end, with one clear line, and none waits for ever."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.ranks.launching import OPEN_MPI, SECONDS, case, run, run_each, said, start


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


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (("-p", "Hi"), ("-p", "Hi", "--wire", "bad"), "rank 1: argument --wire: invalid choice: 'bad'"),
        (("-p", "Hi", "--wire", "bad"), ("-p", "Hi"), "argument --wire: invalid choice: 'bad'"),
        (("-p", "Hi", "--nonsense"), ("-p", "Hi", "--nonsense"), "unknown option --nonsense"),
        (("-p", "Hi"), ("-p", "Hi", "--wire", "f16"), "rank 1: expected the option wire of rank 0, found f16, rank 0"),
        (("-p", "Hi"), ("-p", "Hi", "--shares", "1,2"), "rank 1: expected the option shares of rank 0, found [1.0"),
        (("-p", "Hi"), ("-p", "Ho"), "rank 1: expected the text of rank 0, found Ho, rank 0 has Hi"),
        ((), ("-p", "Ho"), "rank 1: expected the text of rank 0, found Ho, rank 0 has None"),
    ],
)  # fmt: skip
def test_command_lines_that_cannot_be_read_or_differ_end_all(
    first: tuple[str, ...], second: tuple[str, ...], said: str, model: Path
) -> None:
    ask = "-m", "ruvllm", "generate", str(model), "--raw"
    code, out, err = run_each((*ask, *first), (*ask, *second))
    assert (code, out) == (2, "")
    assert err.startswith(f"ruvllm: error: {said}") and err.count("\n") == 1


def test_other_commands_end_all(model: Path) -> None:
    code, out, err = run_each(("-m", "ruvllm", "generate", str(model), "Hi"), ("-m", "ruvllm", "chat", str(model)))
    assert (code, out) == (2, "")
    assert err == "ruvllm: error: rank 1: expected the command of rank 0, found chat, rank 0 has generate\n"


def test_a_program_that_never_comes_to_mpi_ends_all(model: Path) -> None:
    """Such as another version, which cannot read an option: MPI's initialisation would wait for it for ever."""
    command = "-m", "ruvllm", "generate", str(model), "Hi"
    code, out, err = run_each(command, ("-c", "raise SystemExit(2)"), RUVLLM_START_SECONDS="2")
    assert code != 0
    assert err.startswith("ruvllm: error: rank 0: waited 2 s for all ranks: ") or OPEN_MPI  # ends all by itself
    assert "ruvllm" not in out and err.count("ruvllm") <= 1
    code, out, err = run_each(command, command, RUVLLM_START_SECONDS="soon")
    assert code != 0 and "ruvllm: error: RUVLLM_START_SECONDS: expected seconds, found 'soon'" in err


def test_training_data_that_differ_end_all(model: Path, tmp_path: Path) -> None:
    """Each rank reads its own."""
    for name, text in (("0", "ab ba " * 40), ("1", "ba ab " * 50)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").write_text(text)
    run_there = "import os, sys; from ruvllm.cli import main; os.chdir({!r}); sys.exit(main())"
    of_each = [("-c", run_there.format(str(tmp_path / name))) for name in "01"]
    train = "train", str(model), "--data", "text", "-c", "16", "--steps", "2", "--out", str(tmp_path / "out")
    code, out, err = run_each(*((*each, *train) for each in of_each))
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]  # before it, a first training says that it compiles
    assert last.startswith("ruvllm: error: rank 1: expected the data of rank 0, found ")
    assert err.count("ruvllm: error: ") == 1


def test_an_exception_of_one_rank_ends_all(model: Path) -> None:
    """In the user's program, before the rank follows."""
    code, err = end_of("raises", model)
    assert code == 2
    assert err.startswith("Traceback") and err.endswith("KeyError: 'of the program'\n")


def test_a_rank_that_does_not_follow_ends_all(model: Path) -> None:
    code, err = end_of("leaves", model)
    assert code == 2
    assert err == "ruvllm: error: rank 1: its program has ended, but rank 0 uses the model: call follow() on it\n"


def test_programs_that_end_without_a_word(model: Path) -> None:
    """A model that is used by none, one that rank 0 has dropped, one that was closed."""
    found = case(2, "ends", str(model))
    assert found == {"first": "the other ranks have ended: this model was closed"}
    found = case(2, "follows_again", str(model))
    assert found == {"second": "follow: rank 0 has closed this model; load it again"}


def test_shares_that_differ_are_refused(model: Path) -> None:
    found = case(2, "shares", str(model))
    assert found == {"error": "rank 1: expected the shares of rank 0, found [1, 3], rank 0 has [1, 2]"}
