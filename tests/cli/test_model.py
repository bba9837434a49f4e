"""The command line with a real model, at a real terminal: an answer, and a conversation that is interrupted."""

import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from tests.processes import ROOT

RUVLLM = [sys.executable, "-m", "ruvllm"]
SECONDS = 120  # the first start compiles kernels


def test_generate_answers(smollm2_path):
    result = subprocess.run(
        [*RUVLLM, "generate", str(smollm2_path), "Explain in three sentences why the sky is blue.", "-n", "20"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
        timeout=SECONDS,
    )
    assert result.returncode == 0, result.stderr
    assert "scattering" in result.stdout
    assert "first token after" in result.stderr
    assert "tokens/s" in result.stderr


class Terminal:
    """A process at a pseudo-terminal: type to it, wait for what it shows."""

    def __init__(self, command):
        self.descriptor, inner = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=inner, stdout=inner, stderr=inner, cwd=ROOT,
            # A shell lets its background jobs, such as a suite left to run by itself, ignore SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        os.close(inner)
        self.shown = ""

    def type(self, text):
        os.write(self.descriptor, text.encode())

    def wait_for(self, text):
        """Wait until `text` is shown, and forget everything up to it."""
        deadline = time.monotonic() + SECONDS
        while text not in self.shown:
            ready, _, _ = select.select([self.descriptor], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, self.shown
            try:
                self.shown += os.read(self.descriptor, 4096).decode("utf-8", errors="replace")
            except OSError:  # the other side is gone
                raise AssertionError(f"no {text!r} in {self.shown!r}") from None
        before, _, self.shown = self.shown.partition(text)
        return before

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.descriptor)


@pytest.fixture
def terminal(smollm2_path):
    terminal = Terminal([*RUVLLM, "chat", str(smollm2_path), "--temp", "0"])
    yield terminal
    terminal.close()


def test_chat_survives_an_interrupted_answer(terminal):
    terminal.wait_for("> ")
    terminal.type("Tell me a very long story about a dragon.\n")
    terminal.wait_for("dragon.")  # the echo of what was typed
    terminal.wait_for("a")  # the answer has begun
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for("interrupted")
    terminal.wait_for("> ")
    terminal.type("/reset\n")
    terminal.wait_for("a new conversation")
    terminal.wait_for("> ")
    terminal.type("Explain in three sentences why the sky is blue.\n")
    terminal.wait_for("scattering")
    terminal.wait_for("tokens/s")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(SECONDS) == 0
