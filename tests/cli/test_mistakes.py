"""Command lines with mistakes: one line that names the mistake, and exit code 2."""

import pytest

from ruvllm.cli import main
from ruvllm.errors import DownloadError
from tests.cli.fakes import FakeStream
from tests.processes import ROOT

# The help of llama.cpp's command line (tools/cli/README.md), options of one dash and more than one letter.
LLAMA_CPP = """
-cl -tb -Cr -Cb -Crb -ub -fa -bf -kvo -nkvo -nr -ctk -ctv -dt -np -dio -ndio -lm -dev -ot -cmoe -ncmoe -ngl -sm -ts -mg
-fit -fitt -fitc -mu -dr -hf -hfr -hff -hft -lv -ctkd -ctvd -jf -bs -co -ctxcp -cram -sys -sysf -sp -cnv -no-cnv -st
-mli -mm -mmu -mmdev -rea -hfd -hfrd -td -tbd -Cd -Crd -Cbd -otd -cmoed -ncmoed -devd -ngld -md
"""


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--dry-base 2", "--dry-base: only with --dry-multiplier"),
        ("--xtc-threshold 0.2 --xtc-probability 0", "--xtc-threshold: only with --xtc-probability"),
        ("--mirostat-eta 0.2", "--mirostat-eta: only with --mirostat"),
        ("-l 42", "--logit-bias: expected ID+X or ID-X, such as 42-1.5, found '42'"),
        ("-l x+1", "--logit-bias: expected ID+X or ID-X"),
        ("-l 42+inf", "--logit-bias: expected ID+X or ID-X"),
    ],
)
def test_samplers_that_are_half_said(llm, capsys, argv, said):
    assert main(["generate", "m", "x", *argv.split()]) == 2
    assert f"ruvllm: error: {said}" in capsys.readouterr().err
    assert llm.loaded is None


def test_a_file_that_is_no_text_is_named(llm, tmp_path, capsys):
    file = tmp_path / "picture"
    file.write_bytes(b"ab\xff\x00")
    assert main(["perplexity", "m", str(file)]) == 2
    assert capsys.readouterr().err == f"ruvllm: error: {file}: expected a text in UTF-8, found byte 0xff at 2\n"


@pytest.mark.parametrize("argv", [["m"], ["m", "-"], ["m", "-f", "-"], ["m", ""], ["m", "-p", " "]])
def test_no_prompt_is_said_and_not_answered(llm, piped, capsys, argv):
    piped("\n")
    assert main(["generate", *argv]) == 2
    assert capsys.readouterr().err.startswith("ruvllm: error: no prompt: ")
    assert llm.asked == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["generate"], "which model?"),
        (["generate", "m", "a", "b"], "unexpected argument 'b'"),
        (["generate", "m", "a", "-p", "b"], "prompt given twice"),
        (["generate", "m", "a", "-f", "b"], "prompt given twice"),
        (["generate", "m", "-f", "no/such/file"], "no/such/file: No such file"),
        (["generate", "m", "a", "--raw", "--system", "s"], "--raw"),
        (["chat", "m", "a"], "unexpected argument 'a'"),
        (["perplexity", "m", "a", "b"], "unexpected argument"),
        (["info", __file__], "expected b'GGUF', with which every GGUF file begins"),
        (["info", str(ROOT)], "found no config.json in this directory, expected the directory of a Hugging Face model"),
        (["memory", "gpt-17"], "no configuration or file called 'gpt-17': known configurations are llama2-7b"),
        (["warmup", "x"], "unexpected argument 'x'"),
        (["pull", "no-such-model"], "no model called 'no-such-model': known names are smollm2-135m, gemma3-270m;"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(llm, capsys, argv, said):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ruvllm: error: ")
    assert said in err
    assert err.count("\n") == 1
    assert llm.asked == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "COMMAND"),
        (["generatee"], "invalid choice: 'generatee'"),
        (["generate", "m", "x", "--heat", "0.5"], "unknown option --heat; a text that begins"),
        (["generate", "m", "x", "--heat", "0.5"], '"--" (see `ruvllm generate --help`)'),
        (["generate", "m", "x", "--temprature", "1"], "unknown option --temprature: did you mean --temperature? (see"),
        (["generate", "--tmp=1", "m", "x"], "unknown option --tmp: did you mean --temp? (see `ruvllm generate --help`"),
        (["generate", "m", "x", "--max_tokens", "5"], "unknown option --max_tokens: did you mean --max-tokens? (see"),
        (["pull", "smollm2-135m", "--pak"], "unknown option --pak: did you mean --pack? (see `ruvllm pull --help`)"),
        (["warmup", "--temprature", "1"], "unknown option --temprature; a text that begins"),  # not of this command
        (["generate", "m", "-hello"], 'unknown option -hello; a text that begins with "-" goes last, after "--"'),
        (["generate", "m", "-for what?"], "unknown option '-for what?'; a text"),
        (["generate", "m", "-ngl", "99", "x"], "-ngl is an option of llama.cpp that ruvllm lacks: ruvllm runs on"),
        (["generate", "-ngl", "99", "-m", "m", "-p", "x"], "-ngl is an option of llama.cpp that ruvllm lacks"),
        (["generate", "m", "x", "--n-gpu-layers=99"], "--n-gpu-layers is an option of llama.cpp that ruvllm lacks"),
        (["generate", "m", "-fa", "x"], "-fa is an option of llama.cpp that ruvllm lacks: attention always"),
        (["chat", "m", "-sys", "Be kind."], "-sys is an option of llama.cpp that ruvllm lacks: use --system (see"),
        (["chat", "-hf", "o/n"], "-hf is an option of llama.cpp that ruvllm lacks: give OWNER/NAME, OWNER"),
        (["chat", "m", "-mli"], "-mli is an option of llama.cpp that ruvllm lacks: use `ruvllm chat`"),
        (["perplexity", "m", "f", "-ctk", "q8_0"], "-ctk is an option of llama.cpp that ruvllm lacks: use --kv"),
        (["generate", "m", "x", "-n", "many"], "-n/--max-tokens/--n-predict/--max-new-tokens: invalid integer value"),
        (["generate", "m", "x", "-n", "0"], "--max-new-tokens: expected 1 or more or -1 or -2, found 0"),
        (["generate", "m", "x", "-n", "-5"], "--max-new-tokens: expected 1 or more or -1 or -2, found -5"),
        (["generate", "m", "x", "-s", "-2"], "-s/--seed: expected 0 or more or -1, found -2"),
        (["chat", "m", "-c", "-1"], "-c/--ctx-size/--context: expected 0 or more, found -1"),
        (["chat", "m", "-t", "0"], "-t/--threads: expected 1 or more, found 0"),
        (["chat", "m", "--temp", "-0.1"], "--temp/--temperature: expected a number of 0 or more, found -0.1"),
        (["chat", "m", "--temp", "nan"], "--temp/--temperature: expected a number of 0 or more, found nan"),
        (["chat", "m", "--top-k", "-1"], "--top-k: expected 0 or more, found -1"),
        (["chat", "m", "--top-p", "0"], "--top-p: expected a number above 0, at most 1, found 0"),
        (["chat", "m", "--min-p", "1.5"], "--min-p: expected a number of 0 or more, at most 1, found 1.5"),
        (["chat", "m", "--repeat-penalty", "inf"], "--repetition-penalty: expected a number above 0, found inf"),
        (["generate", "m", "x", "--weights", "f64"], "invalid choice: 'f64'"),
    ],
)
def test_lines_that_cannot_be_read_are_one_line_too(capsys, argv, said):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ruvllm: error: ")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("option", LLAMA_CPP.split())
def test_no_option_of_llama_cpp_is_read_as_another(llm, capsys, option):
    """All options of one dash and several letters that its help lists; argparse would take -ngl for -n gl."""
    with pytest.raises(SystemExit):
        main(["generate", "m", "x", option, "1"])
    assert f"error: {option} is an option of llama.cpp that ruvllm lacks: " in capsys.readouterr().err
    assert llm.loaded is None


def test_no_prompt_at_a_terminal_does_not_wait_for_one(llm, typed, capsys):
    typed()
    assert main(["generate", "m"]) == 2
    assert "no prompt: give one" in capsys.readouterr().err


def test_foreseen_errors_show_no_type_unforeseen_ones_do(llm, capsys, monkeypatch):
    llm.answers = [FakeStream([], DownloadError("no room"))]
    assert main(["generate", "m", "x"]) == 2
    assert capsys.readouterr().err == "ruvllm: error: no room\n"
    llm.answers = [FakeStream([], TypeError("two\nlines"))]
    assert main(["generate", "m", "x"]) == 2
    assert capsys.readouterr().err == "ruvllm: error: TypeError: two lines (--debug shows where)\n"


@pytest.mark.parametrize("argv", [["--debug", "generate", "m", "x"], ["generate", "m", "x", "--debug"]])
def test_debug_shows_the_trace(llm, capsys, argv):
    llm.answers = [FakeStream([], ValueError("odd"))]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("ruvllm: error: odd\n")


def test_interrupt_exits_with_130(llm, capsys):
    llm.answers = [FakeStream(["Hel"], KeyboardInterrupt())]
    assert main(["generate", "m", "x"]) == 130
    assert "Traceback" not in capsys.readouterr().err
