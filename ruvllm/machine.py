"""What this machine is and which versions run on it, as `ruvllm info` and `ruvllm report` state it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

# Instruction sets that our kernels gain from, in LLVM's names.
_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512vnni", "avx512bf16", "avxvnni", "amx-int8",
    "neon", "dotprod", "i8mm", "fullfp16", "bf16", "sve",
)  # fmt: skip
_PACKAGES = ("numpy", "numba", "llvmlite", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of ruvllm, Python and the packages that decide how fast it is."""
    import ruvllm

    return {"ruvllm": ruvllm.__version__, "python": platform.python_version()} | {
        name: _package_version(name) for name in _PACKAGES
    }


def _package_version(name: str) -> str:
    try:
        return installed_version(name)
    except PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, str]:
    """System, processor, its instruction sets, cores, memory, and how busy it is."""
    import llvmlite.binding as llvm
    import psutil

    from ruvllm import container
    from ruvllm.kernels.matmul.blas import cpu_name

    features = llvm.get_host_cpu_features()
    memory = psutil.virtual_memory()
    facts = {
        "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "CPU": f"{cpu_name()} (LLVM: {llvm.get_host_cpu_name()})",
        "CPU features": " ".join(name for name in _FEATURES if features.get(name)) or "none that the kernels use",
        "cores": f"{psutil.cpu_count(logical=False) or '?'} physical, {psutil.cpu_count() or '?'} logical",
        "memory": f"{size(memory.total)}, {size(memory.available)} available",
    }
    cpus = container.cpus()
    if cpus is not None and cpus < (psutil.cpu_count() or 1):
        facts["cores"] += f", of which this container may use {cpus}"
    if (limits := container.memory()) is not None:
        facts["memory"] += f"; this container may take {size(limits[0])}, {size(limits[1])} of it available"
    if hasattr(os, "getloadavg"):
        facts["load"] = f"{os.getloadavg()[0]:.2f} in the last minute"
    return facts


def threads() -> dict[str, str]:
    """How many threads kernels use, and through which threading layer; which products go to BLAS."""
    from numba import get_num_threads

    from ruvllm.kernels.matmul.blas import SIZES, blas_name, speedups
    from ruvllm.kernels.threads.pool import threading_layer

    count = get_num_threads()  # also starts the threading layer, which until then has no name
    measured = [
        f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f}) for {n} x {n}, so "
        f"{'BLAS is' if found.clear else 'our kernels are'} used"
        for n, found in zip(SIZES, speedups(count) or (), strict=False)
    ]
    ratios = f"time of our kernels / time of BLAS, on {count} thread{'s' * (count > 1)}: {'; '.join(measured)}"
    return {
        "kernels use": str(count),
        "threading layer": threading_layer(),
        "BLAS in gemm": f"{blas_name()}; {ratios if measured else 'not measured yet (ruvllm info --calibrate)'}",
    }


def size(nbytes: float) -> str:
    """Bytes as a person reads them, in powers of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}" if unit == "GB" else f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes:.0f} B"
