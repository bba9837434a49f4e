"""Threads, processes and signals: whatever goes on around a model, it says what it says alone, and nothing hangs.

Each situation of process_cases.py runs in a process of its own, under a watchdog that is no matter of speed.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.process_cases import SITUATIONS
from tests.processes import python


def _has_tbb() -> bool:
    """pip install tbb brings it; its library must also be found (LD_LIBRARY_PATH)."""
    try:
        importlib.import_module("numba.np.ufunc.tbbpool")
    except ImportError:
        return False
    return True


LAYERS = ["omp", "workqueue", *(["tbb"] if _has_tbb() else [])]


def _run(situation: str, directory: Path, **environment: str) -> str:
    program = "-m", "tests.process_cases", situation, directory
    said = python(*program, NUMBA_NUM_THREADS="2", **environment)
    assert said.startswith("as ever, under ")
    return said


BY_LAYER = ("many_threads", "forked")


@pytest.mark.parametrize("situation", [name for name in SITUATIONS if name not in BY_LAYER])
def test_a_model_says_the_same(situation: str, tmp_path: Path) -> None:
    _run(situation, tmp_path)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("situation", BY_LAYER)
def test_under_every_threading_layer(situation: str, layer: str, tmp_path: Path) -> None:
    assert f"under {layer}," in _run(situation, tmp_path, NUMBA_THREADING_LAYER=layer)


LOADED_AND_FORKED = """
import os, sys
from pathlib import Path
from tests.llm_cases import byte_llm
llm = byte_llm(Path(sys.argv[1]))  # has computed nothing yet, but loading has started the threads
if not hasattr(os, "fork"):
    sys.exit(0)
child = os.fork()
if child == 0:
    try:
        llm.generate("hello", max_tokens=2)
    except RuntimeError as error:
        os._exit(7 if "'spawn'" in str(error) else 1)
    os._exit(2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""


@pytest.mark.parametrize("layer", LAYERS)
def test_a_child_forked_after_loading_says_so(layer: str, tmp_path: Path) -> None:
    environment = {"NUMBA_NUM_THREADS": "2", "NUMBA_THREADING_LAYER": layer}
    python("-c", LOADED_AND_FORKED, tmp_path, **environment)
