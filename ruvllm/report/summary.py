"""Totals: targets met or missed, how many rows are right, how they compare with each peer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ruvllm.report.results import Report, Result
from ruvllm.report.rust_report import TARGETS

PASS, FAIL, NOT_MEASURED = "PASS", "FAIL", "not measured"


@dataclass(frozen=True)
class Verdict:
    """A target: the seconds found (None if not measured), those allowed, and PASS, FAIL or NOT_MEASURED."""

    label: str
    found: float | None
    allowed: float
    rust_m4: float | None
    status: str


@dataclass(frozen=True)
class Standing:
    """Rows compared with a peer: how many, in how many ruvllm is at least as fast, geometric mean of the ratios."""

    peer: str
    rows: int
    ahead: int
    mean: float
    worst: tuple[str, float]  # row and ratio


def verdicts(report: Report) -> list[Verdict]:
    """The Rust report's targets: a row passes if its call takes less than allowed and its result is right."""
    rows, threads = report.results(), min(report.threads)
    found = []
    for target in TARGETS:
        result = rows.get(target.row)
        entry = result.at(threads) if result else None
        if result is None or entry is None:
            found.append(Verdict(target.label, None, target.seconds, result.rust_m4 if result else None, NOT_MEASURED))
        else:
            met = entry.call.median < target.seconds and result.right is not False
            found.append(
                Verdict(target.label, entry.call.median, target.seconds, result.rust_m4, PASS if met else FAIL)
            )
    return found


def accuracy(report: Report) -> tuple[int, list[Result]]:
    """How many rows were compared with float64, and those whose error is above their tolerance."""
    compared = [result for result in report.results().values() if result.right is not None]
    return len(compared), [result for result in compared if not result.right]


def standings(report: Report, threads: int) -> list[Standing]:
    """Rows compared with each peer on ``threads`` threads, and on the fewest with the Rust report too."""
    ratios: dict[str, list[tuple[str, float]]] = {}
    for result in report.results().values():
        if (entry := result.at(threads)) is not None:
            for peer in entry.peers:
                ratios.setdefault(peer, []).append((result.label, entry.ratio(peer) or 0.0))
            if result.rust_m4 is not None and threads == min(report.threads):
                ratios.setdefault("rust_m4", []).append((result.label, result.rust_m4 / entry.best))
    return [
        Standing(
            peer, len(found), sum(ratio >= 1 for _, ratio in found),
            math.exp(sum(math.log(ratio) for _, ratio in found) / len(found)), min(found, key=lambda pair: pair[1]),
        )
        for peer, found in ratios.items()
    ]  # fmt: skip
