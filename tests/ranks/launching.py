"""Runs of several ranks, as mpiexec starts them; skips a module where there is none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ruvllm.kernels.threads.pool import physical_cores
from tests.ranks.namespaces import Namespaces

pytest.importorskip("mpi4py", reason="mpi4py is not installed: it is in the extra ruvllm[mpi]")
MPIEXEC = Path(sys.executable).with_name("mpiexec")
if not MPIEXEC.exists():
    found = shutil.which("mpiexec")
    if found is None:
        pytest.skip("there is no mpiexec: install mpich or openmpi, as ruvllm[mpi] does", allow_module_level=True)
    MPIEXEC = Path(found)

OPEN_MPI = "Open MPI" in subprocess.run([MPIEXEC, "--version"], capture_output=True, text=True, check=True).stdout
ROOT = Path(__file__).parents[2]
SECONDS = 150  # in which a hanging rank is noticed; on an idle machine each run takes a few


def start(ranks: int, *command: str, joined: Namespaces | None = None) -> subprocess.Popen[str]:
    launch = [str(MPIEXEC), "-n", str(ranks)] if joined is None else joined.command(str(MPIEXEC))
    return _started([*launch, sys.executable, "-m", *command], ranks)


def start_each(*commands: tuple[str, ...], **variables: str) -> subprocess.Popen[str]:
    """A rank for each command, which Python runs."""
    launch = [str(MPIEXEC)]
    for command in commands:
        launch += ["-n", "1", sys.executable, *command, ":"]
    return _started(launch[:-1], len(commands), **variables)


def _started(launch: list[str], ranks: int, **variables: str) -> subprocess.Popen[str]:
    # The machine may be busy, so ranks wait long for each other at the start.
    environment = {"RUVLLM_START_SECONDS": str(SECONDS), **os.environ, **variables}
    environment |= {"PYTHONPATH": str(ROOT), "NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    if ranks > physical_cores():  # MPICH's ranks wait without leaving their core: a message takes four times as long
        environment |= {"MPIR_CVAR_ENABLE_HEAVY_YIELD": "1", "MPIR_CVAR_POLLS_BEFORE_YIELD": "1"}
    if OPEN_MPI:  # which else refuses root, and more ranks than cores
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        environment |= {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    return subprocess.Popen(
        launch, env=environment, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def run(
    ranks: int, *command: str, stdin: str | None = None, joined: Namespaces | None = None
) -> tuple[int, str, str]:  # fmt: skip
    """Exit code, stdout and stderr."""
    return result_of(start(ranks, *command, joined=joined), stdin)


def run_each(*commands: tuple[str, ...], **variables: str) -> tuple[int, str, str]:
    """The same of a rank for each command, which Python runs."""
    return result_of(start_each(*commands, **variables))


def result_of(process: subprocess.Popen[str], stdin: str | None = None) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(stdin, timeout=SECONDS)
    finally:
        process.kill()
    return process.returncode, out, said(err)


def said(err: str) -> str:
    """What ranks wrote to stderr, without what Open MPI's mpiexec adds to an exit code that is not 0."""
    return err.partition("-" * 70)[0] if OPEN_MPI else err


def case(ranks: int, name: str, *arguments: str, joined: Namespaces | None = None) -> dict[str, Any]:
    code, out, err = run(ranks, "tests.ranks.rank_cases", name, *arguments, joined=joined)
    assert code == 0, err
    answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    return answer
