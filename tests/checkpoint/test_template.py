"""Templates that are not to be trusted: refused before they take time or memory, and blamed on whom they are from."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from ruvllm.checkpoint.chat import encode_chat, render_chat
from ruvllm.errors import ModelFormatError
from tests.checkpoint.chat_cases import (
    CHATML,
    LLAMA3,
    TEMPLATES,
    TOKENIZERS,
    USER,
    tokenizer_with,
)
from tests.checkpoint.jinja_templates import rendered_by_jinja
from tests.processes import python

LARGE = "{% set b = 'x' * 4000000 %}"
HOSTILE = {
    "loops without output": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes"),
    "a loop whose test fails": (
        "{% set a = 1 %}{% for b in range(262143) if " + ("(" + "a and " * 29 + "a) and ") * 30 + "0 %}{% endfor %}",
        "takes"),
    "a huge range": ("{% for a in range(10 ** 18) %}{% endfor %}", "a range of more than"),
    "a loop over text": ("{% for a in 'a' * 4000000 %}{% for b in 'a' * 4000000 %}{% endfor %}{% endfor %}", "takes"),
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "takes"),
    "a macro without end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "a recursive loop": ("{% for a in [[1], [2]] recursive %}{{ loop([[1], [2]]) }}{% endfor %}", "recursion"),
    "blocks that double": (
        "{% block b0 %}{% endblock %}" + "".join(
            "{% block b" + str(i + 1) + " %}" + ("{{ self.b" + str(i) + "() }}") * 2 + "{% endblock %}"
            for i in range(40)), "takes"),
    "sorting again and again": (
        "{% for i in range(9999) %}{% set x = range(99999) | list | sort %}{% endfor %}", "takes"),
    "comparing again and again": (
        LARGE + "{% set c = b[1:] ~ 'y' %}{% for i in range(99999) %}{% if b == c or c in b %}{% endif %}{% endfor %}",
        "takes"),
    "comparing many times": (
        LARGE + "{% set c = 'x' * 2000000 ~ 'y' %}" + "{% if c in b %}{% endif %}" * 600, "takes"),
    "numbers that hash alike": (
        "{% set x = range(0, 99999 * 2305843009213693951, 2305843009213693951) | list | unique %}", "unsafe"),
    "text times a number": ("{{ 'a' * 1000000000000 }}", "characters"),
    "a number times text": ("{{ 1000000000000 * 'a' }}", "characters"),
    "a list times a number": ("{% set x = [1] * 1000000000 %}", "value of more than"),
    "a power": ("{{ 2 ** 1000000000 }}", "unsafe"),
    "squares of squares": (
        "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}", "bits"),
    "doubling with ~": (
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "characters"),
    "joining many": (LARGE + "{% set c = " + "b ~ " * 500 + "b %}", "characters"),
    "doubling with +": (
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}", "characters"),
    "doubling a list": (
        "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}", "items"),
    "lists of the same list": (
        "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}", "items"),
    "dicts of the same dict": (
        "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = {1: n.x, 2: n.x} %}{% endfor %}{{ n.x }}",
        "items"),
    "tuples of the same tuple": (
        "{% set t0 = 1 %}" + "".join(f"{{% set t{i + 1} = (t{i}, t{i}) %}}" for i in range(60)) + "{{ {t60: 1} }}",
        "items"),
    "formatting a namespace": (
        "{% set n = namespace(x='a' * 4000000) %}{% set y = ('{0.x}' * 1000).format(n) %}", "looks into a namespace"),
    "formatting a list of namespaces": (
        "{% set n = namespace(x='a' * 4000000) %}{% set y = ('{0[0].x}' * 1000).format([n]) %}", "a format looks into"),
    "formatting a namespace by name": (
        "{% set n = namespace(x='a' * 4000000) %}{% set y = ('{n.x}' * 1000).format_map({'n': n}) %}", "a format"),
    "formatting a loop": (
        "{% for i in ['a' * 4000000, 1] %}{% set y = ('{0.previtem}' * 1000).format(loop) %}{% endfor %}", "or a loop"),
    "joining attributes of namespaces": (
        "{% set n = namespace(x='a' * 4000000) %}{% set y = ([n] * 1000) | join(attribute='x') %}", "the filter join"),
    "joining attributes of loops": (
        "{% for i in ['a' * 4000000, 1] %}{% set y = ([loop] * 1000) | join(attribute='previtem') %}{% endfor %}",
        "the filter join looks into"),
    "sorting by attributes of namespaces": (
        "{% set n = namespace(x='a' * 4000000) %}{% set y = ([n] * 1000) | sort(attribute='x') %}", "the filter sort"),
    "attributes of many namespaces": (
        "{% set n = namespace(x='a' * 4000000) %}{% set y = ([n] * 1000) | map(attribute='x') | list %}", "characters"),
    "a namespace in itself": (
        "{% set n = namespace() %}{% set n.n = [n] %}{% set n.m = {'m': n} %}{{ [n.n, n.m] | string }}", "the filter"),
    "namespaces without end": (
        "{% set n = namespace(x=0) %}{% for i in range(262143) %}{% set n.x = namespace(x=n.x) %}{% endfor %}"
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes"),
    "replace": ("{{ ('a' * 2000000).replace('a', 'b' * 2000000) }}", "characters"),
    "the filter replace": ("{{ ('a' * 2000000) | replace('a', 'b' * 2000000) }}", "characters"),
    "join": ("{{ ('a' * 2000000).join('b' * 2000000) }}", "characters"),
    "the filter join": ("{{ range(99999) | join('b' * 2000000) }}", "characters"),
    "indent": ("{{ ('\n' * 2000000) | indent(1000) }}", "characters"),
    "indent by text": ("{{ ('\n' * 2000000) | indent('x' * 2000000) }}", "characters"),
    "indented JSON": ("{{ range(99999) | list | tojson(indent=1000000000) }}", "unsafe"),
    "JSON separators": ("{{ range(99999) | list | tojson(separators=('a' * 2000000, 'b')) }}", "characters"),
    "a width in %": ("{{ '%1000000000d' % 1 }}", "unsafe"),
    "a width for %": ("{{ '%*d' % (1000000000, 1) }}", "unsafe"),
    "a width in the filter format": ("{{ '%1000000000d' | format(1) }}", "unsafe"),
    "a width in format": ("{{ '{:>1000000000}'.format(1) }}", "unsafe"),
    "a width for format": ("{{ '{:{}}'.format(1, 1000000000) }}", "unsafe"),
    "format many times": ("{{ ('{0}' * 99999).format('a' * 99999) }}", "characters"),
    "rounding": ("{{ 5 | round(-1000000000) }}", "unsafe"),
    "padding": ("{{ 'a'.ljust(1000000000) }}", "attribute 'ljust' of 'str' object is unsafe"),
    "bytes of a number": ("{{ (1).to_bytes(1000000000, 'big') }}", "attribute 'to_bytes'"),
    "adding up lists": ("{{ [[1]] | sum(start=[]) }}", "unsafe"),
    "a list of letters": ("{% set x = ('é' * 4000000) | list %}", "items"),
    "text in a loop in a block": (
        "{% set x %}{% for i in range(99999) %}" + "x" * 20000 + "{% endfor %}{% endset %}", "more"),
    "a value in a loop in a block": (
        LARGE + "{% set x %}{% for i in range(99999) %}{{ b }}{% endfor %}{% endset %}", "more"),
    "a constant in a loop in a block": (
        "{% set x %}{% for i in range(99999) %}{{ '" + "x" * 20000 + "' }}{% endfor %}{% endset %}", "more"),
    "text of a macro": (
        "{% macro f() %}" + "x" * 20000 + "{% endmacro %}{% for i in range(99999) %}{% set y = f() %}{% endfor %}",
        "more"),
    "output": ("{% for i in range(99999) %}" + "x" * 20000 + "{% endfor %}", "characters"),
    "copies": (LARGE + "".join(f"{{% set a{i} = b[1:] %}}" for i in range(100)), "more"),
    "arguments": (LARGE + "{% macro f() %}{{ varargs }}{% endmacro %}{{ f(" + "b," * 500 + ") }}", "characters"),
    "a class": ("{{ ''.__class__.__mro__ }}", "attribute '__class__' of 'str' object is unsafe"),
    "a class by subscript": ("{{ ''['__class__'] }}", "attribute '__class__'"),
    "a class by filter": ("{{ '' | attr('__class__') }}", "No filter named 'attr'"),
    "a class by map": ("{{ [''] | map(attribute='__class__') | list }}", "attribute '__class__'"),
    "a class by format": ("{{ '{0.__class__}'.format(1) }}", "attribute '__class__' of 'int'"),
    "globals of a function": ("{{ raise_exception.__globals__ }}", "attribute '__globals__'"),
    "the environment": ("{{ self._TemplateReference__context.environment }}", "unsafe"),
    "initialisers": ("{{ namespace.__init__.__globals__ }}", "unsafe"),
    "a namespace's insides": ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "unsafe"),
    "changing a message": ("{{ messages.append(1) }}", "attribute 'append' of 'list' object is unsafe"),
    "reading files": ("{% include '/etc/passwd' %}", "loads other templates"),
    "imports": ("{% import 'os' as os %}", "loads other templates"),
    "brackets": ("{{ " + "(" * 15000 + "1" + ")" * 15000 + " }}", "recursion"),
    "ifs in ifs": ("{% if 1 %}" * 1500 + "{% endif %}" * 1500, "recursion"),
    "loops in loops": ("{% for i in [1] %}" * 60 + "{% endfor %}" * 60, "nested blocks"),
    "too long": ("x" * 40000, "40000 characters"),
    "too many parts": ("{{a}}" * 6000, "parts"),
    "no end": ("{% for i in [1] %}", "Unexpected end of template"),
    "not a template": ("{{ 1 +* 2 }}", "unexpected"),
    "an unknown tag": ("{% do [].append(1) %}", "unknown tag 'do'"),
}  # fmt: skip


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_template_is_refused(attack):
    source, message = HOSTILE[attack]
    with pytest.raises(ModelFormatError, match=r"^model\.gguf: tokenizer\.chat_template: found ") as caught:
        encode_chat(tokenizer_with(source), USER)
    assert message in str(caught.value)


@pytest.mark.parametrize("attack", ["no end", "a power"])  # when it is compiled, and when it is rendered
def test_a_callers_template_is_not_blamed_on_the_model(attack):
    source, message = HOSTILE[attack]
    with pytest.raises(ModelFormatError, match=r"^chat template: source: found ") as caught:
        encode_chat(TOKENIZERS["chatml"], USER, template=source)
    assert message in str(caught.value)


NAMESPACES = {
    "in a list": (
        "{% set all = namespace(turns=[]) %}{% for m in messages %}"
        "{% set all.turns = all.turns + [namespace(role=m.role, text=m.content)] %}{% endfor %}"
        "{% for t in all.turns | reverse %}{{ t.role }}: {{ t.text }}{{ '; ' if not loop.last }}{% endfor %}"
        "{{ all.turns | length }}"
    ),
    "in another": (
        "{% set a = namespace(b=namespace(n=1)) %}{% for m in messages %}{% set b = a.b %}{% set b.n = b.n * 3 %}"
        "{% endfor %}{{ a.b.n }}{{ a.b is sameas a.b }}{% if a.b in [a.b] %}!{% endif %}"
    ),
    "in a dict": (
        "{% set state = {'last': namespace(content='')} %}{% for m in messages %}{% set last = state.last %}"
        "{% set last.content = last.content ~ m.content %}{% endfor %}{{ state['last'].content }}"
        "{% for key, value in state.items() %}{{ key }}={{ value.content }}{% endfor %}"
    ),
    "in itself": (
        "{% set n = namespace(x=1) %}{% set n.me = n %}{% set m = n.me.me %}{% set m.x = 2 %}"
        "{{ n.x }}{{ [n, n.me][1].me.x }}"
    ),
    "of a macro": (
        "{% macro add(ns, text) %}{% set ns.text = ns.text ~ text %}{% endmacro %}{% set n = namespace(text='') %}"
        "{% for m in messages %}{{ add(ns=[n][0], text=m.content) }}{% endfor %}{{ n.text }}"
    ),
    "by filters": (
        "{% set l = [namespace(a=1, b='x'), namespace(a=2, b='y')] %}{{ l | map(attribute='b') | join('-') }}"
        "{{ (l | selectattr('a', 'equalto', 2) | first).b }}{{ (l | rejectattr('a', 'equalto', 2) | list | last).b }}"
    ),
}  # fmt: skip


@pytest.mark.parametrize("where", NAMESPACES)
def test_a_namespace_may_be_put_into_another_value(where):
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    expected = rendered_by_jinja(NAMESPACES[where], chat)
    assert expected and render_chat(NAMESPACES[where], chat) == expected


def test_hostile_templates_are_refused_before_they_take_memory():
    """All of them in a process whose address space is limited: none may run into that limit."""
    program = """
import resource
from tests.checkpoint.test_template import HOSTILE, render_chat
def address_space():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = address_space() + (300 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for source, message in HOSTILE.values():
    try:
        render_chat(source, [{"role": "user", "content": "x"}])
    except ValueError as error:
        if message not in str(error):
            print(error)
    else:
        print("accepted:", source[:80])
"""
    if sys.platform != "linux":
        program = program.replace("resource.setrlimit", "str").replace("address_space() +", "")
    assert python("-c", program) == ""


def test_a_long_chat_is_no_attack():
    chat = [{"role": role, "content": "word " * 100} for role in ("user", "assistant")] * 200
    for name in ("chatml", "llama3", "composed", "tools"):
        expected = rendered_by_jinja(
            TEMPLATES[name], chat, tools=None, add_generation_prompt=True, **TOKENIZERS[name].special_tokens
        )
        assert render_chat(TEMPLATES[name], chat, special_tokens=TOKENIZERS[name].special_tokens) == expected
    large = [{"role": "user", "content": "word " * 200_000}]
    assert len(render_chat(LLAMA3, large)) > 999_990


def test_renderings_in_threads_have_budgets_of_their_own():
    def work(n):
        if n % 4 == 0:
            with pytest.raises(ModelFormatError):
                render_chat(HOSTILE["doubling a list"][0], USER)
            return True
        return render_chat(CHATML, USER) == render_chat(CHATML, [*USER])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(12)))
