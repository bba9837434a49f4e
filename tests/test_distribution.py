"""What is released: sdist and wheel, installed and used outside of the repository; versions and requirements agree."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import ruvllm

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT)
    return out


def test_wheel_is_for_any_platform_and_holds_the_library_alone(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"ruvllm-{ruvllm.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"ruvllm", f"ruvllm-{ruvllm.__version__}.dist-info"}
    assert "ruvllm/py.typed" in names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "ruvllm").rglob("*.py")}
    assert sources <= {*names}


def test_sdist_holds_what_builds_tests_and_documents_it(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    assert {"pyproject.toml", "tests/conftest.py", "CHANGELOG.md", "mkdocs.yml", "docs/index.md", "LICENSE"} <= names


def test_what_an_index_shows(built: Path) -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir())
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    page = metadata.get_payload()
    assert isinstance(page, str)
    assert page.startswith("# ruvllm\n")
    assert not re.findall(r"\]\((?!https?:|#)[^)]*\)", page)  # links that lead nowhere there


def test_installed_elsewhere_it_works(built: Path, tmp_path: Path) -> None:
    """In an empty environment, whose dependencies are those of this one, as they would take minutes to download."""
    (wheel,) = built.glob("*.whl")
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    program = (
        "import sys, numpy as np, ruvllm\n"
        "from ruvllm.kernels import KERNELS\n"
        "spec = KERNELS['rms_norm']\n"
        "inputs = spec.example(np.random.default_rng(0), rows=2, n=33)\n"
        "assert np.abs(spec.function(**inputs) - spec.reference(**inputs)).max() < 1e-5\n"
        "print(ruvllm.__file__)"
    )
    outside = {"PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
    assert run(python, "-c", program, **outside).startswith(str(home))
    assert run(home / "bin" / "ruvllm", "--version", **outside).split()[-1] == ruvllm.__version__
    assert "INT4" in run(home / "bin" / "ruvllm", "memory", "llama3-8b", **outside)


def test_versions_agree() -> None:
    version = ruvllm.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {version} - 20" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    recipe = (ROOT / "packaging/conda/meta.yaml").read_text(encoding="utf-8")
    assert f'version = "{version}"' in recipe
    wanted = recipe.partition("  run:")[2].partition("test:")[0]
    found = {line.strip("- ").replace(" ", "") for line in wanted.splitlines() if line.strip().startswith("-")}
    assert found == {*PROJECT["dependencies"], f"python{PROJECT['requires-python']}"}
