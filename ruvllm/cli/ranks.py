"""The command line under mpiexec: rank 0 reads, talks and writes, the other ranks compute with it in silence."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

COMMANDS = ("generate", "chat", "perplexity", "train", "info")  # that ranks run together; of others each runs its own
_VARIABLES = (  # rank and number of ranks, as launchers tell them: MPICH, Intel and Slurm; Open MPI
    ("PMI_RANK", "PMI_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)
_GRACE_SECONDS = 5.0  # in which rank 0 reports an error that all ranks met
_START = "RUVLLM_START_SECONDS"  # environment variable: how long ranks wait for each other at the start
_START_SECONDS = 8.0
_TICK = 0.1  # seconds
# Options that may differ: those of each machine, of what is shown, and those of which rank 0's alone count.
_OWN = ("comm", "operands", "prompt", "file", "model_option", "threads", "no_mmap", "debug", "quiet")


def place(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """This process's rank and the number of ranks, as the launcher set them: (0, 1) without one."""
    for rank, size in _VARIABLES:
        try:
            return int(environment[rank]), int(environment[size])
        except (KeyError, ValueError):
            continue
    return 0, 1


def silence() -> None:
    """Nothing that this process prints is seen, but ``last_words``."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    os.dup2(nowhere, 1)
    sys.stderr = open(os.devnull, "w")


def connect() -> Any:
    """MPI.COMM_WORLD. Raises ValueError where mpi4py is not installed, or belongs to another MPI than the launcher."""
    try:
        import mpi4py

        mpi4py.rc.thread_level = "funneled"
        with _limited(_start_seconds()):
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"mpiexec started several ranks, which need mpi4py: install ruvllm[mpi] ({error})") from None
    size = place()[1]
    if MPI.COMM_WORLD.Get_size() != size:
        library = MPI.Get_library_version().split("\n")[0].strip("\0 ")
        raise ValueError(
            f"mpiexec started {size} ranks, but mpi4py's MPI ({library}) sees {MPI.COMM_WORLD.Get_size()}: "
            "use the mpiexec of that MPI"
        )
    return MPI.COMM_WORLD


def _start_seconds() -> float:
    said = os.environ.get(_START, _START_SECONDS)
    try:
        return float(said)
    except ValueError:
        raise ValueError(f"{_START}: expected seconds, found {said!r}") from None


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """End this process if the block takes longer.

    MPI's initialisation waits for all ranks, in C code in which no Python of this process runs: a child looks after it.
    """
    if not hasattr(os, "fork"):
        yield
        return
    reading, writing = os.pipe()
    parent, child = os.getpid(), os.fork()
    if child == 0:
        try:
            os.close(writing)
            for _ in range(round(seconds / _TICK)):  # by no clock, as this machine may be suspended meanwhile
                if select.select([reading], [], [], _TICK)[0]:
                    break
            else:
                what = f"waited {seconds:g} s for all ranks: one has failed, or does not use MPI"
                os.write(2, f"ruvllm: error: rank {place()[0]}: {what} ({_START} sets how long)\n".encode())
                time.sleep(_TICK)  # in which mpiexec passes it on
                os.kill(parent, signal.SIGKILL)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)  # not as a program ends: what it would flush and close is the parent's
    os.close(reading)
    try:
        yield
    finally:
        os.close(writing)
        os.waitpid(child, 0)


def require_same(args: argparse.Namespace) -> None:
    """Raise RankError, on every rank, unless all have the same version, command, options and text."""
    import ruvllm
    from ruvllm.model.ranks import Ranks

    ranks = Ranks(args.comm)
    with ranks.together():  # the first thing that loading does in any version: so others get to compare versions
        pass
    given = args.operands[getattr(args, "model_option", None) is None :]  # without the model
    text = [*given, *(value for name in ("prompt", "file") if (value := getattr(args, name, None)) is not None)]
    facts = {"version": ruvllm.__version__, "command": args.command, "text": " ".join(text) or None}
    options = {f"option {name}": value for name, value in vars(args).items() if name not in _OWN}
    ranks.compare({f"same {name}": value for name, value in (facts | options).items()})


def refuse(line: str) -> None:
    """End all ranks, as this one cannot read its command line; ``line`` says why. Returns where there is no MPI."""
    try:
        comm = connect()
    except ValueError:
        return
    from ruvllm.model.ranks import Ranks

    with suppress(ValueError), Ranks(comm).together():
        raise ValueError(line.removeprefix("ruvllm: error: "))
    end_all(comm, line, 2)


def splits_model(args: argparse.Namespace) -> bool:
    """Whether ranks share one model; else each has the whole and ranks share the work."""
    if args.command == "train":
        if args.split == "model":
            raise ValueError("--split model: a model that is split over ranks cannot be trained; use --split data")
        return False
    return args.command != "info" and getattr(args, "split", None) != "data"


def end_all(comm: Any, line: str, code: int) -> None:
    """End all ranks with an exit code, after an error on this one that its ``line`` tells.

    Rank 0 has printed it. Another rank waits first: rank 0 may have met the same error, or been told of this one.
    """
    if comm.Get_rank():
        time.sleep(_GRACE_SECONDS)
        os.write(2, f"{line.replace('error: ', f'error: rank {comm.Get_rank()}: ', 1)}\n".encode())
    from ruvllm.model.ranks import end_all as end

    end(comm, code)
