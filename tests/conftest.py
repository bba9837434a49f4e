"""Fixtures shared by the whole suite."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from ruvllm.llm import LLM

# The first example of a property may compile a kernel, so there is no deadline; and a failed run must be
# reproducible elsewhere, so the examples are always the same.
settings.register_profile(
    "ruvllm", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ruvllm"))

os.environ.setdefault("RUVLLM_PACKED_CACHE", "0")  # of the user's cache; tests of it have one of their own

# Workers share the cores: idle threads that spin, as OpenMP's do, would take them from each other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

os.environ.setdefault("MPLBACKEND", "Agg")  # plots are drawn, and not shown

# Hundreds of tests start a process of their own, in which every module would be compiled to bytecode again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

gc.set_threshold(100_000, 50, 100)  # compiling makes millions of objects: collecting takes a tenth of it

# The first files compile most kernels and models, each in one process, or use caches of their own meanwhile; notebooks,
# processes of their own, then find nearly everything compiled. All take long: at the end a worker would wait for them.
_FIRST = (
    "test_specs.py", "test_private.py", "test_compiling.py", "test_quant.py", "test_guarded.py", "test_bits.py",
    "test_codegen.py", "test_notebooks.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order is pytest's, after the first files."""
    items.sort(key=lambda item: _FIRST.index(item.path.name) if item.path.name in _FIRST else len(_FIRST))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, fetched into the user's cache the first time that a test asks for it."""
    from ruvllm.checkpoint.hub import pull

    return pull("smollm2-135m")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A tiny model with a vocabulary of bytes, on one thread."""
    from tests.llm_cases import byte_llm

    return byte_llm(tmp_path_factory.mktemp("bytes"), threads=1)
