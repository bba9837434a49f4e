"""`ruvllm report`: every row of the Rust report measured on this machine, against its peers and limits.

from ruvllm.report import measure, write
report = measure(quick=True)
write(report, "report")        # report.md, report.json, report.html
"""

from __future__ import annotations

from pathlib import Path

from ruvllm.report.comparison import Comparison, compare
from ruvllm.report.page import html
from ruvllm.report.results import Report, ReportError, load
from ruvllm.report.run import measure
from ruvllm.report.text import markdown

__all__ = ["Comparison", "Report", "ReportError", "compare", "html", "load", "markdown", "measure", "write"]


def write(report: Report, stem: str | Path, comparison: Comparison | None = None) -> list[Path]:
    """Write STEM.md, STEM.json and STEM.html; their paths. Raises OSError."""
    texts = {"md": markdown(report, comparison), "json": report.json(), "html": html(report, comparison)}
    paths = [Path(f"{stem}.{ending}") for ending in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths
