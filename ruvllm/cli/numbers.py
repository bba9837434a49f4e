"""Numbers on the command line, refused by the option's name where they lie outside its range."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def integer(low: int, *others: int) -> Callable[[str], int]:
    """A parser of integers from ``low`` up, or of ``others``, which have a special meaning."""

    def read(text: str) -> int:
        value = int(text)
        if value < low and value not in others:
            also = "".join(f" or {other}" for other in others)
            raise argparse.ArgumentTypeError(f"expected {low} or more{also}, found {value}")
        return value

    read.__name__ = "integer"  # argparse says "invalid integer value" where it is none
    return read


def number(low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """A parser of finite numbers from ``low``, or only ``above`` it, to ``high``."""

    def read(text: str) -> float:
        value = float(text)
        if not (low < value if above else low <= value) or value > high or math.isinf(value):
            lowest = f"above {low:g}" if above else f"of {low:g} or more"
            most = "" if high == math.inf else f", at most {high:g}"
            raise argparse.ArgumentTypeError(f"expected a number {lowest}{most}, found {text}")
        return value

    read.__name__ = "number"
    return read


def shares(text: str) -> list[float] | str:
    """--shares: "auto", or numbers "3,1"."""
    if text == "auto":
        return text
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < part < float("inf") for part in found):
        raise argparse.ArgumentTypeError(f"expected auto, or a number above 0 for each rank (3,1), found {text!r}")
    return found
