"""The command line under mpiexec: rank 0 reads, talks and writes, the other ranks compute with it in silence."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

COMMANDS = ("generate", "chat", "perplexity", "train", "info")  # that ranks run together; of others each runs its own
_VARIABLES = (  # rank and number of ranks, as launchers tell them: MPICH, Intel and Slurm; Open MPI
    ("PMI_RANK", "PMI_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)
_GRACE_SECONDS = 5.0  # in which rank 0 reports an error that all ranks met


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
