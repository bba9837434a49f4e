"""Printing of the command line: text and tables, to a terminal or a pipe."""

from __future__ import annotations

import os
import sys
from typing import Any


def show(content: Any, stderr: bool = False, **options: Any) -> None:
    """Print a table or text: colours only on a terminal (unless NO_COLOR is set), no wrapping in a pipe."""
    stream = sys.stderr if stderr else sys.stdout
    coloured = stream.isatty() or os.environ.get("FORCE_COLOR")
    if isinstance(content, str) and not options.get("markup", True) and not coloured:
        print(content, end=options.get("end", "\n"), file=stream, flush=True)  # as is: no need of rich
        return
    from rich.console import Console

    console = Console(file=stream, highlight=False, width=None if stream.isatty() else 200)
    # Captured first: rich itself would end the program when the reader of a pipe is gone.
    with console.capture() as rendered:
        console.print(content, **options)
    print(rendered.get(), end="", file=stream, flush=True)
