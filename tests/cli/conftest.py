"""What stands in place of a model, a terminal and a pipe."""

import io
import sys
from types import SimpleNamespace

import pytest

import ruvllm
from tests.cli.fakes import FakeLLM


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
