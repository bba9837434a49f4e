"""Untrusted chat templates: Jinja in a sandbox that gives them plain data, few functions and a budget.

The mechanism: the parsed template is rewritten so that every operation that can repeat, grow or take long reports
itself first. Loops do so in each iteration; `~`, list literals, comparisons and slices go through functions of the
environment; arithmetic, calls, filters, tests and printed values through hooks that Jinja has. Each of them pays from
one budget of processor time and characters, and an operation that would make a value too large is refused beforehand.
Between two payments there is only straight-line code of a template of limited length, on values of limited size.
Nothing runs in another process or thread, and nothing depends on the load of the machine.

Attributes and methods are those of an explicit list; the rest of the sandbox (no files, no imports, no mutation) is
Jinja's ImmutableSandboxedEnvironment. Source of the functions that templates expect (`raise_exception`,
`strftime_now`, `tojson` without HTML escapes, `{% generation %}`, `{% break %}`): transformers' chat templates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.lexer import TokenStream
from jinja2.runtime import Context, LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from ruvllm.checkpoint.template import functions
from ruvllm.checkpoint.template.budget import Budget, Refused, allow, current, transparent

MAX_SOURCE = 1 << 15  # characters of a template; the longest known have 20 000
MAX_NODES = 5000  # of the parsed template; the largest known have 1400

_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        "capitalize count endswith find format index isalnum isalpha isdigit islower isnumeric isspace istitle isupper "
        "join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split "
        "splitlines startswith strip swapcase title upper".split()
    ),
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
}

_JINJAS_OWN = frozenset({"_loop_vars", "_block_vars"})  # keyword arguments that Jinja adds to every call


class Template:
    """One compiled chat template; `render` may be called from several threads.

    Args:
        source: the template.
        literals: applied to every literal text of the template, outside of and within expressions.

    Raises:
        Refused: it is too long.
        jinja2.TemplateSyntaxError, RecursionError, SyntaxError, MemoryError: it cannot be compiled.
    """

    def __init__(self, source: str, literals: Callable[[str], str] = lambda text: text) -> None:
        if len(source) > MAX_SOURCE:
            raise Refused(f"it has {len(source)} characters, more than {MAX_SOURCE}")
        environment = _environment()
        tree = environment.parse(source)
        parts = list(tree.find_all(nodes.Node))
        if len(parts) > MAX_NODES:
            raise Refused(f"it has more than {MAX_NODES} parts")
        if any(isinstance(part, nodes.Include | nodes.Import | nodes.FromImport | nodes.Extends) for part in parts):
            raise Refused("it loads other templates")
        tree = _Hooks(literals).visit(tree)
        tree.set_environment(environment)
        token = current.set(Budget())  # constants are folded while compiling
        try:
            self._template = environment.from_string(tree)
        finally:
            current.reset(token)

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text that the template makes of plain data. Raises: Refused, and any error of the template itself."""
        token = current.set(Budget())
        try:
            pieces = []
            length = 0
            for piece in self._template.generate(variables):
                length += len(piece)
                allow(1, length)
                pieces.append(piece)
            return "".join(pieces)
        finally:
            current.reset(token)


class _Generation(Extension):
    """``{% generation %} ... {% endgeneration %}``: marks an assistant's text for training; here it is just text."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox and its hooks: what Jinja calls for operators, calls, attributes, filters, tests and output."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self) -> None:
        extensions = [_Generation, LoopControlExtension]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_printed)
        self.filters = {name: _hooked_filter(name, self.filters) for name in functions.FILTERS}
        jinjas: dict[str, Any] = dict(self.tests)
        self.tests = {name: _hooked_test(jinjas[name]) for name in functions.TESTS}
        self.globals = dict(functions.GLOBALS)

    def _tokenize(
        self, source: str, name: str | None, filename: str | None = None, state: str | None = None
    ) -> TokenStream:
        # All tokens at once: a generator that is dropped when the parser runs out of stack prints a warning.
        return TokenStream(list(super()._tokenize(source, name, filename, state)), name, filename)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, LoopContext | Namespace):
            return not attr.startswith("_")
        return any(isinstance(obj, kind) and attr in names for kind, names in _METHODS.items())

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        inner = super().wrap_str_format(value)
        if inner is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> Any:
            functions.check_braces(current.get(), value.__self__, args, kwargs)
            return inner(*args, **kwargs)

        return checked

    # Jinja's names, which no keyword argument of a template can have.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if owner is __self:  # one of the hooks below, which pays for itself
            return __obj(*args)
        budget = current.get()
        budget.spend()
        given = {name: value for name, value in kwargs.items() if name not in _JINJAS_OWN}
        budget.weigh_all((*args, *given.values()))
        if isinstance(owner, str):
            budget.spend(read=len(owner))
            functions.check_method(budget, owner, __obj.__name__, args, given)
        return budget.checked(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = current.get()
        budget.spend()
        functions.check_operator(budget, operator, left, right)
        return budget.checked(super().call_binop(context, operator, left, right))

    # Called by the rewritten template.

    def hook_tick(self, characters: int) -> bool:
        current.get().spend(made=characters)
        return True

    def hook_made(self, value: Any) -> Any:
        current.get().spend()
        return current.get().checked(value)

    def hook_joined(self, *values: Any) -> Any:
        current.get().weigh_all(values)
        return self.hook_made("".join(map(str, values)))

    def hook_read(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple | dict):
            current.get().spend(read=current.get().weigh(value).characters)
        return value

    def hook_copied(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple):
            current.get().spend(made=len(value) if isinstance(value, str) else 8 * len(value))
        return value


@cache
def _environment() -> _Environment:
    return _Environment()


class _Hooks(NodeTransformer):
    """Rewrites a parsed template: adds payments to loops, and environment functions where Jinja has no hook."""

    def __init__(self, literals: Callable[[str], str]) -> None:
        self._literals = literals

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        node.data = self._literals(node.data)
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if isinstance(node.value, str):
            node.value = self._literals(node.value)
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Pay in each iteration, also for the literal text of the body, which is output without a hook."""
        self.generic_visit(node)
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        text += sum(len(const.value) for const in node.find_all(nodes.Const) if isinstance(const.value, str))
        node.body.insert(0, nodes.ExprStmt(_call("tick", [nodes.Const(text)], node), lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(_call("tick", [nodes.Const(0)], node), node.test, lineno=node.lineno)
        return node

    def _visit_made(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return _call("made", [node], node)

    visit_List = visit_Dict = _visit_made

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._visit_made(node) if node.ctx == "load" else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", node.nodes, node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _call("read", [node.expr], node)
        for operand in node.ops:
            operand.expr = _call("read", [operand.expr], node)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _call("copied", [node.node], node)
        return node


def _call(hook: str, args: list[nodes.Expr], where: nodes.Node) -> nodes.Call:
    function = nodes.EnvironmentAttribute(f"hook_{hook}", lineno=where.lineno)
    return nodes.Call(function, args, [], None, None, lineno=where.lineno)


@pass_context
def _printed(context: Context, value: Any) -> Any:
    if not isinstance(value, Undefined):
        current.get().spend(made=current.get().weigh(value).characters)
    return value


def _hooked_filter(name: str, jinjas: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    plain = functions.REPLACED.get(name) or jinjas[name]
    passed = str(getattr(plain, "jinja_pass_arg", "")).rpartition(".")[2]
    check, shallow = functions.FILTERS[name], name in functions.SHALLOW

    @pass_context  # also keeps Jinja from applying it to constants while compiling
    def hooked(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = current.get()
        budget.spend()
        budget.weigh_all(args)
        budget.weigh_all(kwargs.values())
        if not shallow:
            budget.spend(read=transparent(budget.weigh(value), f"the filter {name}").characters)
        if check is not None:
            check(budget, value, *args, **kwargs)
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        made = plain(first[passed], value, *args, **kwargs) if passed in first else plain(value, *args, **kwargs)
        # Items that Jinja would make one by one, outside of any hook, are made here.
        return budget.checked(budget.collect(made) if hasattr(made, "__next__") else made)

    return hooked


def _hooked_test(plain: Callable[..., Any]) -> Callable[..., Any]:
    def hooked(value: Any, *args: Any) -> Any:
        budget = current.get()
        budget.spend()
        if args:
            budget.spend(read=budget.weigh_all((value, *args)).characters)
        return plain(value, *args)

    return hooked


def describe(error: BaseException) -> str:
    """What is wrong with a template, in words."""
    text = " ".join(str(error).split())
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"{text} (line {error.lineno})"
    return text if isinstance(error, Refused | jinja2.TemplateError) else f"{type(error).__name__}: {text}"
