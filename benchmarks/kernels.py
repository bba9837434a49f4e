"""Float32 kernels beside NumPy and PyTorch, on one and two threads, and beside the limits of the machine.

python -m benchmarks.kernels [--only gemm,norm,...] [--threads 1,2] [--quick] [--json OUT] [--torch-python PYTHON]

The engines take turns, A B B A, and never compute at the same time; figures are medians. NumPy (OpenBLAS) runs in this
process, PyTorch in one of its own: ``--torch-python`` or RUVLLM_TORCH_PYTHON names a Python that has it. Where cores
are not alike, as beside busy programs, ``taskset -c 1`` and ``--threads 1`` keep all on one core.

Rows named "linear" and "cached" are in the layouts that a model keeps: weights packed at load, keys and values of a
cache. "call" is the time as called from Python, "kernel" that of the compiled kernel alone, in a loop of compiled code.
"ratio" is the best peer's time over that of the call. "limit" is the share of what the machine could do at most,
measured in the same run: multiply-adds at their peak, or reads at the bandwidth of the cache or memory that the arrays
fit into.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ruvllm
from benchmarks import _kernel_cases as cases
from benchmarks._kernel_cases import Case
from benchmarks.peers import chosen, table_head, table_line
from ruvllm.lab.peaks import Peaks, measure_peaks
from ruvllm.report.bench import OWN, Bench, least_seconds
from ruvllm.report.peers import KernelPeer, NumPy, PeerError, Torch
from ruvllm.report.timing import Effort, Engine, Timing, alternate
from ruvllm.report.worker import python_for

NOT_INSTALLED = "not installed"
_AWAKE_SECONDS = 0.05  # after a rest, the system may wake a thread on the core that another one uses already
FULL = Effort(turns=9, seconds=2e-3, longest=6.0)
QUICK = Effort(turns=3, seconds=5e-4, longest=0.2)
HEADINGS = (
    ("case", -40), ("threads", 7), ("call", 9), ("kernel", 9), ("numpy", 9), ("torch", 9), ("seed", 9), ("ratio", 6),
    ("limit", 10),
)  # fmt: skip


@dataclass
class Row:
    """One line of the table; seconds of a call."""

    group: str
    case: str
    threads: int
    call: Timing
    kernel: float | None
    peers: dict[str, Timing]
    missing: dict[str, str]  # why a peer has no figure
    seed: float | None  # the seed's own code on another machine of this kind, one thread
    least: float  # by the limits of this machine
    bound: str

    @property
    def ratio(self) -> float | None:
        """Time of the best peer over ours."""
        best = min((timing.median for timing in self.peers.values()), default=None)
        return best / self.call.median if best else None

    @property
    def share(self) -> float:
        """Of the limit, by the kernel's time where it is known."""
        return self.least / (self.kernel or self.call.median)

    def line(self, torch: bool) -> str:
        """As a line of the table."""
        found = {name: _time(timing.median) for name, timing in self.peers.items()}
        return table_line(
            self.case, self.threads, _time(self.call.median), _time(self.kernel), found.get("numpy", "-"),
            found.get("torch", "-" if torch else NOT_INSTALLED), _time(self.seed),
            f"{self.ratio:.2f}x" if self.ratio else "-", f"{100 * self.share:.0f} % {self.bound}", headings=HEADINGS,
        )  # fmt: skip


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, factor in (("ns", 1e9), ("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


class Awake:
    """An engine whose threads are put to work for a while before each turn."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def seconds(self, calls: int) -> float:
        """See Engine."""
        end = time.perf_counter() + _AWAKE_SECONDS
        while time.perf_counter() < end:
            self._engine.seconds(1)
        return self._engine.seconds(calls)

    def settle(self) -> None:
        """See Engine."""
        self._engine.settle()


def measure(case: Case, bench: Bench, peers: list[KernelPeer]) -> Iterator[Row]:
    """A row for each number of threads."""
    job = case.prepare()
    for threads, peaks in bench.peaks.items():
        with bench.limited(threads):
            engines: dict[str, Engine] = {OWN: job.call()}
            missing = {}
            for peer in peers:
                try:
                    engines[peer.name] = job.peer(peer, threads)
                except PeerError as why:
                    missing[peer.name] = str(why)
            if threads > 1:
                engines = {name: Awake(engine) for name, engine in engines.items()}
            found = alternate(engines, bench.effort, settle=threads > 1)
            inside = job.inside() if threads == 1 else None
            kernel = alternate({OWN: inside}, bench.effort)[OWN].median if inside else None
        least, bound = least_seconds(peaks, job.flops, job.nbytes)
        call = found.pop(OWN)
        seed = case.seed if threads == 1 else None
        yield Row(case.group, case.label, threads, call, kernel, found, missing, seed, least, bound)


def limits(threads: list[int]) -> dict[int, Peaks]:
    """The machine's limits, measured and printed."""
    found = {}
    for n in threads:
        found[n] = measure_peaks(n)
        print(f"{n} thread{'s' * (n > 1)}: multiply-adds {found[n].fma / 1e9:.1f} GFLOP/s; reads", end="")
        print(*(f" {level.name} {level.bandwidth / 1e9:.0f}" for level in found[n].levels), sep=",", end=" GB/s\n")
    return found


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.split("\n")[0])
    p.add_argument("--only", default=",".join(cases.GROUPS), help="groups of rows (default: %(default)s)")
    p.add_argument("--threads", default="1,2", help="numbers of threads (default: %(default)s)")
    p.add_argument("--quick", action="store_true", help="a few turns of the smaller cases: to see that it works")
    p.add_argument("--json", metavar="OUT", help="write all measurements to a file")
    p.add_argument(
        "--torch-python", default=python_for("torch"), metavar="PYTHON",
        help="a Python that has PyTorch (default: RUVLLM_TORCH_PYTHON, else this one)",
    )  # fmt: skip
    return p


def run(args: argparse.Namespace, torch: Torch | None) -> list[Row]:
    """Measure and print what the options ask for."""
    groups = chosen("--only", args.only, cases.GROUPS)
    threads = [int(n) for n in args.threads.split(",")]
    if min(threads) < 1:
        raise ValueError("--threads: expected positive numbers")
    bench = Bench(QUICK if args.quick else FULL, limits(threads))
    peers: list[KernelPeer] = [NumPy()] if torch is None else [NumPy(), torch]
    print(f"\n{table_head(HEADINGS)}", flush=True)
    rows = []
    for case in cases.CASES:
        if case.group in groups and not (args.quick and case.large):
            for row in measure(case, bench, peers):
                print(row.line(torch is not None), flush=True)
                rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run; 0, or 2 after an error, which is one line."""
    args = parser().parse_args(argv)
    torch = None
    try:
        try:
            torch = Torch(args.torch_python)
        except ModuleNotFoundError:
            print(f"{args.torch_python} has no PyTorch: that column stays empty", file=sys.stderr)
        about = {"ruvllm": ruvllm.__version__, "numpy": NumPy.about, "torch": torch.about if torch else NOT_INSTALLED}
        for key, value in about.items():
            print(f"{key}: {value}")
        rows = run(args, torch)
        if args.json:
            records: list[dict[str, Any]] = [asdict(row) | {"ratio": row.ratio, "share": row.share} for row in rows]
            Path(args.json).write_text(json.dumps({"about": about, "rows": records}, indent=1) + "\n")
    except (ruvllm.RuvllmError, ValueError, OSError, RuntimeError) as error:
        print(f"benchmarks.kernels: error: {error}", file=sys.stderr)
        return 2
    finally:
        if torch is not None:
            torch.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
