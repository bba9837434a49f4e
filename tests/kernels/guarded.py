"""Arrays between two inaccessible pages: a load or store out of bounds kills the process.

As a program, ``python -m tests.kernels.guarded kernels`` runs every kernel at odd sizes on such arrays, pressed against
either page; ``... models`` runs small models of every kind with such buffers and weights.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

PAGE = mmap.PAGESIZE
_PROT_NONE = 0


def guarded(shape: int | tuple[int, ...], dtype: Any = np.float32, align: int = 1, at_end: bool = True) -> np.ndarray:
    """An array, full of 0xFF bytes (NaN in floats), that begins or ends at a page without access."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    pages = max(1, -(-size // PAGE))
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for page in (0, pages + 1):
        if libc.mprotect(address + page * PAGE, PAGE, _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = PAGE + (pages * PAGE - size) // align * align if at_end else PAGE
    inside = np.frombuffer(memory, np.uint8, size, start)
    inside[:] = 0xFF
    return inside.view(dtype).reshape(shape)


def copied(array: np.ndarray, at_end: bool) -> np.ndarray:
    copy = guarded(array.shape, array.dtype, at_end=at_end)
    copy[...] = array
    return copy


def guard_own_memory() -> None:
    """The package's own allocations are between such pages too, with up to 64 bytes of alignment after them."""
    _memory = importlib.import_module("ruvllm.kernels.memory")
    importlib.import_module("ruvllm.model.llama")  # and with it all that allocate

    def empty(shape: Any, dtype: Any = np.float32) -> np.ndarray:
        return guarded(shape, dtype, align=_memory.CACHE_LINE)

    def zeros(shape: Any, dtype: Any = np.float32, alignment: int = _memory.CACHE_LINE) -> np.ndarray:
        array = guarded(shape, dtype, align=alignment)
        array[...] = 0
        return array

    replaced = 0
    for name, guard in (
        ("aligned_empty", empty), ("aligned_zeros", zeros), ("weights_empty", empty), ("scratch", empty)
    ):  # fmt: skip
        original = getattr(_memory, name)
        for place, module in list(sys.modules.items()):
            if place.startswith("ruvllm.") and getattr(module, name, None) is original:
                setattr(module, name, guard)
                replaced += 1
    assert replaced > 8, "most modules take theirs by name"


def run_kernels() -> None:
    guard_own_memory()
    from ruvllm.kernels import KERNELS
    from tests.kernels import spec_cases as cases

    for spec in KERNELS.values():
        for sizes in cases.odd_sizes(spec, (1, 2, 15, 17, 31, 33, 65)):
            arguments = cases.example(spec, sizes)
            expected = cases.run(spec, arguments)
            for at_end in (True, False):
                inside = {n: copied(a, at_end) for n, a in arguments.items() if isinstance(a, np.ndarray)}
                if cases.takes_out(spec):
                    inside["out"] = guarded(expected[0].shape, at_end=at_end)
                for y, r in zip(cases.results(spec.function(**{**arguments, **inside})), expected, strict=True):
                    np.testing.assert_array_equal(y, r, err_msg=f"{spec.name} {sizes}")


def run_models() -> None:
    guard_own_memory()
    from tests.model.model_cases import KINDS, run, small_model, text

    ids = text(90)
    for layout, kv in KINDS:
        for fused in (True, False):
            model = small_model(layout, threads=2)
            model.fused = fused
            logits = run(model, model.new_cache(90, kv), ids, [70, 1, 1, 7, 1, 10])
            assert np.isfinite(logits).all(), (layout, kv, fused)


def run_outside() -> None:
    """Must kill the process: one load past the end of an array."""
    x = guarded(5)
    print(ctypes.c_float.from_address(x.ctypes.data + x.nbytes).value)


PROGRAMS: dict[str, Callable[[], None]] = {"kernels": run_kernels, "models": run_models, "outside": run_outside}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]]()
    print("nobody touched the pages")
