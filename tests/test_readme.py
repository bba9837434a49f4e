"""README.md: its Python examples run, its commands and options exist, so do the files that it names."""

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import peers
from ruvllm.checkpoint.families import FAMILIES
from ruvllm.cli.parser import parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^ {4}(\S.*)$", README, flags=re.MULTILINE)


def test_examples_run_in_order(
    smollm2_path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    printed = []
    for number, example in enumerate(EXAMPLES):
        exec(compile(example, f"README example {number}", "exec"), names)
        printed.append(capsys.readouterr().out)
        assert printed[-1].strip(), example
    assert len(EXAMPLES) == 13 and (tmp_path / "mood.gguf").exists()
    assert names["answer"].finish_reason in ("stop", "length") and "tokens/s" in printed[0]
    assert len(names["cache"]) == len(names["ids"]) + 1
    assert names["llm"].tokenizer.decode(names["ids"]) in printed[2].strip("'\n")
    assert float(printed[3].split()[-1]) < 1e-5
    np.testing.assert_allclose([float(n) for n in re.findall(r"[\d.]+", printed[4])], 1, rtol=1e-4)
    assert "(3, 1000)" in printed[5]
    assert printed[6].startswith("perplexity ")
    assert printed[9].startswith("(9, 576) (9, 9, 9)") and "logit ·Paris - logit ·Rome" in printed[9]
    assert re.match(r"loss \d\.\d\d -> \d\.\d\d, LoraAdapter\(rank 4", printed[8])


def test_the_table_of_models_has_every_family() -> None:
    rows = [line.split("|")[1:-1] for line in README.splitlines() if "ForCausalLM" in line and line.startswith("|")]
    told = {(tuple(re.findall(r"`(\w+)`", classes)), architecture.strip(" `")) for _, classes, architecture, _ in rows}
    assert told == {(family.classes, family.architecture) for family in FAMILIES}


def test_commands_are_understood() -> None:
    """Each indented line, as its own program would read it."""
    seen = set()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for line in COMMANDS:
        words = [word for word in shlex.split(line, comments=True) if not word.startswith("RUVLLM_")]
        if words[0] == "make":
            assert words[1] in targets, line
        elif words[0].endswith("ruvllm"):
            assert parse(words[1:]).command == words[1], line
        elif words[1:3] == ["-m", "benchmarks.peers"]:
            peers.parser().parse_args(words[3:])
        else:
            continue
        seen.add(line.split()[0])
    assert {"make", "ruvllm", ".venv/bin/ruvllm", "python"} <= seen


def test_what_make_runs_is_told_as_it_is() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    settings = dict(re.findall(r"^([A-Z_]+) \?= (.*)$", makefile, flags=re.MULTILINE)) | {"BIN": ".venv/bin"}
    expanded = re.sub(r"\$\(([A-Z_]+)\)", lambda m: settings.get(m[1], ""), makefile)
    told = [line.strip() for line in COMMANDS if line.startswith((".venv/bin/", "python3 "))]
    demo_and_test = [line for line in told if "benchmarks" not in line]
    assert len(demo_and_test) == 6
    for line in demo_and_test:
        assert f"\t{line}" in expanded, line


def test_files_exist() -> None:
    named = set(re.findall(r"`((?:ruvllm|tests|benchmarks)/[\w./]*)`", README))
    assert len(named) > 15
    for name in sorted(named):
        assert (ROOT / name).exists(), name
