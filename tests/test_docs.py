"""The documentation: its Python blocks run in order, every kernel has a page, and what a page names is there."""

import functools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import ruvllm
from benchmarks import peers
from ruvllm.cli.parser import parse
from ruvllm.kernels import KERNELS, KernelSpec
from tools.docs import drawings, kernel_pages, pictures

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = {str(path.relative_to(ROOT / "docs")): BLOCK.findall(path.read_text(encoding="utf-8")) for path in PAGES}

# What must be printed, beyond something.
SAID = {
    "guides/run.md": (r"tokens/s$", r"^'.*The capital of France is", r"\(3, 1000\)$"),
    "guides/precision.md": (r"^perplexity ",),
    "guides/train.md": (r"^loss \d\.\d\d -> \d\.\d\d, LoraAdapter\(rank 4",),
    "guides/inside.md": (r"^\(9, 576\) \(9, 9, 9\)$", r"logit ·Paris - logit ·Rome"),
    "guides/kernels.md": (r"^x / sqrt\(mean\(x\^2\) \+ eps\) \* weight \d\.\d+e-\d+$", r"^float16$", r"^\[(1|0\.9999)"),
    "guides/machines.md": (r"vectorised, 128 bits$", r"vectorised, 256 bits$"),
}


@pytest.fixture(scope="module")
def shared(smollm2_path: Path) -> Any:
    """ruvllm.load, which loads the same model once for all pages."""
    return functools.cache(ruvllm.load)


@pytest.mark.parametrize("page", [page for page, examples in EXAMPLES.items() if examples])
def test_examples_run_in_order(
    page: str, shared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ruvllm, "load", shared)
    names: dict[str, Any] = {"__name__": "docs"}
    said = ""
    for number, example in enumerate(EXAMPLES[page]):
        exec(compile(example, f"{page} example {number}", "exec"), names)
        printed = capsys.readouterr().out
        assert printed.strip() or "print(" not in example, example
        said += printed
    for pattern in SAID.get(page, ()):
        assert re.search(pattern, said, re.MULTILINE), f"{pattern!r} not in {said}"


def test_there_are_examples() -> None:
    assert sum(map(len, EXAMPLES.values())) > 20


@pytest.mark.parametrize("spec", KERNELS.values(), ids=KERNELS.keys())
def test_every_kernel_can_be_tried_as_its_page_says(spec: KernelSpec, capsys: pytest.CaptureFixture[str]) -> None:
    exec(kernel_pages.example(spec), {})
    assert capsys.readouterr().out.startswith("{'")


def test_every_kernel_has_a_page_with_everything() -> None:
    listed = [name for names in kernel_pages.SUBJECTS.values() for name in names]
    assert sorted(listed) == sorted(KERNELS) == sorted(kernel_pages.formulas())
    found = kernel_pages.measured()  # what was measured before a kernel was added leaves that one out
    assert {*found.get("loops", ())} <= {*KERNELS}
    assert {point["name"] for point in found.get("points", ())} <= {*KERNELS}


def test_every_drawing_is_shown_once_and_can_be_drawn() -> None:
    named = [name for path in PAGES for name in re.findall(r"^<!-- figure: (\w+) -->$", path.read_text(), re.M)]
    assert {*named} == {*drawings.DRAWINGS}
    for draw in drawings.DRAWINGS.values():
        assert draw().startswith("<svg") and "\n" not in draw()


def test_commands_and_files_exist() -> None:
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for line in re.findall(r"^ {4}((?:\.venv/bin/)?ruvllm .*)$", text, re.M):
            words = shlex.split(line, comments=True)
            assert parse(words[1:]).command == words[1], f"{path.name}: {line}"
        for line in re.findall(r"^ {4}.*python -m benchmarks\.peers(.*)$", text, re.M):
            peers.parser().parse_args(shlex.split(line, comments=True))
        for name in re.findall(r"`((?:ruvllm|tests|benchmarks|notebooks)/[\w./]*)`", text):
            assert (ROOT / name).exists(), f"{path.name}: {name}"


def test_pictures_of_the_readme_are_those_of_the_tables() -> None:
    """``python -m tools.docs.pictures`` draws them anew."""
    assert len(pictures.rows()) > 20
    for name, drawn in pictures.pictures().items():
        assert (ROOT / "docs/assets" / name).read_text(encoding="utf-8") == drawn, name
