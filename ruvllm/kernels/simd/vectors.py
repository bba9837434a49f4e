"""SIMD vectors for kernels: 16 lanes as ordinary local variables of compiled Python.

A *vector* is 16 lanes of float32 (``f32x16``) or int32 (``i32x16``). LLVM splits it over the registers that
the CPU has: one AVX-512, two AVX2 or four NEON registers, so one source serves all. In compiled code
``acc = fma(splat(x), f32_load(w, i), acc)`` is what it says, and ``+ - * /`` work lane by lane.

LLVM vectorises plain loops by itself (jit/decorators.py); vectors are for what it does not do well: integer dot
products, 16-bit floats, sums over a row that is not the innermost loop, and tiles whose accumulators must stay in
registers.

Loads and stores take a C-contiguous array and the flat index of their first element; **nothing checks bounds**.
With ``NUMBA_DISABLE_JIT=1`` the same names are NumPy arrays of 16 lanes, so that a debugger can step through.
"""

from typing import TYPE_CHECKING

from ruvllm.kernels.jit.decorators import DISABLE_JIT

if TYPE_CHECKING or DISABLE_JIT:
    from ruvllm.kernels.simd.vectors_python import *  # noqa: F403
else:
    from ruvllm.kernels.simd.bounds_llvm import *  # noqa: F403
    from ruvllm.kernels.simd.dot_llvm import *  # noqa: F403
    from ruvllm.kernels.simd.dot_rows_llvm import *  # noqa: F403
    from ruvllm.kernels.simd.kv_llvm import *  # noqa: F403
    from ruvllm.kernels.simd.memory_llvm import *  # noqa: F403
    from ruvllm.kernels.simd.rows_llvm import *  # noqa: F403
    from ruvllm.kernels.simd.vectors_llvm import *  # noqa: F403
