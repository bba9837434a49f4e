"""Compiling beforehand: what warm-up and a first load run, for every kind of file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ruvllm import compiling
from ruvllm.checkpoint.storage import BLOCKS
from ruvllm.compiling import operations_for
from ruvllm.kernels import KERNELS
from ruvllm.kernels.jit.cache import kernel_cache_directory
from ruvllm.model.weights import LAYOUTS, layout_for
from tests.model.architectures import config_of

PLAIN = [("F32", layout) for layout in LAYOUTS]
BY_FILE = [(dtype, layout_for("auto", dtype)) for dtype in BLOCKS]


def test_warm_up_asks_for_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(compiling, "compile_for", lambda kinds, progress: asked.extend(kinds))
    monkeypatch.setattr(compiling, "compile_cache", lambda layouts, kv, progress: asked.append((*layouts, kv)))
    monkeypatch.setattr(compiling, "compile_training", lambda layouts, progress: asked.extend(layouts))
    monkeypatch.setattr(compiling, "_run_kernel", lambda spec: asked.append(spec.name))
    compiling.warmup(progress=False)
    caches = {(layout, kv) for layout in (*LAYOUTS, "int5") for kv in ("f16", "int8")}
    assert set(asked) >= {*PLAIN, *BY_FILE, *caches, *LAYOUTS, *KERNELS}


def test_another_kind_of_cache_is_compiled_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def needed(layouts: set[str], kv: str) -> list[Any]:
        asked.append((sorted(layouts), kv))
        return [SimpleNamespace(address=0)]

    monkeypatch.setattr(compiling, "operations_for", needed)
    monkeypatch.setattr(compiling, "is_warm", lambda what: False)
    monkeypatch.setattr(compiling, "mark_warm", asked.append)
    for kv in ("f32", "f16", "int8", "f64", "auto"):  # 16 bits are compiled with the model; the cache refuses "f64"
        compiling.compile_cache(["int4", "int8", "int4"], kv, progress=False)
    assert asked == [
        (["int4", "int8"], "f32"), "f32 cache, ['int4', 'int8']", (["int4", "int8"], "int8"),
        "int8 cache, ['int4', 'int8']",
    ]  # fmt: skip
    compiling.compile_cache(["f32"], "f32", progress=False)
    assert len(asked) == 4
    compiling.compile_cache(["f32"], "f16", progress=False)
    assert asked[4:] == [(["f32"], "f16"), "f16 cache, ['f32']"]


def test_every_process_compiles_every_operation_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own share first; then those of the others, of which it finds most in the cache."""
    needed = operations_for({"int4", "f32"}, "int8")
    names = [operation.__name__ for operation in needed]
    assert len(set(needed)) == len(needed)
    assert sorted(names) == sorted([
        "_replay", "add", "append_rows", "attend_rows", "broadcast", "floats", "integers", "last_rows", "merge",
        "quantize", "rms_norm", "rope", "silu_mul", "token",
    ])  # fmt: skip
    compiled: list[str] = []

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name

        @property
        def address(self) -> None:
            compiled.append(self.name)

    monkeypatch.setattr(compiling, "operations_for", lambda layouts, kv: [Fake(name) for name in names])
    for processes in (1, 2, 3):
        for first in range(processes):
            compiled.clear()
            compiling._compile_share([("Q4_0", "int4")], first, processes)
            assert sorted(compiled) == sorted(names)
            assert compiled[0] == names[first]


@pytest.mark.parametrize(("dtype", "layout"), sorted(set(PLAIN + BY_FILE)))
def test_a_tiny_model_of_every_kind_loads_and_speaks(dtype: str, layout: str) -> None:
    compiling._run_tiny_model([(dtype, layout)])


@pytest.mark.parametrize("program", ["/bin/false", "/nowhere/python", ""])
def test_compiling_goes_on_without_other_processes(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr(sys, "executable", program)
    with compiling._helpers([("Q8_0", "int8")]):
        pass


def test_other_processes_fill_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """During a first load they compile operations, pack weights and sample, and are gone afterwards.

    Of a cache that this process has filled, they are given all but a few functions.
    """
    compiling._run_tiny_model([("Q8_0", "int8")])
    filled = kernel_cache_directory()
    assert filled is not None
    missing = {"_replay", "argmax_index", "select_largest", "log_softmax_rows"}
    ignored = [f"{name}-*" for name in missing]
    shutil.copytree(filled, tmp_path / "kernels" / filled.name, ignore=shutil.ignore_patterns("*.tmp", *ignored))
    seen = []

    class Seen(subprocess.Popen):
        def __init__(self, arguments: list[str], **options: Any) -> None:
            super().__init__(arguments, **options, env=os.environ | {"RUVLLM_CACHE": str(tmp_path)})
            seen.append(self)

    monkeypatch.setattr(subprocess, "Popen", Seen)
    with compiling._helpers([("Q8_0", "int8")]):
        assert seen[0].wait(120) == 0
    names = {path.name.rpartition("-")[0] for path in tmp_path.rglob("*.nbc")}
    assert missing <= names
    with compiling._helpers([("Q8_0", "int8")]):
        assert seen[1].poll() is None
    assert seen[1].poll() is not None


@pytest.mark.parametrize("name", ["mixture", "shared"])
@pytest.mark.parametrize("layouts", [("f32", "int4"), ("bf16", "f32", "int4", "int5", "int8")])
def test_the_operations_of_experts_are_those_of_every_layout(name: str, layouts: tuple[str, ...]) -> None:
    """Which matrices of a file have which layout is not known: experts may have any of them."""
    config = config_of(name)
    needed = set(operations_for(layouts, "f32", config))
    for layout in layouts:
        assert set(operations_for([layout], "f32", config)) <= needed
