"""The command line: what it passes to the library, what it prints where, and its exit codes."""

import io
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import ruvllm
from ruvllm.checkpoint import hub
from ruvllm.checkpoint.reasoning import Piece
from ruvllm.cli import main, parser
from ruvllm.errors import ContextFullError, DownloadError
from ruvllm.model import llama
from ruvllm.model.perplexity import Perplexity
from ruvllm.model.sampling.options import Dry, Mirostat, Xtc
from ruvllm.streaming import Generation, Timings

ALONE = {"comm": None, "shares": None, "wire": "auto"}
DEFAULTS = {"max_tokens": 256, "temperature": 0.0, "seed": None, "cache": None, "kv": "auto"}
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class FakeStream:
    """What `llm.stream` returns: pieces of text, then the result."""

    def __init__(self, pieces, error=None):
        self.pieces = pieces
        self.error = error
        self.result = Generation(
            text="",
            finish_reason="stop",
            timings=Timings(prompt_tokens=7, prompt_seconds=0.25, tokens=26, seconds=2.0),
        )

    def parts(self):
        for piece in self.pieces:
            reasoning = isinstance(piece, Thought)
            if reasoning:
                self.result.reasoning += piece
            else:
                self.result.text += piece
            yield Piece(str(piece), reasoning)
        if self.error is not None:
            raise self.error


class Thought(str):
    """A piece of a FakeStream that is no part of the answer."""


class FakeCache(str):
    """What was asked for, in words; ``max_tokens`` as the length of the words makes a full one."""

    max_tokens = 1000


class FakeLLM:
    """Records what it is asked and answers from a script; the last answer serves ever after."""

    def __init__(self):
        self.config = SimpleNamespace(name="fake", max_position_embeddings=10000)
        self.tokenizer = SimpleNamespace(chat_template="{{ messages }}", named_templates={}, missing=None)
        self.loaded = None
        self.asked = []
        self.answers = [FakeStream(["Hello", " world é"])]

    def load(self, model, **options):
        self.loaded = (model, options)
        return self

    def new_cache(self, max_tokens, kv):
        return FakeCache(f"a cache of {max_tokens} tokens in {kv}")

    def stream(self, prompt, **options):
        self.asked.append((prompt, options))
        if isinstance(self.answers[0], Exception):
            raise self.answers.pop(0)
        if len(self.answers) > 1:
            return self.answers.pop(0)
        return FakeStream(self.answers[0].pieces, self.answers[0].error)

    def perplexity(self, text, **options):
        self.asked.append((text, options))
        return Perplexity(12.345678, 0.5, 2.5, 100, 2, options["context"], 1.25)


@pytest.fixture
def llm(monkeypatch):
    fake = FakeLLM()
    monkeypatch.setattr(ruvllm, "load", fake.load, raising=False)
    return fake


@pytest.fixture
def typed(monkeypatch):
    """Type the given lines at a terminal; an exception in their place is raised there."""

    def type_lines(*lines):
        script = iter(lines)

        def answer(prompt):
            line = next(script, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", answer)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))

    return type_lines


@pytest.fixture
def piped(monkeypatch):
    def pipe(text):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))

    return pipe


# The help of llama.cpp's command line (tools/cli/README.md), options of one dash and more than one letter.
LLAMA_CPP = """
-cl -tb -Cr -Cb -Crb -ub -fa -bf -kvo -nkvo -nr -ctk -ctv -dt -np -dio -ndio -lm -dev -ot -cmoe -ncmoe -ngl -sm -ts -mg
-fit -fitt -fitc -mu -dr -hf -hfr -hff -hft -lv -ctkd -ctvd -jf -bs -co -ctxcp -cram -sys -sysf -sp -cnv -no-cnv -st
-mli -mm -mmu -mmdev -rea -hfd -hfrd -td -tbd -Cd -Crd -Cbd -otd -cmoed -ncmoed -devd -ngld -md
"""

# The command line with a model that answers with characters of one, two and four bytes in UTF-8.
SAYS = """
import sys
import ruvllm
from ruvllm.cli import main
from tests.test_cli import FakeLLM, FakeStream
class Model(FakeLLM):
    def stream(self, prompt, **options):
        print("[asked %a]" % prompt[-1]["content"], file=sys.stderr)
        return FakeStream(["Hello \\u00e9", " \\u2192 \\U0001f600."])
ruvllm.load = Model().load
sys.exit(main())
"""


def run(*argv):
    """A command in a process of its own, as a user starts it, its output in pipes."""
    return subprocess.run(
        [sys.executable, "-m", "ruvllm", *argv], capture_output=True, text=True, encoding="utf-8", cwd=ROOT, timeout=120
    )


def user(text):
    return [{"role": "user", "content": text}]


def test_generate_prints_the_answer_alone_on_stdout(llm, capsys):
    assert main(["generate", "m.gguf", "Hi there"]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello world é\n"
    assert "7 prompt tokens, first token after 0.25 s; 26 tokens, 12.5 tokens/s; reached its end" in err
    assert llm.loaded == ("m.gguf", {"weights": "auto", "threads": None, "mmap": True, **ALONE})
    assert llm.asked == [(user("Hi there"), DEFAULTS)]


@pytest.mark.parametrize(
    "argv",
    [
        ["m.gguf", "-n", "5", "Hi there"],
        ["-n", "5", "m.gguf", "Hi there"],
        ["m.gguf", "Hi there", "--n-predict", "5"],
        ["-m", "m.gguf", "Hi there", "-n", "5"],
        ["-m", "m.gguf", "-p", "Hi there", "--max-new-tokens", "5"],
        ["--model", "m.gguf", "--max-tokens=5", "--prompt", "Hi there"],
    ],
)
def test_operands_may_stand_before_between_and_after_options(llm, argv):
    assert main(["generate", *argv]) == 0
    assert llm.loaded[0] == "m.gguf"
    prompt, options = llm.asked[0]
    assert prompt == user("Hi there")
    assert options["max_tokens"] == 5


@pytest.mark.parametrize(
    "argv",
    [
        "-n 9 --temp 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 --repeat-penalty 1.2 -s 4 --stop A --stop B".split(),
        "--max-tokens 9 --temperature 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.2 --seed 4 "
        "--stop A --stop B".split(),
    ],
)
def test_sampling_options_in_both_spellings(llm, argv):
    assert main(["generate", "m", "x", *argv]) == 0
    assert llm.asked[0][1] == {
        "max_tokens": 9,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "seed": 4,
        "stop": ["A", "B"],
        "cache": None,
        "kv": "auto",
    }


def test_samplers_of_several_options(llm):
    argv = "--presence-penalty -0.5 --frequency-penalty 0.25 --repeat-last-n 64 --typical 0.9 --dry-multiplier 0.8"
    argv += " --dry-base 2 --dry-allowed-length 3 --xtc-probability 0.5 --xtc-threshold 0.2 -l 42-1.5 -l 7-inf"
    assert main(["generate", "m", "x", *argv.split()]) == 0
    assert llm.asked[0][1] == DEFAULTS | {
        "presence_penalty": -0.5, "frequency_penalty": 0.25, "repeat_last_n": 64, "typical_p": 0.9,
        "dry": Dry(0.8, 2.0, 3), "xtc": Xtc(0.5, 0.2), "logit_bias": {42: -1.5, 7: -math.inf},
    }  # fmt: skip
    assert main("generate m x --mirostat 1 --mirostat-ent 4 --mirostat-lr 0.2 --dry-multiplier 0".split()) == 0
    assert llm.asked[1][1] == DEFAULTS | {"mirostat": Mirostat(1, 4.0, 0.2)}


def test_forms_of_answers(llm, tmp_path):
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    for option in ("-j", "--json-schema", "--json-schema-file"):
        for given in ('{"type": "object"}', str(tmp_path / "schema.json")):
            assert main(["generate", "m", "x", option, given]) == 0
    assert all(options == DEFAULTS | {"schema": '{"type": "object"}'} for _, options in llm.asked)
    assert main(["generate", "m", "x", "--grammar", 'root ::= "a"', "--regex", "a+"]) == 0
    assert llm.asked[-1][1] == DEFAULTS | {"grammar": 'root ::= "a"', "regex": "a+"}


def test_who_guesses(llm, capsys):
    assert main(["generate", "m", "x", "--model-draft", "lookup"]) == 0
    assert llm.asked[0][1] == DEFAULTS | {"draft": "lookup"}
    assert main(["generate", "m", "x", "--model-draft", "small"]) == 0
    assert llm.asked[1][1] == DEFAULTS | {"draft": llm}
    assert llm.loaded[0] == "small"


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


def test_loading_options(llm):
    assert main(["generate", "m", "x", "-t", "1", "--weights", "f16", "--no-mmap"]) == 0
    assert llm.loaded[1] == {"weights": "f16", "threads": 1, "mmap": False, **ALONE}


def test_weights_on_offer_are_those_of_the_models():
    assert parser.WEIGHTS == llama.WEIGHTS


def test_context_and_unlimited_answers_get_a_cache(llm, capsys):
    main(["generate", "m", "x", "-c", "64"])
    main(["generate", "m", "x", "-n", "-1"])
    main(["generate", "m", "x", "-n", "-2", "-c", "0"])
    assert [options["cache"] for _, options in llm.asked] == [
        "a cache of 64 tokens in auto",
        "a cache of 8192 tokens in auto",
        "a cache of 10000 tokens in auto",
    ]
    assert [options["max_tokens"] for _, options in llm.asked] == [256, None, None]
    capsys.readouterr()
    assert main(["generate", "m", "x", "-c", "10001"]) == 2
    assert "--context (-c): expected at most 10000 tokens" in capsys.readouterr().err


def test_numbers_that_mean_something_to_users_of_llama_cpp(llm, tmp_path):
    main(["generate", "m", "x", "-s", "-1", "--top-k", "0", "--top-p", "1", "--repeat-penalty", "1"])
    _, options = llm.asked[0]
    assert {"seed": None, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}.items() <= options.items()
    file = tmp_path / "t.txt"
    file.write_text("some text", encoding="utf-8")
    main(["perplexity", "m", str(file), "-c", "0"])
    assert llm.asked[1][1]["context"] == 10000


def test_raw_and_models_without_a_template_get_plain_text(llm):
    main(["generate", "m", "x", "--raw"])
    main(["generate", "m", "x", "--system", "Be brief."])
    llm.tokenizer.chat_template = None
    main(["generate", "m", "x"])
    assert [prompt for prompt, _ in llm.asked] == ["x", [{"role": "system", "content": "Be brief."}, *user("x")], "x"]


def test_quiet_prints_no_times(llm, capsys):
    main(["generate", "m", "x", "-q"])
    assert capsys.readouterr() == ("Hello world é\n", "")


@pytest.mark.parametrize("argv", [["m", "-"], ["m"], ["m", "-f", "-"], ["-m", "m", "-p", "-"]])
def test_prompt_from_stdin(llm, piped, argv):
    piped("from a\npipe ü")
    assert main(["generate", *argv]) == 0
    assert llm.asked[0][0] == user("from a\npipe ü")


def test_the_line_end_of_a_pipe_or_file_is_no_part_of_the_prompt(llm, piped):
    piped("hi\n\n")
    assert main(["generate", "m"]) == 0
    assert llm.asked[0][0] == user("hi\n")


def test_a_full_context_is_no_limit_of_tokens(llm, capsys, monkeypatch):
    llm.answers[0].result.finish_reason = "length"
    monkeypatch.setattr(FakeStream, "__init__", lambda self, *_: vars(self).update(vars(llm.answers[0])))
    main(["generate", "m", "x"])
    assert capsys.readouterr().err.endswith("; stopped at the token limit]\n")
    monkeypatch.setattr(FakeCache, "max_tokens", len("a cache of 64 tokens in auto"))
    main(["generate", "m", "x", "-c", "64"])
    assert capsys.readouterr().err.endswith("; the context is full: --context (-c) sets more]\n")


def test_a_file_that_is_no_text_is_named(llm, tmp_path, capsys):
    file = tmp_path / "picture"
    file.write_bytes(b"ab\xff\x00")
    assert main(["perplexity", "m", str(file)]) == 2
    assert capsys.readouterr().err == f"ruvllm: error: {file}: expected a text in UTF-8, found byte 0xff at 2\n"


def test_prompt_from_a_file(llm, tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("from a file ü\r\n".encode())
    assert main(["generate", "m", "--file", str(file)]) == 0
    assert llm.asked[0][0] == user("from a file ü")


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
        (["info", ROOT], "found no config.json in this directory, expected the directory of a Hugging Face model"),
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


def test_numbers_may_stand_at_their_options(llm):
    assert main(["generate", "m", "x", "-n5", "-s=7", "-c64"]) == 0
    _, options = llm.asked[0]
    assert (options["max_tokens"], options["seed"], options["cache"]) == (5, 7, "a cache of 64 tokens in auto")


@pytest.mark.parametrize(
    "argv",
    [
        ["m", "--", "-hello --there"],
        ["m", "-n", "5", "--", "-hello --there"],
        ["-n", "5", "m", "--", "-hello --there"],
        ["--", "m", "-hello --there"],
    ],
)
def test_what_stands_after_two_dashes_is_no_option(llm, argv):
    assert main(["generate", *argv]) == 0
    assert llm.loaded[0] == "m"
    assert llm.asked[0][0] == user("-hello --there")


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


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "ascii:surrogateescape", "utf-8"])
def test_an_answer_goes_on_after_characters_that_stdout_lacks(encoding):
    """In a process of its own, with the characters that its encoding has."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SAYS, "generate", "m", "x", "-q"], capture_output=True, cwd=ROOT, env=environment,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = "Hello \u00e9 \u2192 \U0001f600.\n".encode(encoding.partition(":")[0], "replace")
    assert done.stdout == expected


def test_what_the_user_chose_for_other_characters_stays():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:backslashreplace"}
    done = subprocess.run(
        [sys.executable, "-c", SAYS, "generate", "m", "x", "-q"], capture_output=True, cwd=ROOT, env=environment,
        timeout=60,
    )  # fmt: skip
    assert done.stdout == b"Hello \\xe9 \\u2192 \\U0001f600.\n"


def test_paths_keep_bytes_that_are_no_text():
    program = "import os; from ruvllm.cli import _print_what_can_be as f; f(); print(os.fsdecode(b'\\xe9/\\xff'))"
    for encoding in ("utf-8", "ascii"):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, cwd=ROOT, timeout=60,
            env={**os.environ, "PYTHONIOENCODING": encoding},
        )  # fmt: skip
        assert done.stdout == b"\xe9/\xff\n"


@pytest.mark.parametrize(
    ("argv", "source", "found"),
    [
        (["generate", "m"], "stdin", "byte 0xe9 at 3"),
        (["chat", "m"], "stdin", "byte 0xe9 at 3"),
        (["perplexity", "m", "-"], "stdin", "byte 0xe9 at 3"),
        (["generate", "m", b"caf\xe9"], "prompt", "byte 0xe9 at 3"),
        (["generate", "m", "x", "--system", b"\xc3\xa9\xff"], "--system", "byte 0xff at 2"),
        (["generate", "m", "x", "--stop", b"\xe9"], "--stop", "byte 0xe9 at 0"),
        (["chat", "m", "--chat-template", b"{\xe9}"], "--chat-template", "byte 0xe9 at 1"),
    ],
)
@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"PYTHONUTF8": "1"}])
def test_bytes_that_are_no_utf8_are_named(argv, source, found, locale):
    done = subprocess.run(
        [sys.executable, "-c", SAYS, *argv], input=b"caf\xe9 au lait\n", capture_output=True, cwd=ROOT, timeout=60,
        env={**os.environ, **locale},
    )  # fmt: skip
    assert done.stderr.decode() == f"ruvllm: error: {source}: expected a text in UTF-8, found {found}\n"
    assert done.returncode == 2


def test_stdin_in_the_encoding_of_the_user():
    done = subprocess.run(
        [sys.executable, "-c", SAYS, "generate", "m", "-q"], input=b"caf\xe9", capture_output=True, cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0
    assert b"[asked 'caf\\xe9']" in done.stderr


@pytest.mark.parametrize("command", [["generate", "m", "x"], ["chat", "m"]])
def test_a_chat_template_of_the_user(llm, piped, tmp_path, capsys, command):
    llm.tokenizer.chat_template = None
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages[0].content }}\r\n", encoding="utf-8")
    for given, expected in (("{{ 'a' }}", "{{ 'a' }}"), (str(file), "{{ messages[0].content }}\n")):
        piped("x\n")
        assert main([*command, "--chat-template", given]) == 0
        assert llm.asked[-1][0] == user("x")
        assert llm.asked[-1][1]["template"] == expected
    llm.tokenizer.named_templates = {"rag": "{{ messages }}"}
    piped("x\n")
    assert main([*command, "--chat-template", "rag"]) == 0
    assert llm.asked[-1][1]["template"] == "rag"
    llm.tokenizer.named_templates = {}
    assert main([*command, "--chat-template", "chatml"]) == 2
    assert "--chat-template: expected a template in Jinja, or a file that holds one, found 'chatml'" in (
        capsys.readouterr().err
    )


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


def test_chat_keeps_the_conversation_and_resets_it(llm, typed, capsys):
    llm.answers = [FakeStream(["one"]), FakeStream(["two"]), FakeStream(["three"])]
    typed("first", "  ", "second", "/reset", "third", "/exit", "never")
    assert main(["chat", "m", "--system", "S"]) == 0
    system = [{"role": "system", "content": "S"}]
    second = [*system, *user("first"), {"role": "assistant", "content": "one"}, *user("second")]
    assert [prompt for prompt, _ in llm.asked] == [[*system, *user("first")], second, [*system, *user("third")]]
    assert capsys.readouterr().out == "one\ntwo\nthree\n"
    assert {options["cache"] for _, options in llm.asked} == {"a cache of 8192 tokens in auto"}


def test_what_is_thought_goes_to_stderr_and_on_to_the_template(llm, typed, capsys):
    llm.answers = [FakeStream([Thought("Let me [see] :smile:\n"), Thought("so"), "one", " two"]), FakeStream(["three"])]
    typed("first", "second")
    assert main(["chat", "m"]) == 0
    out, err = capsys.readouterr()
    assert out == "one two\nthree\n"
    assert "\nLet me [see] :smile:\nso\n\n[7 prompt tokens" in err
    answered = {"role": "assistant", "content": "one two", "reasoning_content": "Let me [see] :smile:\nso"}
    assert llm.asked[1][0] == [*user("first"), answered, *user("second")]
    llm.answers = [FakeStream([Thought("hm"), "one"])]
    assert main(["generate", "m", "x", "-q"]) == 0
    assert capsys.readouterr() == ("one\n", "")


def test_reasoning_is_dim_on_a_terminal(llm, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    llm.answers = [FakeStream([Thought(" let"), Thought(" me"), "one"])]
    assert main(["generate", "m", "x"]) == 0
    assert sys.stderr.getvalue().startswith("\x1b[2m let\x1b[0m\x1b[2m me\x1b[0m")


@pytest.mark.parametrize("command", [["generate", "m", "x"], ["chat", "m"]])
def test_options_of_templates(command, llm, typed, capsys):
    typed("x")
    for given, options in (
        ([], {}),
        (["--no-think"], {"enable_thinking": False}),
        (["--think"], {"enable_thinking": True}),
        (["--template-args", '{"a": [1, null]}'], {"template_args": {"a": [1, None]}}),
        (["--chat-template-kwargs", "{}", "--no-think"], {"template_args": {}, "enable_thinking": False}),
    ):
        typed("x")
        llm.asked.clear()
        assert main([*command, *given]) == 0
        asked = llm.asked[0][1]
        assert {name: asked[name] for name in ("enable_thinking", "template_args") if name in asked} == options
    capsys.readouterr()
    for wrong in ("[1]", "{", "a=1"):
        typed("x")
        assert main([*command, "--template-args", wrong]) == 2
        assert f"--template-args: expected a JSON object, found {wrong!r}" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--no-think"], ["--template-args", "{}"], ["--system", "s"]])
def test_options_of_templates_need_one(option, llm, capsys):
    assert main(["generate", "m", "x", "--raw", *option]) == 2
    assert "only for chats, but --raw is given" in capsys.readouterr().err
    llm.tokenizer.chat_template = None
    assert main(["generate", "m", "x", *option]) == 2
    assert f"{option[0]}" in (err := capsys.readouterr().err) and "m has no chat template" in err


def test_chat_needs_a_template(llm, typed, capsys):
    llm.tokenizer.chat_template = None
    typed("first")
    assert main(["chat", "m"]) == 2
    assert "m has no chat template" in capsys.readouterr().err


def test_chat_interrupt_ends_the_answer_and_keeps_what_was_said(llm, typed, capsys):
    llm.answers = [FakeStream(["half an"], KeyboardInterrupt()), FakeStream(["whole"])]
    typed("first", KeyboardInterrupt(), "second")
    assert main(["chat", "m"]) == 0
    assert llm.asked[1][0] == [*user("first"), {"role": "assistant", "content": "half an"}, *user("second")]
    out, err = capsys.readouterr()
    assert out == "half an\nwhole\n"
    assert "Ctrl-D or /exit leaves" in err


def test_chat_message_that_does_not_fit_leaves_the_conversation_as_it_was(llm, typed, capsys):
    llm.answers = [ContextFullError("9 tokens, room for 8"), FakeStream(["fits"])]
    typed("long", "short")
    assert main(["chat", "m"]) == 0
    assert llm.asked[1][0] == user("short")
    assert "room for 8" in capsys.readouterr().err


def test_chat_commands(llm, typed, capsys):
    typed("/help", "/nonsense", "/exit")
    assert main(["chat", "m"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "/reset" in err
    assert "no command '/nonsense'" in err
    assert llm.asked == []


def test_chat_from_a_pipe(llm, piped, capsys):
    piped("first\n\nsecond")
    assert main(["chat", "-q"]) == 0
    assert llm.loaded[0] == "smollm2-135m"
    assert [prompt[-1]["content"] for prompt, _ in llm.asked] == ["first", "second"]
    assert capsys.readouterr() == ("Hello world é\nHello world é\n", "")


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
    result = run("memory")
    assert result.returncode == 0
    assert result.stderr == ""
    assert "\x1b" not in result.stdout
    assert "..." not in result.stdout


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
    line = "ruvllm: compiling kernels for this kind of model: 10 to 20 s, the first time only"
    assert result.stderr.count(line) == said


def test_info_tells_what_a_model_takes(smollm2_path):
    result = run("info", str(smollm2_path))
    assert result.returncode == 0, result.stderr
    assert "96.6 MB as it is loaded (--weights auto)" in result.stdout  # 96,576,768 bytes: see test_memory
    assert re.search(r"rounded then +nothing\b", result.stdout)
    assert "FP16 269.0 MB, INT8 143.0 MB, INT4 75.7 MB" in result.stdout


def test_closed_pipe_is_quiet():
    process = subprocess.Popen(
        [sys.executable, "-m", "ruvllm", "memory"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 141


def test_help_and_memory_load_no_compiler():
    code = "import sys; from ruvllm.cli import main; main(['memory']); sys.exit('numba' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert result.returncode == 0
