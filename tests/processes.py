"""Python in a process of its own: what it prints, or a failure with the end of what it says on stderr."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


HANGING = 900  # seconds after which a process is ended: no matter of speed


def python(*arguments: object, **environment: str | None) -> str:
    """What ``python *arguments`` prints, run in the project's directory.

    environment: variables beside those of this process; None takes one away.
    """
    variables = {name: value for name, value in (os.environ | environment).items() if value is not None}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=variables, cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=HANGING,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
