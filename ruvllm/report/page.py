"""A report as one self-contained HTML page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape

from ruvllm.report.comparison import FASTER, SLOWER, Comparison
from ruvllm.report.results import Report
from ruvllm.report.summary import FAIL, NOT_MEASURED, PASS
from ruvllm.report.tables import NOTHING, SHARE, Block, Table, blocks, origin

_MARKED = {PASS: "good", FASTER: "good", FAIL: "bad", SLOWER: "bad"}
_STYLE = """
:root { --ink: #1d2430; --soft: #5b6675; --line: #dfe4ea; --paper: #fff; --shade: #f5f7f9; --bar: #bcd4ee;
  --good: #1a7f4b; --bad: #b3261e; --link: #1f5fa8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #98a3b3; --line: #333b47; --paper: #14181e;
  --shade: #1b2028; --bar: #2b4a6d; --good: #58c48b; --bad: #f2877f; --link: #8ab8ee; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1500px; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .4rem; }
p { margin: .4rem 0; max-width: 58rem; }
.origin, .after, nav { color: var(--soft); font-size: .88rem; }
nav { margin: 1rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
code { font: .92em ui-monospace, monospace; }
.scroll { overflow-x: auto; margin: .7rem 0; border: 1px solid var(--line); border-radius: 6px; width: fit-content;
  max-width: 100%; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .34rem .7rem; text-align: left; vertical-align: top; }
th { background: var(--shade); font-weight: 600; vertical-align: bottom; min-width: 3.6rem; }
td { border-top: 1px solid var(--line); }
tbody tr:hover td { background: var(--shade); }
td.number, th.number { text-align: right; }
td.number { white-space: nowrap; }
td:first-child { white-space: nowrap; }
td.words { min-width: 16rem; max-width: 40rem; }
td.nothing, td.reason { color: var(--soft); }
td.share { background: linear-gradient(to right, var(--bar) var(--width), transparent var(--width)) no-repeat; }
.good, .bad { font-weight: 600; color: var(--good); }
.bad { color: var(--bad); }
@media print { nav { display: none; } .scroll { border: 0; } h2 { break-after: avoid; } tr { break-inside: avoid; } }
"""


def html(report: Report, comparison: Comparison | None = None) -> str:
    """The whole report, with what changed since an older one."""
    parts = list(blocks(report, comparison))
    links = "".join(f'<a href="#{escape(part.anchor)}">{escape(part.title)}</a>' for part in parts)
    body = "\n".join(line for part in parts for line in _block(part))
    title = f"ruvllm report, {report.created[:10]}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>ruvllm report</h1>
<p class="origin">{_text(origin(report))}</p>
<nav>{links}</nav>
{body}
</main>
</body>
</html>
"""


def _block(block: Block) -> Iterator[str]:
    yield f'<section id="{escape(block.anchor)}"><h2>{escape(block.title)}</h2>'
    for text in block.before:
        yield f"<p>{_text(text)}</p>"
    if block.table is not None:
        yield from _table(block.table)
    for text in block.after:
        yield f'<p class="after">{_text(text)}</p>'
    yield "</section>"


def _table(table: Table) -> Iterator[str]:
    numeric = [table.numeric(i) for i in range(len(table.headings))]
    yield '<div class="scroll"><table>'
    if any(table.headings):
        cells = (f"<th{' class=number' * n}>{escape(h)}</th>" for h, n in zip(table.headings, numeric, strict=True))
        yield f"<thead><tr>{''.join(cells)}</tr></thead>"
    yield "<tbody>"
    for row in table.rows:
        yield f"<tr>{''.join(_cells(table, row, numeric))}</tr>"
    yield "</tbody></table></div>"


def _cells(table: Table, row: tuple[str, ...], numeric: list[bool]) -> Iterator[str]:
    """A row; a reason takes the place of the empty cells after it."""
    column = 0
    while column < len(row):
        cell, span, kind, style = row[column], 1, "number" if numeric[column] else "", ""
        if cell.startswith(f"{NOT_MEASURED}: "):
            kind = "reason"
            while column + span < len(row) and row[column + span] == NOTHING:
                span += 1
        elif cell == NOTHING:
            kind += " nothing"
        elif cell in _MARKED:
            kind = _MARKED[cell]
        elif table.headings[column] == SHARE:
            kind, style = "number share", f' style="--width: {min(float(cell.split()[0]), 100):.0f}%"'
        elif len(cell) > 40:
            kind = "words"
        spanned = f' colspan="{span}"' if span > 1 else ""
        yield f'<td class="{kind.strip()}"{spanned}{style}>{_text(cell)}</td>'
        column += span


def _text(text: str) -> str:
    """Escaped, with `code` in backquotes."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))
