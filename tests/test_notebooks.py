"""The notebooks run from top to bottom, each in a kernel of its own, show pictures, and pose exercises with answers."""

import os
from pathlib import Path

import nbclient
import nbformat
import pytest


def _number(path: Path) -> int:
    return int(path.name.partition("_")[0])


NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"), key=_number)


def test_notebooks_are_there_without_outputs() -> None:
    assert [_number(path) for path in NOTEBOOKS] == list(range(1, 11))
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
        assert all(len(line) <= 120 for cell in cells for line in cell.source.splitlines())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises_have_answers(path: Path) -> None:
    """Three questions, and as many answers in code that Jupyter hides until it is asked for."""
    cells = nbformat.read(path, as_version=4).cells
    (exercises,) = (cell.source for cell in cells if "## Exercises" in cell.source)
    assert [f"\n{i}. " in exercises for i in (1, 2, 3, 4)] == [True, True, True, False]
    assert exercises.endswith(("## Answers", "open the cells below."))
    answers = cells[-3:]
    assert [cell.source.splitlines()[0][:5] for cell in answers] == ["# 1. ", "# 2. ", "# 3. "]
    assert all(cell.metadata["jupyter"]["source_hidden"] for cell in answers)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    root = str(Path(__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    errors = [o.get("text", "") for o in outputs if o.get("name") == "stderr" and "Warning" in o.get("text", "")]
    assert not errors, errors
