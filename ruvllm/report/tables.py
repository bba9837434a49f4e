"""A report as blocks of text and tables of strings, for Markdown and HTML alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ruvllm.machine import size
from ruvllm.report.comparison import FASTER, SLOWER, Comparison
from ruvllm.report.results import Entry, Report, Result, SectionResult
from ruvllm.report.rust_report import ERRATA, RUST_REPORT
from ruvllm.report.summary import NOT_MEASURED, accuracy, standings, verdicts

NOTHING = "–"
RUST_M4 = "M4 Pro (Rust)"
PEERS = {"numpy": "NumPy", "torch": "PyTorch", "llama.cpp": "llama.cpp", "rust_m4": RUST_M4}
SHARE = "of the limit"  # the heading of the column that HTML draws as bars
_SHOWN_CHANGES = 40
_SHOWN_LABELS = 8

NOTES = (
    "Times are medians; the spread is the interquartile range over the median. The engines of a row are interleaved "
    "(A B B A) on the same arrays, and their results are compared with float64 before they are timed.",
    "“Call” is a call from Python that writes to an existing output. “Kernel alone” is its compiled body in a loop of "
    "compiled code, measured for calls under 1 ms on one thread. GFLOP/s, GB/s, the share of the limit and the "
    "comparison with the M4 Pro use it where it exists, because the Rust figures include no Python.",
    "“Of the limit” is the least time on this machine (the arithmetic at its peak, or the compulsory bytes at the "
    "bandwidth of the level of memory they fit into, whichever is longer) over the time taken. Where that level is "
    "memory, its bandwidth was measured in the same turns. More than 100 % means that some of the data was still in a "
    "faster cache.",
    "“Error” is sqrt(Σ(y − r)² / Σr²) against the float64 result r.",
    "A ratio of 2.0x to a peer means that ruvllm takes half its time, both called from Python with the same number of "
    "threads. llama.cpp runs only whole models, so it is compared on layers.",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """headings, then rows of as many cells."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers, and is aligned to the right."""
        cells = [row[column].lstrip("< ") for row in self.rows if not row[column].startswith((NOTHING, NOT_MEASURED))]
        return column > 0 and all(cell[:1].isdigit() and len(cell) < 16 for cell in cells)


@dataclass(frozen=True)
class Block:
    """A heading and what is below it."""

    title: str
    anchor: str
    before: tuple[str, ...] = ()
    table: Table | None = None
    after: tuple[str, ...] = ()


def blocks(report: Report, comparison: Comparison | None = None) -> Iterator[Block]:
    """The whole report, in order."""
    yield _summary(report)
    yield _standings(report)
    if comparison is not None:
        yield _changes(comparison)
    yield _limits(report)
    for section in report.sections:
        yield _memory(section) if section.name == "memory" else _section(section, report.threads)
    yield Block("Errors of the Rust report", "errata", (f"The comparison is with {RUST_REPORT}.",),
                Table(("it says", "what is true"), ERRATA))  # fmt: skip
    yield Block("How it was measured", "notes", NOTES, Table(("", ""), tuple(_facts(report))))


def origin(report: Report) -> str:
    """When, on what, with what."""
    machine, versions = report.about["machine"], report.about["versions"]
    command = f"ruvllm report{' --quick' if report.quick else ''}"
    return (
        f"Measured on {report.created[:10]} in {report.seconds:.0f} s by `{command}`, on {machine['CPU']}, "
        f"cores: {machine['cores']}; memory: {machine['memory']}; load before: {machine.get('load', 'unknown')}; "
        f"{machine['system']}. ruvllm {versions['ruvllm']}, Python {versions['python']}, numba {versions['numba']}, "
        f"NumPy {versions['numpy']}."
    )


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{_digits(seconds / scale)} {unit}"
    return f"{_digits(seconds * 1e9)} ns"


def _duration(seconds: float | None) -> str:
    return NOTHING if seconds is None else duration(seconds)


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _times(ratio: float | None) -> str:
    return NOTHING if ratio is None else f"{ratio:.2f}x" if ratio < 9.995 else f"{ratio:.1f}x"


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _summary(report: Report) -> Block:
    rows = tuple(
        (
            verdict.label, _duration(verdict.found), f"< {duration(verdict.allowed)}", _duration(verdict.rust_m4),
            verdict.status,
        )
        for verdict in verdicts(report)
    )  # fmt: skip
    compared, wrong = accuracy(report)
    right = f"{compared} rows were compared with float64; "
    right += "all are within their tolerance." if not wrong else "outside their tolerance: " + ", ".join(
        f"{result.label} ({result.error:.1e}, at most {result.tolerance:.0e})" for result in wrong
    )  # fmt: skip
    headings = ("metric", f"result, {_threads(min(report.threads))}", "target", RUST_M4, "status")
    return Block("Executive summary", "summary", table=Table(headings, rows), after=(right,))


def _standings(report: Report) -> Block:
    rows = []
    for threads in report.threads:
        for found in standings(report, threads):
            rows.append(
                (
                    PEERS[found.peer], str(threads), str(found.rows), str(found.ahead), _times(found.mean),
                    f"{_times(found.worst[1])}, {found.worst[0]}",
                )
            )  # fmt: skip
    headings = ("ruvllm against", "threads", "rows", "at least as fast", "geometric mean", "least")
    before = tuple(f"{PEERS[name]}: {about}." for name, about in report.peers.items())
    return Block("Against its peers", "peers", before, Table(headings, tuple(rows)) if rows else None)


def _limits(report: Report) -> Block:
    names = list(report.peaks[str(report.threads[0])])
    unit = {"multiply-add, float32": "GFLOP/s", "dot product, int8": "GOP/s"}
    rows = tuple(
        (name, *(f"{report.peaks[str(n)][name] / 1e9:.1f} {unit.get(name, 'GB/s')}" for n in report.threads))
        for name in names
    )
    return Block(
        "Limits of this machine", "limits", ("Measured in the same run.",),
        Table(("limit", *(_threads(n) for n in report.threads)), rows),
    )  # fmt: skip


def _section(section: SectionResult, threads: Sequence[int]) -> Block:
    first, *others = threads
    peers = [peer for peer in PEERS if any(peer in e.peers for r in section.results for e in r.entries)]
    alone = any(entry.inside for result in section.results for entry in result.entries)
    rust = any(result.rust_m4 is not None for result in section.results)
    headings = ["row", f"call, {_threads(first)}", "spread", *(["kernel alone"] if alone else []), "GFLOP/s", "GB/s"]
    headings += [SHARE, "limit", "error", *(f"vs {PEERS[peer]}" for peer in peers)]
    for count in others:
        headings += [f"call, {_threads(count)}", *(f"vs {PEERS[peer]}" for peer in peers)]
    headings += [RUST_M4, "vs M4 Pro"] if rust else []
    rows = []
    for result in section.results:
        entry = result.at(first)
        cells = [result.label, *(_first_cells(result, entry, alone) if entry else [f"not measured: {result.reason}"])]
        if entry is not None:
            cells += [_times(entry.ratio(peer)) for peer in peers]
            for count in others:
                other = result.at(count)
                cells.append(NOTHING if other is None else duration(other.call.median))
                cells += [_times(other.ratio(peer)) if other else NOTHING for peer in peers]
        cells += [NOTHING] * (len(headings) - 2 * rust - len(cells))
        if rust and result.rust_m4 is not None:
            cells += [duration(result.rust_m4), _times(result.rust_m4 / entry.best) if entry else NOTHING]
        cells += [NOTHING] * (len(headings) - len(cells))
        rows.append(tuple(cells))
    return Block(
        section.title, section.name, (section.about,), Table(tuple(headings), tuple(rows)), tuple(_reasons(section))
    )


def _first_cells(result: Result, entry: Entry, alone: bool) -> list[str]:
    cells = [duration(entry.call.median), f"{100 * entry.call.spread:.0f} %"]
    if alone:
        cells.append(NOTHING if entry.inside is None else duration(entry.inside.median))
    gflops, gbytes = result.flops / entry.best / 1e9, result.bytes / entry.best / 1e9
    error = NOTHING if result.error is None else f"{result.error:.0e}" if result.error else "0"
    return [*cells, _digits(gflops), _digits(gbytes), f"{100 * entry.share:.0f} %", entry.bound, error]


def _reasons(section: SectionResult) -> Iterator[str]:
    """Why peers have no figures."""
    labels: dict[tuple[str, str], list[str]] = {}
    for result in section.results:
        for peer, why in result.missing.items():
            labels.setdefault((peer, why), []).append(result.label)
    for (peer, why), rows in labels.items():
        which = "" if len(rows) == len(section.results) else f" ({'; '.join(rows)})"
        yield f"{NOTHING} {PEERS[peer]}: {why}{which}."


def _memory(section: SectionResult) -> Block:
    headings = ("model", "parameters", "FP16", "INT8", "INT4", "FP16 (Rust)", "INT4 (Rust)")
    rows = tuple(
        (result.label, f"{result.sizes['parameters'] / 1e9:.2f} B", *(size(result.sizes[name]) for name in _SIZES))
        for result in section.results
    )
    return Block(section.title, section.name, (section.about,), Table(headings, rows))


_SIZES = ("fp16", "int8", "int4", "rust_fp16", "rust_int4")


def _changes(found: Comparison) -> Block:
    """Faster and slower rows, the largest changes first."""
    changed = [*found.of(SLOWER), *found.of(FASTER)]
    same = len(found.changes) - len(changed)
    before = (
        f"Against the report of {found.created}: {len(found.of(FASTER))} rows faster, {len(found.of(SLOWER))} slower, "
        f"{same} the same within their noise.",
        *(f"Warning: {warning}." for warning in found.warnings),
    )
    rows = tuple(
        (
            c.label,
            str(c.threads),
            duration(c.old),
            duration(c.new),
            _times(c.speedup),
            f"{100 * c.noise:.0f} %",
            c.change,
        )
        for c in changed[:_SHOWN_CHANGES]
    )
    after = [f"And {len(changed) - _SHOWN_CHANGES} more."] if len(changed) > _SHOWN_CHANGES else []
    after += [f"No longer within its tolerance: {label}." for label in found.less_right]
    for what, labels in (("Only in the old report", found.only_old), ("Only in the new report", found.only_new)):
        more = f" and {len(labels) - _SHOWN_LABELS} more" if len(labels) > _SHOWN_LABELS else ""
        after += [f"{what}: {', '.join(labels[:_SHOWN_LABELS])}{more}."] if labels else []
    headings = ("row", "threads", "old", "new", "speedup", "noise", "change")
    return Block("What changed", "changes", before, Table(headings, rows) if rows else None, tuple(after))


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    for group in report.about.values():
        yield from group.items()
    yield "measured", f"{report.created}, in {report.seconds:.0f} s{', quick' if report.quick else ''}"
