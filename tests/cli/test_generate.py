"""`ruvllm generate`: its options as the library gets them, its prompt, what it prints where."""

import math

import pytest

from ruvllm.cli import main, parser
from ruvllm.model import llama
from ruvllm.model.sampling.options import Dry, Mirostat, Xtc
from tests.cli.fakes import ALONE, DEFAULTS, FakeCache, FakeStream, user


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


def test_prompt_from_a_file(llm, tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("from a file ü\r\n".encode())
    assert main(["generate", "m", "--file", str(file)]) == 0
    assert llm.asked[0][0] == user("from a file ü")


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
