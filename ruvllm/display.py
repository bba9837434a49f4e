"""How results are shown: as a text table, as HTML in a notebook, and on a matplotlib axis."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

Rows = Sequence[tuple[str, ...]]  # a table of strings; the first row holds the headings


class Table(ABC):
    """A result with a heading and rows, which print() shows as text and a notebook as a table."""

    @abstractmethod
    def heading(self) -> str:
        """One line above the table."""

    @abstractmethod
    def rows(self) -> Rows:
        """The cells; the first row holds the headings."""

    def __str__(self) -> str:
        return as_text(self.heading(), self.rows())

    def _repr_html_(self) -> str:
        return as_html(self.heading(), self.rows())


def as_text(heading: str, rows: Rows) -> str:
    """The heading, then the table: the first column left-aligned, numeric columns right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = [_numeric(rows, i) for i in range(len(widths))]
    lines = (
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join([heading, *lines])


def as_html(heading: str, rows: Rows) -> str:
    """The same as an HTML paragraph and table; only the paragraph if there are no rows."""
    if not rows:
        return f"<p>{html.escape(heading)}</p>"
    align = ["right" if _numeric(rows, i) else "left" for i in range(len(rows[0]))]

    def line(tag: str, row: tuple[str, ...]) -> str:
        cells = (f'<{tag} style="text-align: {a}">{html.escape(c)}</{tag}>' for c, a in zip(row, align, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    head, *body = rows
    return f"<p>{html.escape(heading)}</p><table>{line('th', head)}{''.join(line('td', row) for row in body)}</table>"


def axis(ax: Any = None) -> Any:
    """``ax``, or the axis of a new figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if ax is not None:
        return ax
    return _pyplot().subplots(layout="constrained")[1]


def panels(count: int, columns: int, size: float) -> list[Any]:
    """The axes of a new figure of ``count`` panels, each ``size`` inches wide and high.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = -(-count // columns)
    _, axes = _pyplot().subplots(
        rows, columns, figsize=(size * columns, size * rows), squeeze=False, sharex=True, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for unused in axes.flat[count:]:
        unused.remove()
    for above in axes.flat[max(0, count - columns) : count]:  # nothing is below
        above.tick_params(labelbottom=True)
    return list(axes.flat[:count])


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'ruvllm[lab]'") from None
    return plt


def _numeric(rows: Rows, column: int) -> bool:
    """Whether a column other than the first holds only numbers, with or without units."""
    cells = [row[column] for row in rows[1:] if row[column] not in ("", "-")]
    return column > 0 and bool(cells) and all(cell.lstrip("+-")[:1].isdigit() for cell in cells)
