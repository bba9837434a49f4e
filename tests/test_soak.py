"""A short soak: everything that ``tests.soak`` does, with a tiny model; the long one is a program run by hand."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from ruvllm.kernels import memory
from tests import llm_cases
from tests.soak import Soak, plot, report

MEMORY = 8_000_000  # bytes that memory may grow by after everything was done once: allocators keep some of it


@pytest.fixture
def soak(tmp_path: Path) -> Soak:
    return Soak(llm_cases.byte_llm(tmp_path), lambda: llm_cases.byte_llm(tmp_path), tmp_path)


def test_nothing_grows_and_answers_stay(soak: Soak, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small weights come from blocks of 32 MB, each of which fills up before it is given back: here from smaller ones.
    monkeypatch.setattr(memory, "_BLOCK", 1 << 20)
    monkeypatch.setattr(memory, "_LARGE", 1 << 19)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for action in soak.actions:
            action()
        for _ in range(20):
            soak.step()
        first = soak.probe()
        probes = [first]
        for _ in range(3):
            for _ in range(15):
                soak.step()
            probes.append(soak.probe())
    finally:
        signal.signal(signal.SIGINT, before)
    assert probes[-1].memory - first.memory < MEMORY
    assert probes[-1].threads <= first.threads
    assert probes[-1].files <= first.files
    assert len(report(probes).splitlines()) == 4
    plot(probes, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 10_000


def test_another_answer_is_noticed(soak: Soak) -> None:
    soak.probe()
    soak.llm.model.decoder.norm[:] *= -1
    with pytest.raises(AssertionError, match="another answer"):
        soak.probe()
