"""SECURITY.md: every test that it names exists, every program, and every row of the table of bad input."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", PAGE)
    assert len(named) > 30
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE), (file, test)


def test_every_program_exists() -> None:
    programs = re.findall(r"`python -m ([\w.]+)", PAGE)
    assert programs
    for program in programs:
        assert importlib.util.find_spec(program), program


def test_every_row_has_a_test() -> None:
    rows: list[int] = []
    for cell in re.findall(r"^\| (\d[\d, -]*) \|", PAGE, flags=re.MULTILINE):
        for part in cell.split(", "):
            first, _, last = part.partition("-")
            rows += range(int(first), int(last or first) + 1)
    assert sorted(rows) == list(range(1, 52))
