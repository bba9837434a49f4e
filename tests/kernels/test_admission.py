"""Late threads join a team at every admission point, in any order of atomic accesses, and nobody hangs.

Each schedule is a replay of the region's own code in plain Python under a scheduler (admission_cases.py): every unit of
work is done once, all members agree on the size of the team, and the result is right.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.kernels.admission_cases import LAYERS

ROOT = Path(__file__).parents[2]


def test_no_schedule_hangs_or_computes_anything_else() -> None:
    command = [sys.executable, "-m", "tests.kernels.admission_cases"]
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    halves = [
        subprocess.Popen(
            [*command, str(first), str(first + 300)], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for first in (0, 300)
    ]  # fmt: skip
    seen: set[str] = set()
    for half in halves:
        out, log = half.communicate(timeout=500)
        assert half.returncode == 0, log
        seen |= json.loads(out).keys()
    for layer in range(1, LAYERS):  # one of two and two of three came late, at each point
        assert {f"1 to 2 in layer {layer}", f"2 to 3 in layer {layer}"} <= seen
    assert {f"0 to {size} in layer 0" for size in (1, 2, 3)} <= seen
