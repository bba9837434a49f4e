"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from ruvllm.report.comparison import Comparison
from ruvllm.report.results import Report
from ruvllm.report.tables import Table, blocks, origin


def markdown(report: Report, comparison: Comparison | None = None) -> str:
    """The whole report, with what changed since an older one."""
    lines = [
        "# ruvllm report",
        "",
        origin(report),
    ]
    for block in blocks(report, comparison):
        lines += ["", f"## {block.title}"]
        for text in block.before:
            lines += ["", _escaped(text)]
        if block.table is not None:
            lines += ["", *_table(block.table)]
        for text in block.after:
            lines += ["", _escaped(text)]
    return "\n".join(lines) + "\n"


def _table(table: Table) -> Iterator[str]:
    widths = [max(len(_escaped(row[i])) for row in (table.headings, *table.rows)) for i in range(len(table.headings))]
    yield _line(table.headings, widths)
    yield "|" + "|".join("-" * (w + 1) + ":" if table.numeric(i) else "-" * (w + 2) for i, w in enumerate(widths)) + "|"
    for row in table.rows:
        yield _line(row, widths)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    return "| " + " | ".join(_escaped(cell).ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
