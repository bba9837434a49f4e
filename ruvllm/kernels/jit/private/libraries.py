"""Numba's compiler as the decorators of ``jit.decorators`` change it.

- Machine code is made once, of functions that Python calls; those that only kernels call stay LLVM IR (``Part``,
  ``Parallel``).
- A sum stays a function of its own (``Sum``), so that its order of additions does not depend on the code around it.
- A sum is optimised once. Numba links the optimised IR of a kernel into its callers and optimises it again there: LLVM
  then regroups sums, and a process that found the kernel in the cache gets other bits than the one that compiled
  it. So a kernel with a sum in it keeps its unoptimised IR for callers. (The others do as Numba does, which makes
  kernels of several large bodies up to a tenth faster.)
- Loops are marked as independent (``Independent``): LLVM then vectorises them wherever the arrays lie.
- Loops may take all of an AVX-512 register, which LLVM leaves half empty on some processors.
"""

import copy
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba.core.compiler import Compiler

from ruvllm.kernels.jit.private.front_end import resolving_once, shortened
from ruvllm.kernels.jit.private.loops import mark_independent, take_whole_registers
from ruvllm.kernels.jit.private.parts import part


class Serial(Compiler):
    """Compiles a serial kernel."""

    under_test = False  # True for the functions that has_libraries compiles

    def __init__(
        self, typingctx: Any, targetctx: Any, library: Any, args: Any, return_type: Any, flags: Any, locals: Any
    ) -> None:
        super().__init__(typingctx, targetctx, library, args, return_type, flags, locals)
        if self.usable():
            self.state.targetctx = _changed_target(self.state.targetctx, self)

    def compile_extra(self, func: Any) -> Any:
        """Compile the function."""
        with resolving_once():
            return super().compile_extra(func)

    def define_pipelines(self) -> list[Any]:
        """The passes that numba runs."""
        return [shortened(pipeline) for pipeline in super().define_pipelines()]

    def usable(self) -> bool:
        """Whether this class changes anything; else numba compiles as usual."""
        return self.under_test or has_libraries()

    def becomes_machine_code(self, name: str) -> bool:
        """Whether the library of this name does; else it stays IR."""
        return True

    def change(self, module: ir.Module) -> None:
        """Change the IR of the function before it is optimised."""


class Independent(Serial):
    """Compiles a serial kernel whose loops are independent."""

    def change(self, module: ir.Module) -> None:
        mark_independent(module)


class Part(Serial):
    """Compiles a function that only other kernels call. It stops at IR, which halves compile times."""

    def __init__(
        self, typingctx: Any, targetctx: Any, library: Any, args: Any, return_type: Any, flags: Any, locals: Any
    ) -> None:
        if self.usable():
            flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
        super().__init__(typingctx, targetctx, library, args, return_type, flags, locals)

    def becomes_machine_code(self, name: str) -> bool:
        return False


class IndependentPart(Part):
    """Part, with independent loops."""

    def change(self, module: ir.Module) -> None:
        mark_independent(module)


class Sum(Part):
    """IndependentPart that is never inlined."""

    def change(self, module: ir.Module) -> None:
        for function in module.functions:
            if not function.is_declaration:
                function.attributes.add("noinline")
        mark_independent(module)


class Parallel(Serial):
    """Makes machine code of a parallel kernel once.

    Numba makes machine code four times: of the loop's body, of two wrappers around it, and of the kernel, each with a
    copy of all that it calls. Here the first three stay LLVM IR, which is linked into the last. So nothing in the loop
    may need Python, not even print.
    """

    def define_pipelines(self) -> list[Any]:
        """All passes that numba runs: they see to ``prange``."""
        return list(Compiler.define_pipelines(self))

    def becomes_machine_code(self, name: str) -> bool:
        return bool(name == self.state.func_id.func_qualname)


# --- libraries: what becomes machine code, and what callers get ---------------------------------------------------


def _changed_target(targetctx: Any, compiler: Serial) -> Any:
    """A copy of the target context that leaves some decisions to the compiler class above."""
    target = copy.copy(targetctx)  # shares everything but these four steps
    target.cached_internal_func = {}
    codegen = _Codegen(targetctx.codegen(), compiler)
    target.codegen = lambda: codegen

    def get_executable(library: Any, fndesc: Any, env: Any) -> Any:
        if compiler.becomes_machine_code(library.name):
            return targetctx.get_executable(library, fndesc, env)
        return not_callable()

    def post_lowering(module: ir.Module, library: Any) -> None:
        compiler.change(module)
        take_whole_registers(module)
        targetctx.post_lowering(module, library)

    target.get_executable, target.post_lowering = get_executable, post_lowering
    target.get_abi_sizeof = lambda type: _size_of(type, targetctx.target_data)
    return target


@cache
def _size_of(type: Any, target_data: Any) -> int:
    """Bytes of an LLVM type; llvmlite parses a module to find out."""
    return int(type.get_abi_size(target_data))


class _Codegen:
    """Numba's code generator, with changed libraries.

    Those that stay IR are not optimised, and never added to the execution engine: it would make machine code of
    them, and where two modules define a function the linker takes the first, so that the kernel would call the slow
    copy. Those with a sum in them save a copy for callers before they are optimised.
    """

    def __init__(self, codegen: Any, compiler: Serial) -> None:
        self._codegen, self._compiler = codegen, compiler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codegen, name)

    def create_library(self, name: str, **options: Any) -> Any:
        library = self._codegen.create_library(name, **options)
        optimize = library._optimize_final_module

        def keep_and_optimize() -> None:
            if any(_is_kept_whole(function) for function in library._final_module.functions):
                library._shared_module = _to_be_linked(library._final_module)
            optimize()

        def finalize() -> None:
            library._finalize_dynamic_globals()
            library._finalized = True

        if self._compiler.becomes_machine_code(name):
            library._optimize_final_module = keep_and_optimize
        else:
            library._optimize_final_module = lambda: None
            library._finalize_final_module = finalize
        return library


def _is_kept_whole(function: Any) -> bool:
    """Whether it is a definition of ours that is never inlined, as sums are."""
    ours = function.name.startswith("_ZN") and not function.is_declaration
    return ours and any(b"noinline" in attributes for attributes in function.attributes)


def _to_be_linked(module: Any) -> Any:
    """A copy whose functions several modules may define; Numba makes the same of the optimised code."""
    shared = module.clone()
    for function in shared.functions:
        if not function.is_declaration and function.linkage == llvm.Linkage.external:
            function.linkage = "linkonce_odr"
    return shared


def not_callable() -> Any:
    """A placeholder for an entry point: numba wants a builtin, a new one each time; it raises if Python calls it."""
    return [].clear


# --- the test -----------------------------------------------------------------------------------------------------


class _TrialSum(Sum):
    under_test = True


class _TrialSerial(Serial):
    under_test = True


@part("libraries", "compiling takes twice as long, and sums may differ in the last bits from one start to the next")
def has_libraries() -> bool:
    """Whether a part stays unoptimised IR, and a sum stays a function of its own in the kernel that calls it."""

    @numba.njit(pipeline_class=_TrialSum, forceinline=False)
    def callee(x: Any) -> Any:
        return x + x

    @numba.njit(pipeline_class=_TrialSerial)
    def caller(x: Any) -> Any:
        return 3 * callee(x)

    right = caller(7) == 42
    (part,), (whole,) = callee.inspect_llvm().values(), caller.inspect_llvm().values()
    optimised = "local_unnamed_addr"  # an attribute that LLVM's optimiser infers
    return right and optimised not in part and optimised in whole and "noinline" in whole
