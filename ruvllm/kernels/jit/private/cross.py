"""Cross-compiling: Numba in a process of its own, set to another processor, whose code is never run there.

Such a process is started with the variable ``target.FOREIGN``, so that kernels choose instructions for that processor.
"""

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from numba.core.caching import NullCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.core.runtime.nrt import rtsys
from numba.core.runtime.nrtdynmod import compile_nrt_functions

from ruvllm.kernels.jit.private.libraries import has_libraries, not_callable
from ruvllm.kernels.jit.private.parts import part
from ruvllm.kernels.jit.private.target import Target


@part("cross", "explain() does not work")
def can_retarget() -> bool:
    """Whether numba has the attributes that ``retarget`` replaces."""
    codegen = cpu_target.target_context.codegen()
    there = [
        *(hasattr(codegen, name) for name in ("_tm", "_data_layout", "_create_empty_module")),
        *(hasattr(JITCodeLibrary, name) for name in ("_finalize_final_module", "_finalize_dynamic_globals")),
        hasattr(type(rtsys), "library"),
    ]
    return all(there)


def retarget(target: Target, finish: Callable[[Any, Any], None]) -> None:
    """Have numba compile for a target; ``finish(library, target machine)`` emits what is wanted of each library.

    Raises:
        RuntimeError: this version of numba cannot compile for another target.
    """
    if not can_retarget():
        raise RuntimeError("this version of numba cannot compile for another processor")
    has_libraries()  # its test runs code, which is impossible from now on
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, codemodel="jitdefault", jit=True,
        reloc="static" if target.triple.startswith("x86") else "default",
    )  # fmt: skip
    cpu_target.typing_context.refresh()  # before the change: numba's own helpers run on this machine
    cpu_target.target_context.refresh()
    codegen = cpu_target.target_context.codegen()
    codegen._tm, codegen._data_layout = machine, str(machine.target_data)
    empty_module = codegen._create_empty_module

    def module_for_target(name: str) -> Any:
        module = empty_module(name)
        module.triple = target.triple
        return module

    def finalize(library: Any) -> None:
        library._finalize_dynamic_globals()
        finish(library, machine)
        library._finalized = True

    codegen._create_empty_module = module_for_target
    setattr(JITCodeLibrary, "_finalize_final_module", finalize)  # noqa: B010  mypy sees no method there
    setattr(JITCodeLibrary, "get_pointer_to_function", lambda library, name: 0)  # noqa: B010
    cpu_target.target_context.get_executable = lambda library, fndesc, env: not_callable()
    with global_compiler_lock:
        rtsys._library = compile_nrt_functions(cpu_target.target_context)  # reference counts: linked into kernels


def to_assembly(library: Any, machine: Any) -> None:
    """Make assembly with LLVM's comments, which say where loops are, and what is a spill."""
    machine.set_asm_verbosity(True)
    # The code generator changes the IR, which then is linked into other kernels: as in numba's own process.
    text = machine._emit_to_memory(library._final_module, use_object=False)
    library.assembly = text.decode(errors="replace")


def to_object(library: Any, machine: Any) -> None:
    """Make machine code that the compile cache can keep."""
    library._verify_declare_only_symbols()
    code = machine.emit_object(library._final_module)
    if library._object_caching_enabled:
        library._compiled, library._compiled_object = True, code


def assembly_of(dispatcher: Any, signature: tuple[Any, ...]) -> str:
    """The assembly of a function and of all that is not inlined into it, after ``retarget(target, to_assembly)``."""
    dispatcher.compile(signature)
    library = dispatcher.overloads[signature].library
    with global_compiler_lock:
        library._ensure_finalized()
    return str(library.assembly)


def with_line_numbers(dispatcher: Any) -> None:
    """Have a function compiled again, with line numbers in its debug information and without wrappers for Python."""
    compiler: Any = dispatcher._compiler.pipeline_class

    class LineNumbers(compiler):
        def __init__(
            self, typingctx: Any, targetctx: Any, library: Any, args: Any, return_type: Any, flags: Any, locals: Any
        ) -> None:
            flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
            # Line numbers alone: debug=True would add checks of bounds, and keep variables longer.
            flags.debuginfo = flags.dbg_directives_only = True
            super().__init__(typingctx, targetctx, library, args, return_type, flags, locals)

    dispatcher._cache = NullCache()
    dispatcher._compiler.pipeline_class = LineNumbers
