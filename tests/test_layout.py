"""The layout of the library: each part imports only from parts below it, and no modules import each other in a circle.

``python -m tests.test_layout`` prints the parts, their sizes and what they import.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the top down. A name covers the module or package of that name; those on one line do not import each other.
LAYERS = [
    "ruvllm.cli ruvllm.lm_eval",
    "ruvllm.report ruvllm.serving",
    "ruvllm.lab",
    "ruvllm.measure",
    "ruvllm.machine",
    "ruvllm.loading",
    "ruvllm.llm",
    "ruvllm.tracing",
    "ruvllm.batching ruvllm.learning",
    "ruvllm.compiling ruvllm.quantizing ruvllm.dividing",
    "ruvllm.training_text ruvllm.structured",
    "ruvllm.torch",
    "ruvllm.checkpoint",
    "ruvllm.model",
    "ruvllm.kernels.operations",
    "ruvllm.kernels.tape",
    "ruvllm.kernels.training ruvllm.kernels.sampling ruvllm.kernels.experts",
    "ruvllm.kernels.lora ruvllm.kernels.attention ruvllm.kernels.quant",
    "ruvllm.kernels.norm ruvllm.kernels.activation ruvllm.kernels.vector ruvllm.kernels.rope ruvllm.kernels.bandwidth",
    "ruvllm.kernels.matmul",
    "ruvllm.kernels.threads",
    "ruvllm.kernels.simd",
    "ruvllm.kernels.jit",
    "ruvllm.kernels.spec ruvllm.kernels.check ruvllm.kernels.memory ruvllm.kernels.reference",
    "ruvllm.kernels.halves",
    "ruvllm.errors ruvllm.paths ruvllm.brief ruvllm.progress ruvllm.display ruvllm.spinning ruvllm.container",
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "ruvllm").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str, at_import: bool = True) -> Iterator[str]:
    """The library's modules that a module imports; ``at_import``: not those that functions import, or types alone."""
    tree = ast.parse(MODULES[name].read_text())
    nodes = list(_executed(tree)) if at_import else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in MODULES:
                    yield full
                elif node.module in MODULES:
                    yield node.module


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes outside of functions and of ``if TYPE_CHECKING:``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from _executed(node)


def part_of(name: str) -> str:
    """The part that a module belongs to: the longest name above."""
    found = [part for part in RANK if name == part or name.startswith(part + ".")]
    return max(found, key=len, default="")


@pytest.mark.parametrize("name", MODULES)
def test_a_part_imports_only_from_parts_below(name: str) -> None:
    part = part_of(name)
    if not part:  # the packages themselves, whose names are fetched when used, and small files that anything may use
        return
    for other in set(imports(name)):
        below = part_of(other)
        assert not below or below == part or RANK[below] > RANK[part], f"{name} imports {other}"


def circles() -> Iterator[list[str]]:
    """Modules that import each other in a circle, through imports in functions and for types alone too."""
    graph = {name: sorted(set(imports(name, at_import=False)) - {name}) for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> Iterator[list[str]]:
        if name in path:
            yield [*path[path.index(name) :], name]
        elif name not in done:
            for other in graph[name]:
                yield from visit(other, [*path, name])
            done.add(name)

    for name in graph:
        yield from visit(name, [])


def test_no_modules_import_each_other() -> None:
    assert not [" -> ".join(circle) for circle in circles()]


def test_no_module_is_private() -> None:
    """What other modules import has a public name; every module is imported."""
    assert not [name for name in MODULES if re.search(r"\._(?!_main__)", name)]


MOST_ARGUMENTS = 8
# What takes more, and why.
MANY_ARGUMENTS = {
    "fma_three": "an innermost tile: vectors in registers, and offsets in memory",
    "RuvllmLM.__init__": "the names are those of lm_eval's command line",
}
DECORATORS = {
    "inline_kernel", "kernel", "operation", "parallel_kernel", "part_kernel", "small_call", "sum_kernel", "view_kernel",
}  # fmt: skip
KERNEL_MODULES = [name for name in MODULES if name.startswith("ruvllm.kernels")]


Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST, within: str = "") -> Iterator[tuple[str, Function]]:
    """All functions of a file by name; methods with that of their class."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield within + node.name, node
        yield from functions(node, f"{node.name}." if isinstance(node, ast.ClassDef) else "")


def arguments(function: Function) -> list[ast.arg]:
    found = function.args
    several = [argument for argument in (found.vararg, found.kwarg) if argument]
    return [*found.posonlyargs, *found.args, *found.kwonlyargs, *several]


def test_functions_have_few_arguments() -> None:
    many: dict[str, int] = {}
    for name, path in MODULES.items():
        for function, node in functions(ast.parse(path.read_text())):
            count = sum(argument.arg not in ("self", "cls", "typingctx") for argument in arguments(node))
            if count > MOST_ARGUMENTS:
                many[function] = count
                assert function in MANY_ARGUMENTS, f"{name}.{function} has {count} arguments"
    assert many.keys() == MANY_ARGUMENTS.keys() and max(many.values()) <= 12


@pytest.mark.parametrize("name", KERNEL_MODULES)
def test_functions_that_python_calls_are_annotated(name: str) -> None:
    """Compiled ones are not: numba finds their types."""
    for _, function in functions(ast.parse(MODULES[name].read_text())):
        decorators = {ast.unparse(d).split("(")[0] for d in function.decorator_list}
        bare = [a.arg for a in arguments(function) if a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare or decorators & DECORATORS, f"{function.name}: {', '.join(bare)}"


# The packages that compile, their modules that are documented, and the one place that may look into others.
COMPILERS = ("numba", "llvmlite")
DOCUMENTED = {"numba", "numba.types", "numba.extending", "llvmlite", "llvmlite.ir", "llvmlite.binding"}
PRIVATE = "ruvllm.kernels.jit.private"
_ITSELF = ("self", "cls", "super()")


def private_touches(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Undocumented modules of numba and llvmlite that a file names, and underscored attributes that are not ``own``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names if a.name in ("core", "np"))]
        elif isinstance(node, ast.Attribute):
            if re.match("_[^_]", node.attr) and node.attr not in own and ast.unparse(node.value) not in _ITSELF:
                yield ast.unparse(node)
            names = [ast.unparse(node)] if node.attr in ("core", "np") else []
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in COMPILERS and name not in DOCUMENTED)


def _names(tree: ast.AST) -> Iterator[str]:
    """What a file defines, or sets on its own objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in _ITSELF:
            yield node.attr


def test_one_package_touches_private_parts_of_the_compilers() -> None:
    trees = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
    own = {name for tree in trees.values() for name in _names(tree)}
    there = [trees.pop(name) for name in MODULES if name.startswith(PRIVATE)]
    own -= {touch.rpartition(".")[2] for tree in there for touch in private_touches(tree, set(_names(tree)))}
    own |= {"_replace", "_asdict", "_fields", "_getvalue"}  # documented, of NamedTuple and of numba's structures
    found = {name: sorted(set(private_touches(tree, own))) for name, tree in trees.items()}
    assert not {name: touches for name, touches in found.items() if touches}


@pytest.mark.parametrize(
    ("source", "touch"),
    [
        ("from numba.core import cgutils", "numba.core"), ("import numba.np.arrayobj", "numba.np.arrayobj"),
        ("from numba import core", "numba.core"), ("numba.core.config", "numba.core"),
        ("from llvmlite.ir import values; import llvmlite.ir.values", "llvmlite.ir.values"),
        ("dispatcher._cache = 1", "dispatcher._cache"),
    ],
)  # fmt: skip
def test_such_touches_are_seen(source: str, touch: str) -> None:
    assert touch in private_touches(ast.parse(source), set())


def test_the_lowest_versions_are_those_that_are_tested() -> None:
    """tests/lowest.txt, for ``make test-lowest``, has the lower bounds of pyproject.toml, and every one."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = dict(re.findall(r"^([\w.]+)>=([\d.]+)", "\n".join(wanted), re.MULTILINE))
    assert len(bounds) == len(wanted)
    lines = [line for line in (ROOT / "tests" / "lowest.txt").read_text().splitlines() if not line.startswith("#")]
    tested = dict(line.split("==") for line in lines)
    assert tested.keys() == bounds.keys()
    for name, version in tested.items():
        assert re.fullmatch(re.escape(bounds[name]) + r"(\.0)*", version), name


if __name__ == "__main__":
    for names in LAYERS:
        for part in names.split():
            mine = [name for name in MODULES if part_of(name) == part]
            lines = sum(len(MODULES[name].read_text().splitlines()) for name in mine)
            below = sorted({part_of(other) for name in mine for other in imports(name)} - {part, ""})
            names_below = ", ".join(name.removeprefix("ruvllm.") for name in below)
            print(f"{part:28} {len(mine):3} files {lines:6} lines   <- {names_below}")
    print("circles:", *([" -> ".join(circle) for circle in circles()] or ["none"]))
