"""README.md: its Python example runs, its commands and options exist, so do the files that it names and links to."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from ruvllm.checkpoint.families import FAMILIES
from ruvllm.cli.parser import parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^ {4}(\S.*)$", README, flags=re.MULTILINE)


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_example_runs(smollm2_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "readme"}
    (example,) = EXAMPLES
    exec(compile(example, "README example", "exec"), names)
    printed = capsys.readouterr().out
    assert names["answer"].finish_reason in ("stop", "length") and "tokens/s" in printed
    assert float(printed.split()[-1]) < 1e-5


def test_the_table_of_models_has_every_family() -> None:
    text = (ROOT / "docs/reference/models.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if "ForCausalLM" in line and line.startswith("|")]
    told = {(tuple(re.findall(r"`(\w+)`", classes)), architecture.strip(" `")) for _, classes, architecture, _ in rows}
    assert told == {(family.classes, family.architecture) for family in FAMILIES}
    comparison = (ROOT / "docs/comparison.md").read_text(encoding="utf-8")
    assert f"[{len(rows)} families]" in comparison


def test_commands_are_understood() -> None:
    """Each indented line, as its own program would read it."""
    seen = set()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for line in COMMANDS:
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            assert words[1] in targets, line
        elif words[0].endswith("ruvllm"):
            assert parse(words[1:]).command == words[1], line
        else:
            continue
        seen.add(line.split()[0])
    assert {"make", "ruvllm", ".venv/bin/ruvllm"} <= seen


def test_what_make_runs_is_told_as_it_is() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    settings = dict(re.findall(r"^([A-Z_]+) \?= (.*)$", makefile, flags=re.MULTILINE)) | {"BIN": ".venv/bin"}
    expanded = re.sub(r"\$\(([A-Z_]+)\)", lambda m: settings.get(m[1], ""), makefile)
    told = [line.strip() for line in COMMANDS if line.startswith((".venv/bin/", "python3 "))]
    assert len(told) == 6
    for line in told:
        assert f"\t{line}" in expanded, line


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / name).read_text(encoding="utf-8"))
    assert len(links) > 5
    for link in links:
        assert link.startswith("https:") or (ROOT / link).exists(), link
