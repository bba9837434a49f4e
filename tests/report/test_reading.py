"""Reading: verdicts follow from figures, comparison finds what changed, and pages hold every row."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ruvllm.cli.report import _stem
from ruvllm.measure.peaks import Level, Peaks
from ruvllm.report import compare, html, load, markdown, run, write
from ruvllm.report.results import Report, ReportError
from ruvllm.report.rust_report import TARGETS
from ruvllm.report.summary import FAIL, NOT_MEASURED, PASS, accuracy, standings, verdicts
from ruvllm.report.tables import blocks, duration
from tests.report.report_cases import ALL_ROWS, a_report, timing

# --- verdicts and comparison ---------------------------------------------------------------------------------------


def test_verdicts() -> None:
    gemv, norm = "gemv m=4096 k=4096", "rms_norm rows=1 n=4096"
    found = {v.label: v.status for v in verdicts(a_report({gemv: 4.9e-3, norm: 10.1e-6}))}
    assert found["GEMV, 4096 × 4096"] == PASS
    assert found["RMSNorm, 4096"] == FAIL
    assert list(found.values()).count(NOT_MEASURED) == len(TARGETS) - 2


def test_a_fast_wrong_row_fails() -> None:
    report = a_report({"gemv m=4096 k=4096": 1e-3})
    sections = [
        dataclasses.replace(s, results=tuple(dataclasses.replace(r, error=1e-2) if r.entries else r for r in s.results))
        for s in report.sections
    ]
    report = dataclasses.replace(report, sections=tuple(sections))
    assert next(v.status for v in verdicts(report) if v.label.startswith("GEMV")) == FAIL
    compared, wrong = accuracy(report)
    assert compared == 1 and [result.label for result in wrong] == ["GEMV 4096 × 4096"]
    assert "outside their tolerance: GEMV 4096 × 4096" in markdown(report)


def test_standings() -> None:
    report = a_report({"rms_norm rows=1 n=4096": 620.4e-9 / 2, "rms_norm rows=1 n=2048": 342.72e-9 * 2})
    by_peer = {found.peer: found for found in standings(report, 1)}
    assert by_peer["numpy"].mean == pytest.approx(2) and by_peer["numpy"].ahead == 2
    assert by_peer["rust_m4"].mean == pytest.approx(1) and by_peer["rust_m4"].ahead == 1
    label, ratio = by_peer["rust_m4"].worst
    assert label == "RMSNorm 2048" and ratio == pytest.approx(0.5)


def test_comparison_finds_the_change_that_was_planted() -> None:
    old = a_report({row.id: 1e-3 for row in ALL_ROWS[:20]}, threads=(1, 2))
    new = a_report({row.id: 1e-3 * (0.5 if i == 3 else 1.2 if i == 7 else 1.02) for i, row in enumerate(ALL_ROWS[:20])})
    found = compare(old, new)
    assert [change.id for change in found.of("faster")] == [ALL_ROWS[3].id]
    assert [change.id for change in found.of("slower")] == [ALL_ROWS[7].id]
    assert found.of("slower")[0].speedup == pytest.approx(1 / 1.2)
    assert len(found.only_old) == len(found.changes) and all("threads: 2" in label for label in found.only_old)
    page = html(new, found)
    assert "1 rows faster, 1 slower" in page and ALL_ROWS[7].label in page


def test_comparison_knows_noise_and_other_machines() -> None:
    id = ALL_ROWS[0].id
    old, new = a_report({id: 1e-3}), a_report({id: 1.2e-3}, quick=True, peaks={"1": {"read L1": 2e11}})
    results = old.sections[0].results
    noisy = dataclasses.replace(
        results[0], entries=(dataclasses.replace(results[0].entries[0], call=timing(1e-3, spread=0.5)),)
    )
    section = dataclasses.replace(old.sections[0], results=(noisy, *results[1:]))
    old = dataclasses.replace(old, sections=(section, *old.sections[1:]))
    old.about["machine"]["CPU"] = "another"
    found = compare(old, new)
    assert not found.of("slower") and found.changes[0].noise == pytest.approx(0.25)
    assert [warning.split(":")[0] for warning in found.warnings] == [
        "another machine", "the new report was made with --quick", "the machine itself ran at another speed",
    ]  # fmt: skip


# --- what is written -----------------------------------------------------------------------------------------------


class _Cells(HTMLParser):
    """Widths of a page's table rows, and its links and outside resources."""

    def __init__(self) -> None:
        super().__init__()
        self.widths: list[list[int]] = []
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids |= {found["id"]} if found.get("id") else set()  # type: ignore[arg-type]
        self.links |= {(found["href"] or "")[1:]} if tag == "a" else set()
        self.sources += [name for name in ("src", "data") if name in found] + (["link"] if tag == "link" else [])
        if tag == "table":
            self.widths.append([])
        if tag == "tr":
            self.widths[-1].append(0)
        if tag in ("td", "th"):
            self.widths[-1][-1] += int(found.get("colspan") or 1)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_row_is_in_the_page_and_the_text(tmp_path: Path) -> None:
    report = a_report({row.id: 1e-3 for row in ALL_ROWS[::2]}, threads=(1, 2))
    paths = write(report, tmp_path / "r")
    assert [path.name for path in paths] == ["r.md", "r.json", "r.html"]
    text, page = paths[0].read_text(encoding="utf-8"), paths[2].read_text(encoding="utf-8")
    for row in ALL_ROWS:
        assert row.label in text and row.label in page
    assert text.count("not measured: left out") == page.count("not measured: left out") > 20
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == sum(block.table is not None for block in blocks(report))
    for table in tables:
        assert len({line.count("|") - line.count("\\|") for line in table.splitlines()}) == 1
    cells = _Cells()
    cells.feed(page)
    assert not cells.open and not cells.sources and cells.links == cells.ids
    assert all(len(set(widths)) == 1 for widths in cells.widths) and len(cells.widths) == len(tables)


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    report = a_report({ALL_ROWS[0].id: 1e-3}, threads=(1, 2))
    path = write(report, tmp_path / "r")[1]
    assert load(path) == report
    entry = json.loads(path.read_text())["sections"][0]["results"][0]["entries"][0]
    assert entry["derived"] == {
        "gflops": pytest.approx(1.0), "gbytes": pytest.approx(0.1), "share": pytest.approx(1e-4),
        "ratios": {"numpy": 2.0}, "rust_m4_ratio": pytest.approx(1.74e-3),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a report"), ("[]", "not a report"), ('{"schema": 0}', "schema 0"), ('{"schema": 1}', "not a report")],
)
def test_files_that_are_no_report(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ReportError, match=message):
        load(tmp_path / "r.json")


def test_a_report_of_schema_1_is_read(tmp_path: Path) -> None:
    """It called the figures of the Rust report "seed"."""
    report = a_report({ALL_ROWS[0].id: 1e-3})
    data = json.loads(report.json())
    data["schema"] = 1
    for section in data["sections"]:
        for row in section["results"]:
            row["seed"] = row.pop("rust_m4")
            row["sizes"] = {name.replace("rust_", "seed_"): size for name, size in row["sizes"].items()}
    (tmp_path / "r.json").write_text(json.dumps(data))
    assert load(tmp_path / "r.json") == report


def _change(data: dict[str, Any], path: str, value: object) -> None:
    *way, last = path.split("/")
    for step in way:
        data = data[int(step)] if isinstance(data, list) else data[step]
    data[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("created", 5), ("threads", "12"), ("about", {}), ("about/machine", []), ("peaks", []),
        ("peaks", {"1": {"x": "y"}}),
        ("sections/0/results/0/error", "x"), ("sections/0/results/0/entries/0/call/median", "abc"),
        ("sections/0/results/0/entries/0/call/median", None), ("sections/0/results/0/entries/0/call/median", 0),
        ("sections/0/results/0/entries/0/limit", None), ("sections/0/results/0/sizes", {"fp16": "much"}),
    ],
)  # fmt: skip
def test_damaged_reports_are_named_when_they_are_read(tmp_path: Path, path: str, value: object) -> None:
    data = json.loads(a_report({ALL_ROWS[0].id: 1e-3}).json())
    _change(data, path, value)
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(ReportError, match=r"r\.json: not a report of ruvllm"):
        load(tmp_path / "r.json")


def test_deep_nesting_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("[" * 100_000)
    with pytest.raises(ReportError, match="not a report"):
        load(tmp_path / "r.json")


def test_where_the_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given, stem in (("r", "r"), ("r.json", "r"), ("r.2", "r.2"), (".", "ruvllm-report"), ("", "ruvllm-report")):
        found = _stem(f"{tmp_path}/{given}")
        assert found == tmp_path / stem, given
    with pytest.raises(OSError, match="^--output: there is no directory"):
        _stem(f"{tmp_path}/none/r")

    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(OSError, match="^--output: nothing can be written into .*No space left"):
        _stem(f"{tmp_path}/r")


def test_a_change_of_the_kernel_alone_is_seen() -> None:
    """A call's overhead hides what a kernel of a tenth of a microsecond does."""
    old = a_report({ALL_ROWS[0].id: 1e-3})
    section = old.sections[0]
    row = section.results[0]

    def with_inside(seconds: float) -> Report:
        entry = dataclasses.replace(row.entries[0], inside=timing(seconds))
        changed = dataclasses.replace(row, entries=(entry,))
        return dataclasses.replace(old, sections=(dataclasses.replace(section, results=(changed,)),))

    found = compare(with_inside(1e-7), with_inside(3e-7))
    assert [change.label for change in found.of("slower")] == [f"{row.label}, kernel alone"]
    assert [change.label for change in found.of("same")] == [row.label]


def test_threads_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^threads: expected 1 to \d+ .*, found 9999"):
        run.measure(threads=[1, 9999])


def test_durations() -> None:
    assert [duration(s) for s in (2.5e-8, 9.996e-6, 1.5e-3, 0.1234, 12.34)] == [
        "25.0 ns", "10.0 us", "1.50 ms", "123 ms", "12.3 s",
    ]  # fmt: skip


def test_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command itself, on a few rows."""
    from ruvllm.cli import main

    peaks = Peaks(1, 1e11, 4e11, (Level("memory", float("inf"), 1e10),))
    monkeypatch.setattr(run, "measure_peaks", lambda threads: peaks)
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--quick", "--only", "RMSNorm 768", "--only", "memory", "-t", "1", "--no-peers"]) == 0
    report = load("ruvllm-report.json")
    assert report.quick and report.threads == (1,) and report.peers == {}
    assert [(s.name, len(s.results)) for s in report.sections] == [("norms", 1), ("memory", 4)]
    assert report.results()["llama3-8b memory"].sizes["fp16"] == 16060522496
    assert main(["report", "ruvllm-report.json", "--compare", "ruvllm-report.json", "-o", "same"]) == 0
    assert "0 rows faster, 0 slower, 2 the same" in Path("same.md").read_text(encoding="utf-8")
    for wrong in (["--only", "nothing"], ["-t", "x"], ["-t", "0"], ["--compare", "none.json"], ["-o", "none/x"]):
        assert main(["report", *wrong]) == 2
