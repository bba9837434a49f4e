"""Compiling beforehand: what warm-up and a first load run, for every kind of file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ruvllm import compile_steps, compiling
from ruvllm.checkpoint.storage import BLOCKS
from ruvllm.compile_steps import run_steps
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
    monkeypatch.setattr(compiling, "compile_many", lambda kv, progress: asked.append(("many", kv)))
    monkeypatch.setattr(compiling, "compile_training", lambda layouts, progress: asked.extend(layouts))
    monkeypatch.setattr(compiling, "_run_kernel", lambda spec: asked.append(spec.name))
    compiling.warmup(progress=False)
    caches = {(layout, kv) for layout in (*LAYOUTS, "int5") for kv in ("f16", "int8")}
    many = {("many", kv) for kv in ("f32", "f16", "int8")}
    assert set(asked) >= {*PLAIN, *BY_FILE, *caches, *many, *LAYOUTS, *KERNELS}


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


def test_steps_compile_every_operation_of_a_model_and_what_runs_besides() -> None:
    names = [operation.__name__ for operation in operations_for({"int4", "f32"}, "int8")]
    assert sorted(names) == sorted([
        "_replay", "add", "append_rows", "attend_rows", "broadcast", "floats", "integers", "last_rows", "merge",
        "quantize", "rms_norm", "rope", "silu_mul", "token",
    ])  # fmt: skip
    steps: list[Any] = compiling._compile_steps([("Q4_0", "int4"), ("F32", "f32")])
    operations = [step.args[0] for step in steps if getattr(step, "args", ())[1:] == ("address",)]
    assert set(operations) == set(operations_for({"int4", "f32"}, "f16"))
    assert len(steps) == len(operations) + 2
    names = [operation.__name__ for operation in operations]
    assert (names[0], *names[-2:]) == ("integers", "token", "attend_rows")  # slow ones at both ends, attention together


@pytest.mark.parametrize(("dtype", "layout"), sorted(set(PLAIN + BY_FILE)))
def test_a_tiny_model_of_every_kind_loads_and_speaks(dtype: str, layout: str) -> None:
    compiling._run_tiny_model([(dtype, layout)])


def numbered(directory: Path, count: int = 7) -> tuple[list[Any], str]:
    """Steps that each leave a file, named by the step and by the process; and the code that defines the same."""
    lines = (
        "import os, pathlib, functools",
        f"note = lambda i: pathlib.Path({str(directory)!r}, f'{{i}}-{{os.getpid()}}').touch()",
        f"steps = [functools.partial(note, i) for i in range({count})]",
    )
    defined: dict[str, Any] = {}
    exec("\n".join(lines), defined)
    return defined["steps"], "\n".join(lines)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_step_is_begun_by_one_process_and_run_here_at_last(tmp_path: Path, processes: int) -> None:
    steps, same = numbered(tmp_path)

    def slow() -> None:  # until another process has run a step
        while processes > 1 and all(path.name.endswith(f"-{os.getpid()}") for path in tmp_path.iterdir()):
            time.sleep(0.01)

    run_steps([slow, *steps[1:]], processes, same)
    done = [path.name.split("-") for path in tmp_path.iterdir()]
    here = {step for step, process in done if process == str(os.getpid())}
    assert here == {str(i) for i in range(1, 7)}
    elsewhere = [step for step, process in done if process != str(os.getpid())]
    assert len(elsewhere) == len(set(elsewhere)) and bool(elsewhere) == (processes > 1)
    assert processes != 2 or "6" in elsewhere  # from the end of the list


@pytest.mark.parametrize("program", ["/bin/false", "/nowhere/python", ""])
def test_steps_run_here_without_other_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str
) -> None:
    monkeypatch.setattr(sys, "executable", program)
    steps, same = numbered(tmp_path)
    run_steps(steps, 2, same)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i}-{os.getpid()}" for i in range(7)]


def test_a_step_that_fails_elsewhere_runs_here_and_one_that_fails_here_ends_the_others(tmp_path: Path) -> None:
    steps, same = numbered(tmp_path)
    run_steps(steps, 3, same + "\nsteps = [exit] * 7")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i}-{os.getpid()}" for i in range(7)]
    with pytest.raises(ZeroDivisionError):
        run_steps([lambda: 1 // 0] * 7, 2, "import time\nsteps = [lambda: time.sleep(1000)] * 7")


def test_other_processes_fill_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """During a first load they compile operations, pack weights and sample.

    Of a cache that this process has filled, they are given all but a few functions.
    """
    compiling._run_tiny_model([("Q8_0", "int8")])
    filled = kernel_cache_directory()
    assert filled is not None
    missing = {"_replay", "argmax_index", "select_largest", "log_softmax_rows"}
    ignored = [f"{name}-*" for name in missing]
    shutil.copytree(filled, tmp_path / "kernels" / filled.name, ignore=shutil.ignore_patterns("*.tmp", *ignored))
    started = []

    class Seen(subprocess.Popen):
        def __init__(self, arguments: list[str], **options: Any) -> None:
            super().__init__(arguments, **options, env=os.environ | {"RUVLLM_CACHE": str(tmp_path)})
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Seen)
    monkeypatch.setattr(compiling, "is_warm", lambda kind: False)
    monkeypatch.setattr(compiling, "mark_warm", lambda kind: None)
    monkeypatch.setattr(compiling, "num_threads", lambda: 2)
    monkeypatch.setattr(compile_steps, "deque", lambda steps: SlowDeque(steps))
    compiling.compile_for([("Q8_0", "int8")], False)
    names = {path.name.rpartition("-")[0] for path in tmp_path.rglob("*.nbc")}
    assert missing <= names
    assert [process.poll() is None for process in started] == [False]


class SlowDeque(deque[int]):
    """Gives a step to this process only when the others have taken all."""

    def popleft(self) -> int:
        while threading.current_thread() is threading.main_thread() and self:
            time.sleep(0.01)
        return super().popleft()


@pytest.mark.parametrize("name", ["mixture", "shared"])
@pytest.mark.parametrize("layouts", [("f32", "int4"), ("bf16", "f32", "int4", "int5", "int8")])
def test_the_operations_of_experts_are_those_of_every_layout(name: str, layouts: tuple[str, ...]) -> None:
    """Which matrices of a file have which layout is not known: experts may have any of them."""
    config = config_of(name)
    needed = set(operations_for(layouts, "f32", config))
    for layout in layouts:
        assert set(operations_for([layout], "f32", config)) <= needed
