"""SIMD loads and stores near the ends of arrays: in processes that end where a kernel reaches beyond one."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest


def _run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.kernels.guarded", program],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("program", ["kernels", "models"])
def test_nothing_outside_is_touched(program: str) -> None:
    done = _run(program)
    assert (done.returncode, done.stdout) == (0, "nobody touched the pages\n"), done.stderr[-3000:]


def test_touching_it_would_show() -> None:
    assert _run("outside").returncode in (-signal.SIGSEGV, -signal.SIGBUS)
