"""Two reports compared: which rows became faster or slower by more than their noise."""

from __future__ import annotations

from dataclasses import dataclass

from ruvllm.brief import brief
from ruvllm.measure.timing import Timing
from ruvllm.report.results import Report

_LEAST = 0.05  # smaller changes count as none, however quiet the machine was
FASTER, SLOWER, SAME = "faster", "slower", "same"


@dataclass(frozen=True)
class Change:
    """A row at a number of threads, in seconds of a call, or of the kernel alone; change: FASTER, SLOWER or SAME."""

    id: str
    label: str
    threads: int
    old: float
    new: float
    noise: float  # relative, from the spread of both
    change: str

    @property
    def speedup(self) -> float:
        """Old time over new: above 1 is faster."""
        return self.old / self.new


@dataclass(frozen=True)
class Comparison:
    """changes: every row in both reports, in the new one's order; labels of the others; what else differs."""

    created: str  # of the old report
    changes: tuple[Change, ...]
    only_old: tuple[str, ...]
    only_new: tuple[str, ...]
    less_right: tuple[str, ...]  # rows now outside their tolerance that were within it
    warnings: tuple[str, ...]

    __repr__ = brief

    def of(self, change: str) -> list[Change]:
        """The changes of one kind, the largest first."""
        chosen = [found for found in self.changes if found.change == change]
        return sorted(chosen, key=lambda found: -max(found.speedup, 1 / found.speedup))


def compare(old: Report, new: Report) -> Comparison:
    """What changed from one report to another."""
    before, after = old.results(), new.results()
    changes, only_old, only_new, less_right = [], [], [], []
    for id, result in after.items():
        was = before.get(id)
        for entry in result.entries:
            earlier = was.at(entry.threads) if was else None
            if earlier is None:
                only_new.append(f"{result.label} (threads: {entry.threads})")
            else:
                changes.append(_change(id, result.label, entry.threads, earlier.call, entry.call))
                if earlier.inside is not None and entry.inside is not None:
                    label = f"{result.label}, kernel alone"
                    changes.append(_change(id, label, entry.threads, earlier.inside, entry.inside))
        if was is not None and was.right and result.right is False:
            less_right.append(result.label)
    for id, result in before.items():
        now = after.get(id)
        only_old += [
            f"{result.label} (threads: {e.threads})" for e in result.entries if not (now and now.at(e.threads))
        ]
    return Comparison(
        old.created, tuple(changes), tuple(only_old), tuple(only_new), tuple(less_right), _warnings(old, new)
    )


def _change(id: str, label: str, threads: int, old: Timing, new: Timing) -> Change:
    """The noise is half the sum of both spreads: medians this close may mean the same speed."""
    noise, speedup = max(_LEAST, (old.spread + new.spread) / 2), old.median / new.median
    kind = FASTER if speedup > 1 + noise else SLOWER if speedup < 1 / (1 + noise) else SAME
    return Change(id, label, threads, old.median, new.median, noise, kind)


def _warnings(old: Report, new: Report) -> tuple[str, ...]:
    found = []
    for name in ("CPU", "cores"):
        was, now = (report.about["machine"].get(name) for report in (old, new))
        if was != now:
            found.append(f"another machine: {name} was {was}, is {now}")
    if old.quick != new.quick:
        found.append(f"the {'old' if old.quick else 'new'} report was made with --quick")
    for threads, limits in new.peaks.items():
        for name, now_rate in limits.items():
            was_rate = old.peaks.get(threads, {}).get(name)
            if was_rate and not 1 / 1.15 < now_rate / was_rate < 1.15:
                found.append(
                    f"the machine itself ran at another speed: {name} at {threads} threads {now_rate / was_rate:.2f}x"
                )
    return tuple(found)
