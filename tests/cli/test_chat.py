"""`ruvllm chat`, and what `generate` has in common with it: templates, their options, and reasoning."""

import io
import sys

import pytest

from ruvllm.cli import main
from ruvllm.errors import ContextFullError
from tests.cli.fakes import FakeStream, Thought, user


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
