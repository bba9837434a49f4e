"""The command `report`: measure, or read a report; write it, and show its summary."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ruvllm.cli.parser import take_last
from ruvllm.cli.show import show
from ruvllm.paths import require_writable


def report(args: argparse.Namespace) -> None:
    """Write STEM.md, STEM.json and STEM.html and print the summary."""
    from ruvllm.report import compare, load, measure, write
    from ruvllm.report.tables import blocks

    given = take_last(args)
    old = load(args.compare) if args.compare else None
    stem = _stem(args.output)
    if given is not None:
        found = load(given)
    else:
        found = measure(args.quick, args.only, _threads(args.threads), peers=not args.no_peers)
    comparison = None if old is None else compare(old, found)
    paths = write(found, stem, comparison)
    for block in blocks(found, comparison):
        if block.anchor in ("summary", "peers", "changes"):
            show(_table(block), markup=False)
    for path in paths:
        print(path)


def _stem(given: str) -> Path:
    """Where the files go, known to be writable before anything is measured."""
    stem = Path(given)
    if stem.suffix in (".md", ".json", ".html"):
        stem = stem.with_suffix("")
    if stem.is_dir():
        stem /= "ruvllm-report"
    if not stem.parent.is_dir():
        raise FileNotFoundError(f"--output: there is no directory {stem.parent}")
    require_writable("--output", stem.parent)
    return stem


def _threads(given: str | None) -> list[int] | None:
    try:
        return None if given is None else [int(count) for count in given.split(",")]
    except ValueError:
        raise ValueError(f"--threads: expected numbers such as 1,2, found {given!r}") from None


def _table(block: Any) -> Any:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = [Text(block.title, style="bold"), *map(Text, block.before)]
    if block.table is not None:
        table = Table(box=box.SIMPLE_HEAD)
        for column, heading in enumerate(block.table.headings):
            table.add_column(heading, justify="right" if block.table.numeric(column) else "left")
        for row in block.table.rows:
            table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
        parts.append(table)
    return Group(*parts, *map(Text, block.after), Text())


_STYLES = {"PASS": "green", "faster": "green", "FAIL": "bold red", "slower": "red"}
