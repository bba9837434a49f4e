"""Characters that a terminal or a pipe cannot show, and bytes that are no text; each in a process of its own."""

import os
import subprocess
import sys

import pytest

from tests.processes import ROOT

# The command line with a model that answers with characters of one, two and four bytes in UTF-8.
SAYS = """
import sys
import ruvllm
from ruvllm.cli import main
from tests.cli.fakes import FakeLLM, FakeStream
class Model(FakeLLM):
    def stream(self, prompt, **options):
        print("[asked %a]" % prompt[-1]["content"], file=sys.stderr)
        return FakeStream(["Hello \\u00e9", " \\u2192 \\U0001f600."])
ruvllm.load = Model().load
sys.exit(main())
"""


def said(program, *argv, given=None, **environment):
    """The process after ``program`` has run."""
    command = [sys.executable, "-c", program, *argv]
    return subprocess.run(
        command, input=given, env=os.environ | environment, capture_output=True, cwd=ROOT, timeout=60, check=False
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "ascii:surrogateescape", "utf-8"])
def test_an_answer_goes_on_after_characters_that_stdout_lacks(encoding):
    done = said(SAYS, "generate", "m", "x", "-q", PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Hello \u00e9 \u2192 \U0001f600.\n".encode(encoding.partition(":")[0], "replace")


def test_what_the_user_chose_for_other_characters_stays():
    done = said(SAYS, "generate", "m", "x", "-q", PYTHONIOENCODING="ascii:backslashreplace")
    assert done.stdout == b"Hello \\xe9 \\u2192 \\U0001f600.\n"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_paths_keep_bytes_that_are_no_text(encoding):
    program = "import os; from ruvllm.cli import _print_what_can_be as f; f(); print(os.fsdecode(b'\\xe9/\\xff'))"
    assert said(program, PYTHONIOENCODING=encoding).stdout == b"\xe9/\xff\n"


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
    done = said(SAYS, *argv, given=b"caf\xe9 au lait\n", **locale)
    assert done.stderr.decode() == f"ruvllm: error: {source}: expected a text in UTF-8, found {found}\n"
    assert done.returncode == 2


def test_stdin_in_the_encoding_of_the_user():
    done = said(SAYS, "generate", "m", "-q", given=b"caf\xe9", PYTHONIOENCODING="latin-1")
    assert done.returncode == 0
    assert b"[asked 'caf\\xe9']" in done.stderr
