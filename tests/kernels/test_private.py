"""Private parts of numba: each is tested when it is first used, and the library is right without it."""

from __future__ import annotations

import json
import logging
import operator
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from llvmlite import ir
from numba.core import codegen, dispatcher, event
from numba.core.options import TargetOptions
from numba.core.runtime.nrt import rtsys
from numba.core.typing.context import BaseContext
from numba.extending import overload

from ruvllm.kernels.jit.decorators import DISABLE_JIT, inline_kernel, kernel
from ruvllm.kernels.jit.private import cross, dispatch, front_end, libraries, target, threads
from ruvllm.kernels.jit.private.parts import PARTS
from tests.processes import python

pytestmark = pytest.mark.skipif(DISABLE_JIT, reason="nothing is compiled")

ROOT = Path(__file__).parents[2]


def _run(tmp_path: Path, without: str, *what: str, own_cache: bool = True) -> tuple[dict[str, Any], str]:
    """What private_cases prints, and its log."""
    settings = {"RUVLLM_WITHOUT": without} | ({"RUVLLM_CACHE": str(tmp_path)} if own_cache else {})
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.private_cases", *what], env=os.environ | settings, cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found, done.stderr


def test_all_parts_are_used_with_this_numba(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert [name for name, usable in PARTS.items() if not usable()] == []
    assert not caplog.records


@pytest.mark.parametrize("name", ["cross", "events", "front_end", "missing_code", "runtime", "target", "thread_count"])
def test_kernels_and_models_are_right_without(name: str, tmp_path: Path) -> None:
    """These change no machine code, so that all share a cache, from which a second process takes everything."""
    first, log = _run(tmp_path, name, "model", own_cache=False)
    assert first["usable"] == sorted(set(PARTS) - {name})
    second, _ = _run(tmp_path, name, "model", own_cache=False)
    assert second["compiled"] == 0 < second["loaded"]
    assert log == ""


@pytest.mark.parametrize("name", ["counting", "libraries", "loops"])
def test_other_machine_code_is_right_and_kept(name: str, tmp_path: Path) -> None:
    first, _ = _run(tmp_path, name)
    assert first["usable"] == sorted(set(PARTS) - {name})
    assert first["loaded"] == 0 < first["compiled"]
    second, log = _run(tmp_path, name)
    assert second["compiled"] == 0 < second["loaded"]
    assert log == ""


@pytest.mark.parametrize("name", ["all", "cache"])
def test_without_a_cache_nothing_is_kept(name: str, tmp_path: Path) -> None:
    found, _ = _run(tmp_path, name)
    assert found["usable"] == ([] if name == "all" else sorted(set(PARTS) - {name}))
    assert found["loaded"] == 0 < found["compiled"]
    assert not list(tmp_path.rglob("*.nbc"))


# What another version of numba might do: each is to be seen by the part's test.
CHANGES: list[tuple[str, Any, str, Any]] = [
    ("cache", dispatcher.Dispatcher, "compile", lambda self, sig: None),
    ("counting", TargetOptions, "parse_as_flags", lambda self, flags, options: None),
    ("cross", type(rtsys), "library", None),
    ("events", event, "end_event", lambda *_, **__: None),
    ("front_end", BaseContext, "resolve_function_type", lambda self, function, two, keywords: numba.float64(*two)),
    ("libraries", libraries, "_changed_target", lambda target, compiler: target),
    ("loops", ir.Instruction, "set_metadata", lambda self, name, node: None),
    ("missing_code", dispatch, "_answer", lambda dispatcher, answer: None),
    ("runtime", rtsys, "initialize", lambda: None),
    ("target", codegen.JITCPUCodegen, "magic_tuple", lambda self: ("x86_64-linux", "generic")),
    ("thread_count", threads, "_without_locks", lambda: lambda: 99),
    ("width", ir.values.FunctionAttributes, "_to_list", lambda self, return_type: []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "owner", "attribute", "instead"), CHANGES, ids=[change[0] for change in CHANGES])
def test_a_part_that_changed_is_not_used(
    name: str, owner: Any, attribute: str, instead: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    usable: Any = PARTS[name]
    assert usable()
    if instead is None:
        monkeypatch.delattr(owner, attribute)
    else:
        monkeypatch.setattr(owner, attribute, instead)
    assert not usable.__wrapped__()
    (record,) = caplog.records
    assert f"numba {numba.__version__} differs from those tested in its {name} (" in record.getMessage()


def test_every_part_is_changed_once() -> None:
    assert sorted(name for name, *_ in CHANGES) == sorted(PARTS)


def test_the_documented_target_is_the_one_that_numba_takes() -> None:
    assert target._documented_target() == target.target()


DOUBLED = """
from numba import float32, void
from ruvllm.kernels.jit.decorators import kernel

@kernel(independent=True)
def doubled(x, out):
    for i in range(x.size):
        out[i] = x[i] + x[i]

doubled.compile(void(float32[::1], float32[::1]))
print(*doubled.inspect_asm().values())
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x86 has AVX-512")
def test_loops_take_whole_registers() -> None:
    """Compiled, not run, for a processor for which LLVM prefers half of each."""
    features = "+avx2,+fma,+f16c,+avx512f,+avx512vl,+avx512bw,+avx512dq"
    assembly = python("-c", DOUBLED, NUMBA_CPU_NAME="icelake-server", NUMBA_CPU_FEATURES=features)
    assert any("vaddps" in line and "%zmm" in line for line in assembly.splitlines())


def _compiled(function: Any, dtype: Any) -> Any:
    """``out[i] = function(x[i])``, compiled as kernels are, without a cache."""

    @numba.njit(pipeline_class=libraries.Serial)
    def each(x: Any, out: Any) -> None:
        for i in range(out.size):
            out[i] = function(x[i])

    each.compile(numba.void(dtype[::1], dtype[::1]))
    return each


def test_a_call_is_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In all functions: one that calls nothing new resolves nothing."""
    resolved: list[Any] = []
    resolve = front_end._resolve

    def counted(function: Any, context: Any, arguments: Any, keywords: Any) -> Any:
        resolved.append((function, arguments))
        return resolve(function, context, arguments, keywords)

    monkeypatch.setattr(front_end, "_resolve", counted)
    monkeypatch.setattr(front_end, "_resolved", {})
    for _ in range(2):
        x, out = np.arange(3, dtype=np.int16), np.empty(3, np.int16)
        _compiled(operator.neg, numba.int16)(x, out)
        assert out.tolist() == [0, -1, -2]
        assert {function.typing_key for function, _ in resolved} >= {range, operator.neg, operator.getitem}
        assert len(resolved) == len(set(resolved))
    resolved.clear()
    numba.njit(lambda x: -x)(np.int16(7))
    assert resolved == []  # only kernels are compiled so


def test_overloads_that_are_added_later_are_found() -> None:
    def negate(x: Any) -> Any:
        """It has overloads below."""

    with pytest.raises(numba.TypingError):
        _compiled(negate, numba.int64)
    overload(negate)(lambda x: (lambda x: -x) if isinstance(x, numba.types.Integer) else None)
    x, out = np.arange(3), np.empty(3, np.int64)
    _compiled(negate, numba.int64)(x, out)
    assert out.tolist() == [0, -1, -2]
    with pytest.raises(numba.TypingError):
        _compiled(negate, numba.float64)
    overload(negate)(lambda x: (lambda x: 10 - x) if isinstance(x, numba.types.Float) else None)
    for _ in range(2):
        halves, real = x / 2, np.empty(3)
        _compiled(negate, numba.float64)(halves, real)
        assert real.tolist() == [10, 9.5, 9]
    _compiled(negate, numba.int64)(x, out)
    assert out.tolist() == [0, -1, -2]


def test_kernels_may_have_inner_functions() -> None:
    @kernel
    def doubled(x: Any, out: Any) -> None:
        def twice(i: Any) -> Any:
            return 2 * x[i]

        for i in range(out.size):
            out[i] = twice(i)

    x, out = np.arange(3), np.empty(3, np.int64)
    doubled(x, out)
    assert out.tolist() == [0, 2, 4]


def test_references_are_not_counted() -> None:
    @inline_kernel
    def first(x: Any) -> Any:
        return x[0]

    @kernel(strict=True)
    def twice(x: Any, out: Any) -> None:
        for i in range(out.size):
            out[i] = first(x[i:]) + first(x[i:])

    twice.compile(numba.void(numba.float32[::1], numba.float32[::1]))
    (code,) = twice.inspect_llvm().values()
    assert "NRT_incref" not in code


def test_explain_says_why_it_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross, "can_retarget", lambda: False)
    with pytest.raises(RuntimeError, match="this version of numba cannot compile for another processor"):
        cross.retarget(target.target(), cross.to_assembly)
