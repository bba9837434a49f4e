"""The compile cache: never stale, never another user's, never half a file. Each run is a process of its own."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ruvllm
from ruvllm import paths
from ruvllm.kernels import reference
from ruvllm.kernels.jit import cache as compile_cache
from ruvllm.kernels.jit.decorators import kernel
from tests.processes import python

PACKAGE = Path(ruvllm.__file__).parent

# silu_mul's formula is in activation.py, and what it calls is in simd/math.py.
PROGRAM = """
import json
import numpy as np
from ruvllm.kernels import silu_mul
from ruvllm.kernels.jit.decorators import COMPILED
x = np.arange(40, dtype=np.float32).reshape(2, 2, 10)  # of three dimensions: no small call, which has its own code
y = silu_mul(x, x)
stats = [f.stats for f in COMPILED]
print(json.dumps({"loaded": sum(sum(s.cache_hits.values()) for s in stats),
                  "compiled": sum(sum(s.cache_misses.values()) for s in stats), "y": y.tolist()}))
"""
X = np.arange(40, dtype=np.float32).reshape(2, 2, 10)
EXPECTED = reference.silu_mul(X, X)


@dataclass
class Outcome:
    loaded: int
    compiled: int
    y: list[float]
    log: str

    def is_right(self) -> bool:
        return np.allclose(self.y, EXPECTED, rtol=1e-6)


@dataclass
class Setup:
    """A cache directory, and the copy of the package that runs with it."""

    cache: Path
    source: Path

    def start(self, program: str = PROGRAM, settings: dict[str, str] | None = None) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
        paths = {"RUVLLM_CACHE": str(self.cache), "PYTHONPATH": ""}
        return subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**kept, **paths, **(settings or {})}, cwd=self.source.parent,  # where python -c looks first
        )  # fmt: skip

    def run(self, program: str = PROGRAM, settings: dict[str, str] | None = None) -> Outcome:
        return finish(self.start(program, settings))

    def entries(self) -> list[Path]:
        return sorted(self.cache.rglob("*.nbc"))

    @property
    def generation(self) -> Path:
        """The only directory of machine code."""
        (directory,) = (self.cache / "kernels").iterdir()
        return directory


def finish(process: subprocess.Popen[str]) -> Outcome:
    out, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    return Outcome(**json.loads(out), log=log)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, which nobody edits while the tests run."""
    copy = tmp_path_factory.mktemp("package") / "ruvllm"
    return Path(shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__")))


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, package: Path) -> Setup:
    """A cache that one run has filled."""
    setup = Setup(tmp_path_factory.mktemp("cache") / "ruvllm", package)
    first = setup.run()
    assert first.is_right()
    assert first.loaded == 0
    assert first.compiled == len(setup.entries()) >= 1
    return setup


@pytest.fixture
def spoilable(filled: Setup, tmp_path: Path) -> Setup:
    """A copy of that cache."""
    return Setup(Path(shutil.copytree(filled.cache, tmp_path / "cache")), filled.source)


@pytest.fixture
def editable(spoilable: Setup, tmp_path: Path) -> Setup:
    """A copy of that cache and of the package."""
    return Setup(spoilable.cache, Path(shutil.copytree(spoilable.source, tmp_path / "elsewhere" / "ruvllm")))


@pytest.fixture
def empty(package: Path, tmp_path: Path) -> Setup:
    """No cache yet."""
    return Setup(tmp_path / "cache", package)


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_second_process_compiles_nothing(filled: Setup) -> None:
    second = filled.run()
    assert second.is_right()
    assert (second.loaded, second.compiled) == (len(filled.entries()), 0)
    assert second.log == ""


def test_directories_and_entries_belong_to_the_user_alone(filled: Setup) -> None:
    for path in (filled.cache / "kernels", filled.generation):
        assert path.stat().st_mode & 0o777 == 0o700
    for entry in filled.entries():
        assert entry.stat().st_mode & 0o077 == 0


def test_an_edited_callee_in_another_package_is_compiled_anew(editable: Setup) -> None:
    assert editable.run().compiled == 0  # the same sources elsewhere: the same machine code
    math = editable.source / "kernels" / "simd" / "math.py"
    _edit(math, "return x * sigmoid(x)", "return x * sigmoid(x) + x")
    edited = editable.run()
    assert edited.loaded == 0
    assert edited.compiled >= 1
    np.testing.assert_allclose(edited.y, EXPECTED + X * X, rtol=1e-6)
    _edit(math, "return x * sigmoid(x) + x", "return x * sigmoid(x)")
    again = editable.run()
    assert again.compiled == 0  # the first version's code is still there
    assert again.is_right()


def test_a_changed_flag_of_the_decorator_is_compiled_anew(editable: Setup) -> None:
    decorators = editable.source / "kernels" / "jit" / "decorators.py"
    _edit(decorators, '"contract", "reassoc", "nsz", "arcp", "afn"', '"contract", "nsz"')
    changed = editable.run()
    assert changed.loaded == 0
    assert changed.compiled >= 1
    assert changed.is_right()


@pytest.mark.parametrize("setting", [{"NUMBA_OPT": "1"}, {"NUMBA_BOUNDSCHECK": "1"}, {"NUMBA_CPU_NAME": "generic"}])
def test_a_changed_setting_of_numba_is_compiled_anew(spoilable: Setup, setting: dict[str, str]) -> None:
    changed = spoilable.run(settings=setting)
    assert changed.loaded == 0
    assert changed.compiled >= 1
    assert changed.is_right()
    assert spoilable.run(settings=setting).compiled == 0
    assert spoilable.run().compiled == 0


EDIT_MATH = """
import pathlib, ruvllm.kernels.activation
path = pathlib.Path(ruvllm.kernels.__file__).parent / "simd" / "math.py"
path.write_text(path.read_text() + "# edited")
"""


def test_sources_that_change_while_they_run_are_not_cached(editable: Setup) -> None:
    """Imported before the edit and compiled after it: nobody knows which version an entry would hold."""
    shutil.rmtree(editable.cache)
    outcome = editable.run(EDIT_MATH + PROGRAM)
    assert outcome.is_right()
    assert outcome.compiled >= 1
    assert "kernels have changed on disk" in outcome.log
    assert editable.entries() == []


def test_sources_that_change_between_two_compilations_are_not_cached(editable: Setup) -> None:
    before = editable.entries()
    later = "from ruvllm.kernels import add\nadd(x, x)\n"
    editable.run(PROGRAM + EDIT_MATH + later)
    assert editable.entries() == before


def _truncate(size: int) -> Callable[[Path], object]:
    return lambda entry: entry.write_bytes(entry.read_bytes()[:size])


def _flip(at: float) -> Callable[[Path], object]:
    def spoil(entry: Path) -> object:
        data = bytearray(entry.read_bytes())
        data[int(at * (len(data) - 1))] ^= 0x40
        return entry.write_bytes(data)

    return spoil


SPOILT: dict[str, Callable[[Path], object]] = {
    "empty": _truncate(0),
    "cut in the code": _truncate(2000),
    "last byte missing": _truncate(-1),
    "bit in the checksum": _flip(0.0),
    "bit in the middle": _flip(0.5),
    "noise": lambda entry: entry.write_bytes(np.random.default_rng(0).bytes(5000)),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_damaged_entry_is_compiled_again(spoilable: Setup, how: str) -> None:
    for entry in spoilable.entries():
        SPOILT[how](entry)
    outcome = spoilable.run()
    assert outcome.is_right()
    assert (outcome.loaded, outcome.compiled) == (0, len(spoilable.entries()))
    assert outcome.log.count("damaged entry in the compile cache") == outcome.compiled


def test_a_damaged_entry_is_mended(spoilable: Setup) -> None:
    for entry in spoilable.entries():
        entry.write_bytes(b"")
    assert spoilable.run().compiled == len(spoilable.entries())
    mended = spoilable.run()
    assert mended.compiled == 0
    assert mended.is_right()


def test_an_entry_under_another_name_is_not_used(spoilable: Setup) -> None:
    """A whole, valid file, but of another kernel: its key says so."""
    (ours,) = spoilable.entries()
    spoilable.run("import numpy as np\nfrom ruvllm.kernels import scale\nscale(np.ones(40, np.float32), 2)\n" + PROGRAM)
    (theirs,) = set(spoilable.entries()) - {ours}
    shutil.copy(theirs, ours)
    outcome = spoilable.run()
    assert outcome.is_right()
    assert (outcome.loaded, outcome.compiled) == (0, 1)


class Planted:
    """Makes a directory when it is unpickled."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trap),)


def _plant(entry: Path, trap: Path) -> None:
    """Replace an entry by one as whole and valid, but of another's code."""
    content = entry.read_bytes()[32:64] + pickle.dumps(Planted(trap))
    entry.write_bytes(hashlib.sha256(content).digest() + content)


def _refused(setup: Setup, reason: str, entries: Sequence[Path] = ()) -> None:
    """The cache is left alone, one line says why, and the result is right; what is planted in entries never runs."""
    ours = [entry.read_bytes() for entry in entries]
    trap = setup.cache.with_name("executed")
    for entry in entries:
        _plant(entry, trap)
    outcome = setup.run()
    for entry, content in zip(entries, ours, strict=True):
        entry.write_bytes(content)
    assert not trap.exists()
    assert outcome.is_right()
    assert outcome.loaded == 0
    assert outcome.compiled >= 1
    assert outcome.log.count("\n") == 1, outcome.log
    assert "compiled kernels are not cached" in outcome.log
    assert reason in outcome.log


def test_a_symbolic_link_is_refused(spoilable: Setup, tmp_path: Path) -> None:
    """Someone else's directory under our name: a pickle in it would be their code in our process."""
    entries = spoilable.entries()
    for ours in (spoilable.generation, spoilable.cache / "kernels"):
        theirs = ours.rename(tmp_path / f"theirs-{ours.name}")
        ours.symlink_to(theirs)
        _refused(spoilable, "is a symbolic link or no directory", entries)
        ours.unlink()
        theirs.rename(ours)
    assert spoilable.run().compiled == 0


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_directories_that_others_can_write_are_refused(spoilable: Setup, mode: int) -> None:
    for directory in (spoilable.generation, spoilable.cache / "kernels"):
        directory.chmod(mode)
        _refused(spoilable, "can be written by others", spoilable.entries())
        directory.chmod(0o700)
    assert spoilable.run().compiled == 0


def test_a_parent_in_which_others_can_swap_directories_is_refused(spoilable: Setup) -> None:
    spoilable.cache.chmod(0o777)
    _refused(spoilable, "can be written by others", spoilable.entries())
    spoilable.cache.chmod(0o1777)  # sticky, like /tmp: only the owner renames
    assert spoilable.run().compiled == 0


def test_foreign_owners_are_refused(spoilable: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(os, "getuid") and os.getuid() == 0:  # only root can give directories away
        os.chown(spoilable.generation, 12345, -1)
        _refused(spoilable, "belongs to user 12345, not to 0", spoilable.entries())
    for check in (paths.require_private, paths.require_steady):
        check(tmp_path)
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1, raising=False)
    with pytest.raises(PermissionError, match="belongs to user"):
        paths.require_private(tmp_path)


def test_a_file_in_place_of_the_directory(empty: Setup) -> None:
    empty.cache.mkdir(mode=0o700)
    (empty.cache / "kernels").write_text("")
    _refused(empty, "kernels")
    empty.cache = empty.cache / "kernels" / "below"
    _refused(empty, "kernels")


def test_a_read_only_cache_is_read_and_a_missing_entry_is_no_error(spoilable: Setup) -> None:
    directories = (spoilable.generation, spoilable.cache / "kernels", spoilable.cache)
    for directory in directories:
        directory.chmod(0o500)
    try:
        assert spoilable.run().compiled == 0
        directories[0].chmod(0o700)
        spoilable.entries()[0].unlink()
        directories[0].chmod(0o500)
        assert spoilable.run().is_right()
    finally:
        for directory in directories:
            directory.chmod(0o700)


def test_planted_code_would_be_executed_in_a_directory_of_ours(spoilable: Setup, tmp_path: Path) -> None:
    """So that the tests above can fail; and what comes out of such a pickle is no machine code, and is not used."""
    trap = tmp_path / "executed"
    for entry in spoilable.entries():
        _plant(entry, trap)
    outcome = spoilable.run()
    assert outcome.is_right()
    assert trap.exists()
    assert outcome.compiled == len(spoilable.entries())


FULL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))\n"


def test_a_full_disk(empty: Setup) -> None:
    """No file can have more than 2000 bytes: half an entry is never left, and the next process makes it good."""
    if sys.platform == "win32":
        return
    another = "import numpy, ruvllm.kernels\nruvllm.kernels.dot(numpy.ones(3, 'f'), numpy.ones(3, 'f'))\n"
    outcome = empty.run(FULL_DISK + another + PROGRAM)
    assert outcome.is_right()
    assert outcome.log.count("could not write to the compile cache") == 1 < outcome.compiled
    assert list(empty.generation.iterdir()) == []
    assert empty.run(another + PROGRAM).compiled == outcome.compiled
    assert empty.run().compiled == 0


def test_without_a_home(filled: Setup) -> None:
    """A user of a container may have none: kernels are compiled, and one line says that they will be again."""
    nowhere = (
        "import pathlib\n"
        "def no_home(*_): raise RuntimeError('Could not determine home directory.')\n"
        "pathlib.Path.home = no_home\n"
    )
    outcome = filled.run(nowhere + PROGRAM, {"RUVLLM_CACHE": "", "XDG_CACHE_HOME": "", "LOCALAPPDATA": ""})
    assert outcome.is_right()
    assert outcome.loaded == 0
    assert outcome.log.count("\n") == 1
    assert "compiled kernels are not cached" in outcome.log and "RUVLLM_CACHE" in outcome.log


def test_several_processes_at_once(empty: Setup) -> None:
    for outcome in [finish(process) for process in [empty.start() for _ in range(3)]]:
        assert outcome.is_right()
        assert outcome.log == ""
    assert {path.suffix for path in empty.generation.iterdir()} == {".nbc"}
    assert empty.run().compiled == 0


def test_old_generations_are_dropped(spoilable: Setup) -> None:
    current = spoilable.generation
    for age in range(1, 40):
        old = spoilable.cache / "kernels" / f"old{age}"
        old.mkdir(mode=0o700)
        (old / "entry.nbc").write_bytes(b"")
        os.utime(old, (1e9 - age, 1e9 - age))
    assert spoilable.run().compiled == 0
    kept = {path.name for path in (spoilable.cache / "kernels").iterdir()}
    assert kept == {current.name} | {f"old{age}" for age in range(1, compile_cache._KEPT_GENERATIONS + 1)}


def test_a_closure_is_not_cached() -> None:
    """What it holds is in no source file, so two of them could not be told apart."""

    def scaled_by(factor: float) -> Any:
        @kernel
        def scaled(x: Any) -> Any:
            return x * factor

        return scaled

    double, triple = scaled_by(2.0), scaled_by(3.0)
    assert (double(1.0), triple(1.0)) == (2.0, 3.0)
    assert not sum(double.stats.cache_hits.values())
    assert not sum(triple.stats.cache_hits.values())


TYPED = """
import numpy as np
from ruvllm.kernels.jit.decorators import kernel
@kernel
def double(x, lo, hi):
    for i in range(lo, hi):
        x[i] *= 2
ones = np.ones(3)
double(ones, 0, 2)
assert ones.tolist() == [2, 2, 1]
"""


def test_a_kernel_that_is_in_no_file_is_not_cached(spoilable: Setup) -> None:
    before = spoilable.entries()
    for _ in range(2):
        outcome = spoilable.run(TYPED + PROGRAM)
        assert outcome.is_right()
        assert outcome.compiled == 1
        assert outcome.log == ""
    assert spoilable.entries() == before


SPLIT = """
import json, sys
import numpy as np
from ruvllm.kernels.jit.decorators import COMPILED
from split_cases import add_one, over_rows
x = np.zeros(10)
over_rows(add_one)(2, 10, x)
stats = [f.stats for f in COMPILED]
print(json.dumps({"loaded": sum(sum(s.cache_hits.values()) for s in stats),
                  "compiled": sum(sum(s.cache_misses.values()) for s in stats), "y": x.tolist()}))
"""
SPLIT_BODY = """
from ruvllm.kernels.jit.decorators import kernel
from ruvllm.kernels.threads.over_rows import over_rows
@kernel(independent=True)
def add_one(x, lo, hi):
    x = x[lo:hi]
    for i in range(x.size):
        x[i] += 1
"""


def test_the_parallel_kernel_of_an_edited_body_is_compiled_anew(editable: Setup) -> None:
    path = editable.source.parent / "split_cases.py"
    path.write_text(SPLIT_BODY)
    assert editable.run(SPLIT).y == [1] * 10
    again = editable.run(SPLIT)
    assert (again.y, again.compiled) == ([1] * 10, 0)
    path.write_text(SPLIT_BODY.replace("+= 1", "+= 2"))
    assert editable.run(SPLIT).y == [2] * 10


def test_functions_that_differ_in_what_they_enclose_are_kept_apart(tmp_path: Path) -> None:
    """Compiled in processes of their own, they meet in one through the cache, in either order."""
    for values in (["3"], ["5"], ["3", "5"], ["5", "3"]):
        assert python("-m", "tests.kernels.closure_cases", *values, RUVLLM_CACHE=str(tmp_path)).split() == values
