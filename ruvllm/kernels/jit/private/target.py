"""The processor that numba compiles for."""

import os
from functools import cache
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from numba import config
from numba.core.registry import cpu_target

from ruvllm.kernels.jit.private.parts import part

FOREIGN = "RUVLLM_COMPILE_FOR"  # variable: triple, CPU and features of a target that a process compiles for only


class Target(NamedTuple):
    """A processor, as LLVM names it and its features."""

    triple: str
    cpu: str
    features: str


def _numbas() -> Target:
    return Target(*cpu_target.target_context.codegen().magic_tuple())


@part("target", "kernels are made for the processor that LLVM finds")
def has_target() -> bool:
    """Whether numba's code generator reports its target."""
    return all(isinstance(text, str) for text in _numbas()) and _numbas().triple.count("-") >= 2


@cache
def target() -> Target:
    """The target that this process compiles for: the host, or what NUMBA_CPU_NAME and NUMBA_CPU_FEATURES name.

    In a process that cross-compiles it is the other machine (``cross``).
    """
    foreign = os.environ.get(FOREIGN)
    if foreign:
        return Target(*foreign.split(" "))
    return _numbas() if has_target() else _documented_target()


def _documented_target() -> Target:
    """The target from documented sources: the variables, and what LLVM knows of the host."""
    settings: Any = config
    features = settings.CPU_FEATURES
    if features is None:
        known = llvm.get_host_cpu_features()
        if not settings.ENABLE_AVX:
            known.update({name: False for name in known if name.startswith("avx")})
        features = known.flatten()
    return Target(llvm.get_process_triple(), settings.CPU_NAME or llvm.get_host_cpu_name(), features)
