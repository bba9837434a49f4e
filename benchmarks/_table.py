"""Markdown tables printed line by line, and options that name some of several things."""

from __future__ import annotations

Headings = tuple[tuple[str, int], ...]  # of each column: its name and width; a negative width aligns to the left

NOT_INSTALLED = "not installed"


def table_line(*cells: object, headings: Headings) -> str:
    """A line of a table."""
    texts = (
        f"{cell!s:<{-width}}" if width < 0 else f"{cell!s:>{width}}"
        for cell, (_, width) in zip(cells, headings, strict=True)
    )
    return "| " + " | ".join(texts) + " |"


def table_head(headings: Headings) -> str:
    """The headings and the rule below them."""
    rule = "|".join("-" * (2 - width) if width < 0 else "-" * (width + 1) + ":" for _, width in headings)
    return f"{table_line(*(name for name, _ in headings), headings=headings)}\n|{rule}|"


def chosen(option: str, given: str, known: tuple[str, ...]) -> list[str]:
    """The names in a comma-separated option, in the order of ``known``.

    Raises:
        ValueError: a name that is not known, or none at all.
    """
    names = [name for name in given.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"{option}: expected some of {','.join(known)}, found {given!r}")
    return [name for name in known if name in names]
