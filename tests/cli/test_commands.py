"""The other commands: memory, pull, perplexity, info, warmup; and help."""

import re
import subprocess
import sys

import pytest

from ruvllm.checkpoint import hub
from ruvllm.cli import main, parser
from tests.processes import ROOT, python


def test_two_dashes_before_nothing(llm, tmp_path, capsys):
    file = tmp_path / "-f"
    file.write_text("some text", encoding="utf-8")
    assert main(["perplexity", "m", "--", str(file)]) == 0
    assert main(["memory", "llama3-8b", "--"]) == 0
    assert "LLaMA3-8B" in capsys.readouterr().out


def test_a_small_context_is_taken_as_it_is(llm, tmp_path):
    llm.config.max_position_embeddings = 256
    file = tmp_path / "t.txt"
    file.write_text("some text", encoding="utf-8")
    assert main(["perplexity", "m", str(file)]) == 0
    assert llm.asked[0][1]["context"] == 256


def test_memory_table_has_the_known_figures(capsys):
    assert main(["memory"]) == 0
    weights, caches = capsys.readouterr().out.split("1000 tokens")
    rows = {line.split()[0]: line.split() for line in weights.splitlines() if line.strip()}
    # Parameters: the models' published sizes. FP16: two bytes each. INT4: 4.5 bits a weight.
    assert rows["LLaMA2-7B"][1:5] == ["6.74", "B", "13.48", "GB"]
    assert rows["LLaMA2-13B"][1:5] == ["13.02", "B", "26.03", "GB"]
    assert rows["LLaMA3-8B"][1:5] == ["8.03", "B", "16.06", "GB"]
    assert rows["Mistral-7B"][1:5] == ["7.24", "B", "14.48", "GB"]
    assert float(rows["LLaMA2-7B"][7]) == pytest.approx(6.738 * 4.5 / 8, abs=0.01)
    rows = {line.split()[0]: line.split() for line in caches.splitlines() if line.strip()}
    # 2 · 32 layers · 8 heads · 128 · 2 bytes · 1024 positions, whole blocks of 256
    assert rows["LLaMA3-8B"][1:3] == ["134.2", "MB"]
    # Of 32768 positions a window of 4096 needs 17 blocks of 256.
    assert rows["Mistral-7B"][7:] == ["32,768", "570.4", "MB"]


def test_memory_of_one_configuration(capsys):
    assert main(["memory", "Mistral-7B"]) == 0
    out = capsys.readouterr().out
    assert "Mistral-7B" in out
    assert "LLaMA" not in out


def test_pull_lists_and_fetches(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RUVLLM_CACHE", str(tmp_path))
    assert main(["pull"]) == 0
    out = capsys.readouterr().out
    assert "smollm2-135m" in out and "gemma3-270m" in out
    assert "Gemma Terms of Use: https://ai.google.dev/gemma/terms" in out
    asked = []
    monkeypatch.setattr(hub, "pull", lambda name, **options: asked.append((name, options)) or tmp_path / name)
    assert main(["pull", "a", "--verify", "b"]) == 0
    assert asked == [("a", {"verify": True}), ("b", {"verify": True})]
    assert capsys.readouterr().out == f"{tmp_path / 'a'}\n{tmp_path / 'b'}\n"


def test_perplexity_takes_the_text_last(llm, tmp_path, capsys):
    file = tmp_path / "t.txt"
    file.write_text("some text", encoding="utf-8")
    for argv in ([str(file)], ["m.gguf", str(file)], ["-m", "m.gguf", "-f", str(file), "-c", "64"]):
        assert main(["perplexity", *argv]) == 0
    assert [options["context"] for _, options in llm.asked] == [512, 512, 64]
    assert {text for text, _ in llm.asked} == {"some text"}
    assert llm.loaded[0] == "m.gguf"
    assert capsys.readouterr().out.count("perplexity 12.3457 +/- 0.5000") == 3


def test_one_rank_says_that_it_has_no_shares(capsys, caplog):
    assert main(["info", "--shares", "2,1", "--wire", "f32"]) == 0
    assert "--shares, --wire: ignored, as there is one rank" in caplog.messages
    caplog.clear()
    assert main(["info"]) == 0
    assert not caplog.messages


@pytest.mark.parametrize("command", ["pull", "generate", "chat", "info", "perplexity", "memory", "warmup"])
def test_every_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: ruvllm {command} [options]" in capsys.readouterr().out


def test_the_help_of_pull_shows_each_option_in_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["pull", "--help"])
    _, examples = capsys.readouterr().out.split("examples:\n")
    lines = [line.split()[1:] for line in examples.splitlines() if line.startswith("  ruvllm pull ")]
    parsed = [parser.parse(line) for line in lines]
    assert any(args.pack for args in parsed) and any(args.verify for args in parsed)


def test_piped_output_has_no_colours_and_fits_no_terminal():
    shown = python("-m", "ruvllm", "memory")
    assert "\x1b" not in shown and "..." not in shown


COMPILES = """
import sys
from ruvllm import compiling
from ruvllm.cli import main
compiling.is_warm, compiling.mark_warm = lambda what: False, print
compiling._run_tiny_model = print
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("options", "said"), [([], 1), (["-q"], 0)])
def test_compiling_is_said_where_no_bar_can_be_seen(smollm2_path, options, said):
    result = subprocess.run(
        [sys.executable, "-c", COMPILES, "generate", str(smollm2_path), "x", "-n", "1", *options],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    line = "ruvllm: compiling kernels for this kind of model: some 10 s, the first time only"
    assert result.stderr.count(line) == said


def test_info_tells_what_a_model_takes(smollm2_path):
    shown = python("-m", "ruvllm", "info", smollm2_path)
    assert "96.6 MB as it is loaded (--weights auto)" in shown  # 96,576,768 bytes: see test_memory
    assert re.search(r"rounded then +nothing\b", shown)
    assert "FP16 269.0 MB, INT8 143.0 MB, INT4 75.7 MB" in shown


def test_closed_pipe_is_quiet():
    process = subprocess.Popen(
        [sys.executable, "-m", "ruvllm", "memory"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 141


def test_help_and_memory_load_no_compiler():
    python("-c", "import sys; from ruvllm.cli import main; main(['memory']); sys.exit('numba' in sys.modules)")
