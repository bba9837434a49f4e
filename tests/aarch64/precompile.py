"""Compiles natively into the compile cache of an emulated Python, 20 to 30 times faster than under emulation.

``python -m tests.aarch64.precompile RECORD FIRST STEP PYTHON_VERSION`` takes every STEP-th of the recorded functions.
The environment names the processor (``ruvllm.kernels.jit.private.target.FOREIGN``) and the cache. Keys
of the cache contain sys.version: it becomes that of the emulated Python before anything of ruvllm is imported.
"""

import gc
import sys
from pathlib import Path
from typing import Any


def main(record: Path, first: int, step: int) -> None:
    from ruvllm import kernels
    from ruvllm.compiling import operations_for
    from ruvllm.kernels.jit.cache import KernelCache
    from ruvllm.kernels.jit.decorators import COMPILED
    from ruvllm.kernels.jit.private.cross import retarget, to_object
    from ruvllm.kernels.jit.private.target import target
    from ruvllm.kernels.threads.regions import CFunction
    from ruvllm.model.kv_blocks import DTYPES
    from ruvllm.model.weights import LAYOUTS
    from tests.aarch64.recorder import read

    _ = kernels.KERNELS  # imports the modules of all kernels
    for kv in DTYPES:
        operations_for((*LAYOUTS, "int5"), kv)  # makes those that models use
    functions: dict[tuple[str, str], Any] = {(f.py_func.__module__, f.py_func.__qualname__): f for f in COMPILED}
    regions = {
        (x.function.__module__, x.function.__qualname__): x for x in gc.get_objects() if isinstance(x, CFunction)
    }
    retarget(target(), to_object)
    KernelCache.load_overload = lambda self, sig, context: None  # type: ignore[assignment,method-assign]
    compiled = unknown = 0
    for module, name, signature in read(record)[first::step]:
        if (module, name) in functions:
            functions[module, name].compile(signature)
        elif (module, name) in regions:
            _ = regions[module, name].address
        else:  # made by a test
            unknown += 1
            continue
        compiled += 1
    print(f"{compiled} functions compiled, {unknown} left to the emulated Python")


if __name__ == "__main__":
    sys.version = sys.argv[4]
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
