"""The results of a report, and their JSON form."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruvllm.brief import brief
from ruvllm.errors import RuvllmError
from ruvllm.measure.timing import Timing

SCHEMA = 2  # of the JSON; in 1, the figures of the Rust report were called "seed"


class ReportError(RuvllmError, ValueError):
    """A file that is not a report of a known schema."""


@dataclass(frozen=True)
class Entry:
    """A row at one number of threads.

    call: as called from Python. inside: looped in compiled code, where that was measured. limit: least seconds on this
    machine, set by ``bound``. peers: by name.
    """

    threads: int
    call: Timing
    inside: Timing | None
    limit: float
    bound: str
    peers: dict[str, Timing]

    __repr__ = brief

    @property
    def best(self) -> float:
        """Seconds of the kernel itself: inside compiled code if that was measured."""
        return self.call.median if self.inside is None else self.inside.median

    @property
    def share(self) -> float:
        """Share of the machine's limit."""
        return self.limit / self.best

    def ratio(self, peer: str) -> float | None:
        """How many times as fast as a peer; None where that was not measured."""
        return self.peers[peer].median / self.call.median if peer in self.peers else None


@dataclass(frozen=True)
class Result:
    """What was measured for a row, or the reason why it was not.

    rust_m4: seconds in the Rust report. error: relative, against float64, at most ``tolerance`` where the kernel is
    right. missing: why a peer has no figure, by its name. sizes: of memory rows, in bytes.
    """

    id: str
    label: str
    rust_m4: float | None = None
    flops: float = 0.0
    bytes: float = 0.0
    error: float | None = None
    tolerance: float | None = None
    entries: tuple[Entry, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)
    note: str = ""
    reason: str = ""

    __repr__ = brief

    def at(self, threads: int) -> Entry | None:
        """The entry with this number of threads."""
        return next((entry for entry in self.entries if entry.threads == threads), None)

    @property
    def right(self) -> bool | None:
        """Whether the error is within the tolerance; None where it was not measured."""
        return None if self.error is None or self.tolerance is None else self.error <= self.tolerance


@dataclass(frozen=True)
class SectionResult:
    """One table."""

    name: str
    title: str
    about: str
    results: tuple[Result, ...]

    __repr__ = brief


@dataclass(frozen=True)
class Report:
    """All that `ruvllm report` measured. about: groups of facts; peers: what each is, or why it is missing."""

    created: str  # ISO 8601, UTC
    quick: bool
    threads: tuple[int, ...]
    about: dict[str, dict[str, str]]
    peaks: dict[str, dict[str, float]]  # by threads: limits by name, in FLOP/s, OP/s, bytes/s
    peers: dict[str, str]
    sections: tuple[SectionResult, ...]
    seconds: float
    schema: int = SCHEMA

    __repr__ = brief

    def results(self) -> dict[str, Result]:
        """Every row by its id; the first measurement of one that two tables have."""
        found: dict[str, Result] = {}
        for section in self.sections:
            for result in section.results:
                found.setdefault(result.id, result)
        return found

    def json(self) -> str:
        """As JSON, with figures derived from the measurements."""
        data = dataclasses.asdict(self)
        for section, shown in zip(self.sections, data["sections"], strict=True):
            for result, row in zip(section.results, shown["results"], strict=True):
                for entry, found in zip(result.entries, row["entries"], strict=True):
                    found["derived"] = {
                        "gflops": result.flops / entry.best / 1e9,
                        "gbytes": result.bytes / entry.best / 1e9,
                        "share": entry.share,
                        "ratios": {peer: entry.ratio(peer) for peer in entry.peers},
                        "rust_m4_ratio": None if result.rust_m4 is None else result.rust_m4 / entry.best,
                    }
        return json.dumps(data, indent=1, allow_nan=False) + "\n"


def load(path: str | Path) -> Report:
    """A report from its JSON file.

    Raises:
        OSError: it cannot be read.
        ReportError: it is not a report, or of an unknown schema.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data["schema"] not in (1, SCHEMA):
            raise ReportError(f"{path}: a report of schema {data['schema']!r}, this version reads 1 and {SCHEMA}")
        data["schema"] = SCHEMA
        sections = tuple(
            SectionResult(s["name"], s["title"], s["about"], tuple(_result(row) for row in s["results"]))
            for s in data["sections"]
        )
        found = Report(**{**data, "threads": tuple(data["threads"]), "sections": sections})
        _require_kinds(found)
        return found
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ReportError(f"{path}: not a report of ruvllm ({type(error).__name__}: {error})") from None


def _require_kinds(report: Report) -> None:
    """Raise TypeError where a field does not have the type that readers of a report rely on."""
    _require("created", report.created, str)
    _require("threads", list(report.threads), list, int)
    _require("peers", report.peers, dict, str)
    _require("about", report.about, dict, dict)
    for name, facts in {"machine": report.about["machine"], **report.about}.items():
        _require(f"about {name}", facts, dict, str)
    for count in report.threads:
        _require(f"peaks {count}", report.peaks[str(count)], dict, float)
    for section in report.sections:
        for row in section.results:
            _require("label", row.label, str)
            _require(f"{row.label}: sizes", row.sizes, dict, float)
            _require(f"{row.label}: missing", row.missing, dict, str)
            _require(f"{row.label}: flops, bytes", [row.flops, row.bytes], list, float)
            optional = [number for number in (row.rust_m4, row.error, row.tolerance) if number is not None]
            _require(f"{row.label}: rust_m4, error, tolerance", optional, list, float)
            for entry in row.entries:
                for timing in (entry.call, entry.inside or entry.call, *entry.peers.values()):
                    times = [timing.median, timing.low, timing.high]
                    _require(f"{row.label}: times", times, list, float)
                    if not all(0 < seconds < math.inf for seconds in times):
                        raise TypeError(f"{row.label}: times: expected seconds, found {times}")
                _require(f"{row.label}: limit", [entry.limit], list, float)


def _require(name: str, value: Any, kind: type, of: type | None = None) -> None:
    """Raise TypeError unless ``value`` is a ``kind`` of ``of`` each; an int counts as a float."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    wanted = (int, float) if of is float else of
    if not isinstance(value, kind) or (wanted and not all(isinstance(item, wanted) for item in items)):
        raise TypeError(f"{name}: found {value!r:.60}")


def _result(row: dict[str, Any]) -> Result:
    sizes = {name.replace("seed_", "rust_"): size for name, size in row["sizes"].items()}  # "seed": of schema 1
    row = {"rust_m4" if name == "seed" else name: value for name, value in row.items()} | {"sizes": sizes}
    return Result(**{**row, "entries": tuple(_entry(entry) for entry in row["entries"])})


def _entry(found: dict[str, Any]) -> Entry:
    found = {name: value for name, value in found.items() if name != "derived"}
    inside = None if found["inside"] is None else Timing(**found["inside"])
    peers = {peer: Timing(**timing) for peer, timing in found["peers"].items()}
    return Entry(**{**found, "call": Timing(**found["call"]), "inside": inside, "peers": peers})
