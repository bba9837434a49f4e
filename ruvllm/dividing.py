"""How a model is divided over ranks: shares, and the threads of each rank."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

from ruvllm.kernels.bandwidth import read_bandwidth
from ruvllm.kernels.threads.pool import physical_cores
from ruvllm.model.config import ModelConfig
from ruvllm.model.exchange import require_wire
from ruvllm.model.ranks import Ranks
from ruvllm.model.share import Share, shares_of
from ruvllm.model.weights import INTEGER_LAYOUTS

logger = logging.getLogger(__name__)

Host = tuple[str, tuple[int, ...]]  # a machine's name, and the cores that a rank may use there


def divide(
    config: ModelConfig, parts: Sequence[float], layouts: Mapping[str, str], wire: str = "auto"
) -> list[Share]:  # fmt: skip
    """The shares of a model whose matrices will have these layouts; ``wire``: see ``load``.

    Raises ValueError for an unknown ``wire``, and as ``model.share.shares_of``.
    """
    require_wire(wire)

    def grouped(matrix: str) -> bool:
        return any(layout in INTEGER_LAYOUTS for name, layout in layouts.items() if name.endswith(f".{matrix}"))

    heads, columns = grouped("o"), grouped("down")
    return shares_of(config, parts, heads, columns, wire == "exact" or (wire == "auto" and (heads or columns)))


def wanted_part(shares: Sequence[float] | str | None, ranks: Ranks) -> float:
    """How much this rank should take, relative to the others; see ``load``.

    Raises ValueError for neither "auto", None nor one number for each rank.
    """
    if shares is None:
        return 1.0
    if shares == "auto":
        return read_bandwidth(repeats=3)
    try:
        parts = [] if isinstance(shares, str) else [float(part) for part in shares]
    except (TypeError, ValueError):
        parts = []
    if len(parts) != ranks.size:
        raise ValueError(f"shares: expected 'auto' or {ranks.size} numbers, one for each rank, found {shares!r}")
    return parts[ranks.rank]


def threads_of(rank: int, hosts: Sequence[Host]) -> int:
    """Threads of a rank by default: its cores, divided among the ranks that may use the same ones.

    Warns where the ranks of a machine are pinned to fewer cores than it has.
    """
    name, cores = hosts[rank]
    sharing = [i for i, (other, their) in enumerate(hosts) if other == name and (not cores or set(cores) & set(their))]
    here = [i for i, (other, _) in enumerate(hosts) if other == name]
    idle = (os.cpu_count() or 1) // len(here)
    if len(cores) == 1 and idle > 1 and rank == here[0] and "OMPI_COMM_WORLD_SIZE" in os.environ:
        logger.warning(
            "%s: Open MPI has pinned each rank to one core; give mpiexec --map-by slot:pe=%d, or --bind-to none", name,
            idle,
        )  # fmt: skip
    return max(1, physical_cores() // len(sharing))
