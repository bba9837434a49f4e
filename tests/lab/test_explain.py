"""explain: what it reads out of assembly, for library kernels and for a user's own functions."""

import math
import re
from typing import Any

import numba
import numpy as np
import pytest

from ruvllm.cli import main, parser
from ruvllm.kernels import KERNELS
from ruvllm.kernels.jit.decorators import COMPILED
from ruvllm.lab import TARGETS, explain
from ruvllm.lab.assembly import called, innermost_loops
from ruvllm.lab.calls import calls_of_kernel
from ruvllm.lab.explanation import _calls, _explain
from tests.processes import python

X86 = """
\t.file\t1 "/somewhere" "mine.py"
first:
# %bb.0:
\tmovabsq\t$expf, %r14
\tvmovups\t%ymm1, 32(%rsp)                # 32-byte Spill
.LBB0_3:                                # %tail
                                        #   in Loop: Header=BB0_1 Depth=1
\t.loc\t1 12 5
\tvfmadd231ps\t64(%rax), %zmm1, %zmm2
\tvmovups\t%zmm3, 96(%rsp)                # 64-byte Spill
\tjmp\t.LBB0_1
.LBB0_1:                                # %B10
                                        # =>This Inner Loop Header: Depth=1
\t.loc\t1 12 9
\tvmovups\t(%rax), %zmm1
\tvpdpbusd\t(%rcx){1to16}, %zmm1, %zmm2
\tvmulss\t%xmm0, %xmm1, %xmm2
\tcallq\t*%r14
\tprefetcht0\t512(%rcx)
\tjne\t.LBB0_3
# %bb.2:
\tvzeroupper
\tcallq\tmemset
\tretq
.LBB0_4:                                # =>This Loop Header: Depth=1
                                        #     Child Loop BB0_5 Depth 2
\tvaddps\t%zmm1, %zmm2, %zmm3
.LBB0_5:                                #   Parent Loop BB0_4 Depth=1
                                        # =>  This Inner Loop Header: Depth=2
\tvaddps\t%ymm1, %ymm2, %ymm3
\tvmovups\t%ymm3, (%rax,%rcx,4)
\tjne\t.LBB0_5
"""
ARM = """
_first:
LBB0_1:                                 ; =>This Inner Loop Header: Depth=1
\tldp\tq0, q1, [x8]
\tld1r.4s\t{ v2 }, [x9]
\tfmla.4s\tv3, v0, v2
\tsdot.4s\tv4, v0, v1
\tstr\tq3, [x10]
\tfmadd\ts0, s1, s2, s3
\tadrp\tx8, _sinf@GOTPAGE
\tldr\tx8, [x8, _sinf@GOTPAGEOFF]
\tblr\tx8
\tb.ne\tLBB0_1
"""


def test_x86_loops() -> None:
    """A block of a loop may stand before its header; an outer loop is none of ours."""
    first, second = innermost_loops(X86)
    assert (first.width, first.fma, first.dot, first.loads, first.stores) == (512, 1, 1, 3, 0)
    assert (first.scalar_math, first.spills, first.calls) == (1, 1, ("expf",))
    assert (first.bytes_read, first.bytes_written) == (64 + 64 + 4, 0)
    assert (first.elements, first.element) == (16 + 64, "multiply-add")
    assert first.file == "/somewhere/mine.py" and first.line == 12 and first.function == "first"
    assert (second.width, second.stores, second.elements, second.element) == (256, 1, 8, "store")
    assert second.lines_per_element == 32 / 64 / 8
    assert called(X86) == {"expf": 1, "memset": 1}


def test_a_register_that_the_listing_used_in_between_holds_the_one_function_it_ever_held() -> None:
    reloaded = X86.replace("\t.loc\t1 12 5", "\tmovq\t48(%rsp), %r14                # 8-byte Reload")
    assert called(reloaded) == {"expf": 1, "memset": 1}
    two = reloaded.replace("# %bb.2:", "\tmovabsq\t$logf, %r14\n# %bb.2:")
    assert called(two) == {"r14": 1, "memset": 1}


def test_arm_loops() -> None:
    """macOS's syntax, and Linux's, where the arrangement stands with the registers."""
    linux = ARM.replace("fmla.4s\tv3, v0, v2", "fmla\tv3.4s, v0.4s, v2.4s").replace("sdot.4s\tv4", "sdot\tv4.4s")
    linux = linux.replace("ld1r.4s\t{ v2 }", "ld1r\t{ v2.4s }")
    linux = re.sub(r"\tadrp.*\n\tldr\tx8.*\n", "\tmovz\tx8, #:abs_g0_nc:sinf\n", linux).replace("; ", "// ")
    for text in (ARM, linux):
        (loop,) = innermost_loops(text)
        assert (loop.width, loop.fma, loop.dot, loop.loads, loop.stores) == (128, 1, 1, 2, 1)
        assert (loop.scalar_math, loop.calls) == (1, ("sinf",))
        assert (loop.bytes_read, loop.bytes_written) == (32 + 4, 16)


@numba.njit(fastmath=True)
def doubled(x, out):
    for i in range(x.size):
        out[i] = x[i] * np.float32(2) + np.float32(1)


@numba.njit
def exponentials(x, out):
    for i in range(x.size):
        out[i] = math.exp(x[i])


@numba.njit
def recurrence(x, out):
    s = np.float32(0)
    for i in range(x.size):
        s = s * np.float32(0.5) + x[i]
        out[i] = s


def test_a_users_function_that_vectorises() -> None:
    x = np.ones(64, np.float32)
    found = explain(doubled, x, x, target="haswell")
    assert found.vectorized and found.width == 256 and not found.remarks
    main = max(found.loops, key=lambda loop: loop.elements)
    assert main.fma and main.element == "store" and main.lines_per_element == 2 * 4 / 64
    assert "out[i] = x[i]" in found.annotated() and "vfmadd" in found.annotated()
    assert found.heading() == "doubled for haswell: vectorised, 256 bits"


def test_a_users_function_that_calls_a_scalar_function() -> None:
    x = np.ones(64, np.float32)
    for target in ("haswell", "apple-m4"):
        found = explain(exponentials, x, x, target=target)
        assert not found.vectorized and found.scalar_calls == ("expf",)
        assert "calls in loops: expf" in str(found)


def test_why_a_loop_stayed_scalar_is_told() -> None:
    x = np.ones(64, np.float32)
    found = explain(recurrence, x, x, target="haswell")
    assert not found.vectorized and found.scalar_loops and found.width == 0
    assert "not vectorised: value that could not be identified as reduction" in str(found)
    assert found.remarks[0].text in found._repr_html_().replace("&#x27;", "'")


def test_this_machines_code_is_what_numba_runs() -> None:
    """The counts are those of the code that this process has compiled."""
    program = """
from collections import Counter
from numba.core.caching import NullCache
from numba.core.registry import cpu_target
from ruvllm.kernels.jit.decorators import COMPILED
from ruvllm.lab import explain
from ruvllm.lab.assembly import innermost_loops
from ruvllm.lab.calls import calls_of_kernel
from ruvllm.kernels import KERNELS

def counts(loops):
    return Counter((x.width, x.fma, x.dot, x.loads, x.stores, x.spills) for x in loops)

calls = calls_of_kernel(KERNELS["softmax"])
told = counts(explain("softmax").loops)
cpu_target.target_context.codegen()._tm.set_asm_verbosity(True)
real = Counter()
for function in COMPILED:
    function._cache = NullCache()
    function.overloads.clear()
for body, signature in calls:
    body.compile(signature)
    real += counts(innermost_loops(body.overloads[signature].library.get_asm_str()))
assert told == real and real, (told, real)
"""
    python("-c", program)


def test_bodies_and_types_are_found_by_running_the_kernel() -> None:
    (call,) = calls_of_kernel(KERNELS["rms_norm"])
    body, signature = call
    assert body is KERNELS["rms_norm"].compiled[0]
    assert signature in [tuple(s) for s in body.signatures]
    assert KERNELS["rms_norm"].function.__globals__["rms_norm_rows"] is body  # put back
    assert KERNELS["gemv"].compiled[0] in [b for b, _ in calls_of_kernel(KERNELS["gemv"])]
    assert all(any(b is known for known in COMPILED) for b, _ in calls_of_kernel(KERNELS["flash_attention"]))


def test_text_html_and_plot() -> None:
    x = np.ones(64, np.float32)
    found = explain(doubled, x, x)
    assert "this machine" in found.heading()
    text, page = str(found), found._repr_html_()
    assert text.splitlines()[1].split()[:3] == ["loop", "at", "bits"]
    assert "<table>" in page and "lines per element" in page and page.count("<tr>") == len(found.loops) + 1
    ax = found.plot()
    assert ax.get_xlabel() == "instructions per iteration"
    assert sum(patch.get_width() for patch in ax.patches) == sum(len(loop.assembly) for loop in found.loops)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert parser.TARGETS == TARGETS
    assert main(["explain", "silu_mul", "--target", "haswell", "--asm"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("silu_mul (silu_mul_range) for haswell: vectorised, 256 bits")
    assert "vfmadd" in out and re.search(r"^activation.py:\d+  .*\bv\w+ps ", out, flags=re.MULTILINE)
    assert main(["explain", "nothing"]) == 2
    assert "no kernel 'nothing'" in capsys.readouterr().err
    assert main(["explain"]) == 2
    assert "which kernel?" in capsys.readouterr().err


def test_what_cannot_be_explained_is_refused() -> None:
    x = np.ones(4, np.float32)
    with pytest.raises(ValueError, match="no kernel 'nothing': expected one of adamw, add, .*quant_matmul"):
        explain("nothing")
    with pytest.raises(ValueError, match=f"target: expected one of {', '.join(TARGETS)}, found 'i386'"):
        explain(doubled, x, x, target="i386")
    with pytest.raises(TypeError, match="kernel: expected a name"):
        explain(math.exp, x)
    with pytest.raises(TypeError, match="arguments: found none, expected those of a call"):
        explain(doubled)
    with pytest.raises(RuntimeError, match="doubled: could not be compiled for haswell: .*"):
        explain(doubled, "text", x, target="haswell")


@numba.njit
def _integer_sum(a, b, out):
    for i in range(a.size):
        out[i] = a[i] + b[i]


@numba.njit
def _largest(a):
    found = a[0]
    for i in range(a.size):
        found = max(found, a[i])
    return found


@numba.njit(fastmath=True)
def _double_dot(a, b):
    total = 0.0
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@numba.njit
def _converted(a, out):
    for i in range(a.size):
        out[i] = a[i]


def test_what_is_no_float32_arithmetic_is_seen_too() -> None:
    whole, single, double = np.arange(64, dtype=np.int32), np.ones(64, np.float32), np.ones(64)
    asked: dict[str, tuple[Any, ...]] = {
        "added": (_integer_sum, whole, whole, whole.copy()), "largest": (_largest, single),
        "dot": (_double_dot, double, double), "narrowed": (_converted, double, single.copy()),
        "copied": (_converted, single, single.copy()),
    }  # fmt: skip
    targets = ("host", "haswell", "apple-m4")
    found = _explain({name: _calls(function, tuple(rest))[1] for name, (function, *rest) in asked.items()}, targets)
    for target in targets:
        added, largest, dot, narrowed, copied = (found[name, target] for name in asked)
        assert added.vectorized and added.loops[0].lines_per_element == 3 / 16
        assert not largest.vectorized and "not vectorised" in largest.heading()
        assert dot.vectorized and dot.loops[0].fma >= 4 and dot.loops[0].lines_per_element == 2 / 8
        assert narrowed.vectorized and not narrowed.moves_only
        assert copied.moves_only


@numba.njit
def _of_no_type(a):
    return a.no_such_thing


def test_why_a_function_cannot_be_compiled_is_said() -> None:
    with pytest.raises(RuntimeError, match=r"_of_no_type: could not be compiled for .*no_such_thing"):
        explain(_of_no_type, np.ones(3))
