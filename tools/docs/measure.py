"""``python -m tools.docs.measure``: write docs/kernels.json, from which the pages of kernels take loops and speed.

Leave the machine alone while it runs, a few minutes. ``--loops`` and ``--speed`` renew one of the two, and keep the
other as it was.
"""

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from ruvllm import machine
from ruvllm.kernels import KERNELS
from ruvllm.lab import TARGETS, explain_all, roofline

OUT = Path(__file__).parents[2] / "docs" / "kernels.json"
_BOUNDS = {"FMA": "float32 arithmetic", "int8 dot": "8-bit arithmetic"}


def loops() -> dict[str, dict[str, Any]]:
    """For each kernel and foreign target: the verdict of explain, and its table of loops."""
    targets = [target for target in TARGETS if target != "host"]
    found = explain_all(KERNELS, targets)
    return {
        name: {
            target: {
                "verdict": found[name, target].heading().partition(": ")[2],
                "rows": [list(row) for row in found[name, target].rows()],
            }
            for target in targets
        }
        for name in KERNELS
    }


def speed() -> dict[str, Any]:
    """The limits of this machine on one thread, and each kernel's place among them."""
    found, facts = roofline(*KERNELS), machine.machine()
    peaks = found.peaks
    points = []
    for point in found.points:
        least, bound = peaks.least_seconds(point.flops, point.nbytes, point.integer)
        points.append(
            {
                "name": point.name, "sizes": point.sizes, "us": point.seconds * 1e6, "intensity": point.intensity,
                "gflops": point.flops / point.seconds / 1e9, "gbs": point.nbytes / point.seconds / 1e9,
                "share": least / point.seconds, "bound": _BOUNDS.get(bound, f"reading {bound}"),
            }
        )  # fmt: skip
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{facts['CPU']}, {facts['cores']} cores",
        "peaks": {"fma": peaks.fma / 1e9, "read": {level.name: level.bandwidth / 1e9 for level in peaks.levels}},
        "points": points,
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loops", action="store_true", help="only compile, for three processors")
    parser.add_argument("--speed", action="store_true", help="only measure this machine")
    arguments = parser.parse_args()
    both = arguments.loops == arguments.speed
    found = {} if both or not OUT.exists() else json.loads(OUT.read_text(encoding="utf-8"))
    if both or arguments.speed:
        found |= speed()
    if both or arguments.loops:
        found["loops"] = loops()
    OUT.write_text(json.dumps(found, indent=1, default=float) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
