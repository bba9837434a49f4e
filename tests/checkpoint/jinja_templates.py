"""Chat templates in the styles of the model families, and their rendering by transformers' Jinja."""

import json
from datetime import datetime
from functools import cache

from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def refuse(message):
    raise TemplateError(message)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def rendered_by_jinja(template, messages, **variables):
    """Its rendering by transformers' environment."""
    return compiled_by_jinja(template).render(**{"messages": messages, "documents": None, **variables})


@cache
def compiled_by_jinja(template):
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(template)


# As Qwen3's: thoughts only after the last question, answers of tools in one turn of the user.
THOUGHTS = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n{\\"name\\": <name>}<|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string
           and not (message.content.startswith('<answer>') and message.content.endswith('</answer>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thoughts = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thoughts) %}
            {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if (loop.first and content) or not loop.first %}{{- '\\n' }}{%- endif %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}{{- '}' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<answer>\\n' + content + '\\n</answer>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

# As GPT-OSS's: macros that call themselves, today's date, thoughts in a channel of their own.
CHANNELS = """{#- types -#}
{%- macro typed(spec, required, nullable=false) -%}
    {%- if spec.type == "array" -%}
        {{- typed(spec['items'], required) + "[]" if spec['items'] else "any[]" }}
        {%- if nullable %}{{- " | null" }}{%- endif -%}
    {%- elif spec.type is defined and spec.type is iterable and spec.type is not string -%}
        {{- spec.type | join(" | ") }}
    {%- elif spec.type == "string" and spec.enum -%}
        {{- '"' + spec.enum | join('" | "') + '"' -}}
    {%- elif spec.type in ["number", "integer"] -%}number
    {%- elif spec.type == "object" and spec.properties -%}
        {{- "{ " -}}
        {%- for name, inner in spec.properties.items() -%}
            {{- name -}}{%- if name not in (spec.required or []) -%}{{- "?" -}}{%- endif -%}
            {{- ": " -}}{{ typed(inner, spec.required or []) }}{%- if not loop.last -%}{{-", " -}}{%- endif -%}
        {%- endfor -%}
        {{- " }" -}}
    {%- else -%}{{- spec.type or "any" -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro listed(space, tools) -%}
    {{- "namespace " + space + " {\\n" }}
    {%- for tool in tools %}
        {%- set tool = tool.function %}
        {{- "// " + tool.description + "\\ntype "+ tool.name + " = " }}
        {%- if tool.parameters and tool.parameters.properties %}
            {{- "(_: {\\n" }}
            {%- for name, spec in tool.parameters.properties | items %}
                {%- if spec.description %}{{- "// " + spec.description + "\\n" }}{%- endif %}
                {{- name }}{{- "" if name in (tool.parameters.required or []) else "?" }}{{- ": " }}
                {{- typed(spec, tool.parameters.required or []) }}
                {%- if spec.default is defined -%}
                    {%- if spec.default is boolean %}, // default: {{ 'true' if spec.default else 'false' }}
                    {%- elif spec.default is number -%}, // default: {{ spec.default }}
                    {%- else %}, // default: "{{ spec.default }}"
                    {%- endif -%}
                {%- endif -%}{{- ",\\n" }}
            {%- endfor %}{{- "}) => any;\\n" }}
        {%- else -%}{{- "() => any;\\n" }}
        {%- endif -%}
    {%- endfor %}
    {{- "}" }}
{%- endmacro -%}
{%- macro system() -%}
    {%- if model_identity is not defined %}{%- set model_identity = "You are a model." %}{%- endif %}
    {{- model_identity + "\\nDate: " + strftime_now("%Y-%m-%d") + "\\n" }}
    {%- if reasoning_effort is not defined %}{%- set reasoning_effort = "medium" %}{%- endif %}
    {{- "Reasoning: " + reasoning_effort }}
{%- endmacro -%}
{{- "<|start|>system<|message|>" }}{{- system() }}{{- "<|end|>" }}
{%- if messages[0].role in ("developer", "system") %}
    {%- set instructions = messages[0].content %}{%- set rest = messages[1:] %}
{%- else %}
    {%- set instructions = "" %}{%- set rest = messages %}
{%- endif %}
{%- if instructions or tools %}
    {{- "<|start|>developer<|message|>" + instructions }}
    {%- if tools -%}{{- listed("functions", tools) }}{%- endif -%}{{- "<|end|>" }}
{%- endif %}
{%- set called = namespace(name=none) %}
{%- for message in rest -%}
    {%- if message.role == 'assistant' -%}
        {%- if "content" in message and "<|message|>" in message.content %}
            {{- raise_exception("messages must not hold channels") }}
        {%- endif %}
        {%- if "tool_calls" in message %}
            {%- set later = namespace(found=false) %}
            {%- for other in rest[loop.index:] %}
                {%- if other.role == 'assistant' and "tool_calls" not in other %}{%- set later.found = true %}
                {%- endif %}
            {%- endfor %}
            {%- set call = message.tool_calls[0].function %}
            {%- if message.thinking and not later.found %}
                {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
            {%- endif %}
            {{- "<|start|>assistant to=functions." + call.name + "<|channel|>commentary json<|message|>" }}
            {{- call.arguments | tojson }}{{- "<|call|>" }}
            {%- set called.name = call.name %}
        {%- else %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content }}
            {{- "<|return|>" if loop.last and not add_generation_prompt else "<|end|>" }}
            {%- set called.name = none %}
        {%- endif %}
    {%- elif message.role == 'tool' -%}
        {%- if called.name is none %}{{- raise_exception("an answer to no call") }}{%- endif %}
        {{- "<|start|>functions." + called.name + "<|message|>" + message.content | tojson + "<|end|>" }}
    {%- else -%}
        {{- "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start|>assistant
{%- endif -%}"""

# As SmolLM3's and Granite's: a mode said in words, tools as Python prints them, documents, settings as JSON.
MODES = """{# ── defaults ── #}
{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{%- set mode = "/think" if enable_thinking else "/no_think" -%}
{%- if messages[0].role == "system" -%}
  {%- set system_message = messages[0].content -%}
  {%- if "/no_think" in system_message -%}{%- set mode = "/no_think" -%}{%- endif -%}
  {%- set own = system_message.replace("/no_think", "").replace("/think", "").rstrip() -%}
{%- endif -%}
{{- "<|im_start|>system\\n" -}}
{%- if "/override" in system_message -%}
  {{- own.replace("/override", "").rstrip() -}}
{%- else -%}
  {%- set today = strftime_now("%d %B %Y") -%}
  {{- "Today: " ~ today ~ "\\nMode: " + mode + "\\n" -}}
  {{- own + "\\n" if own else "You are a model.\\n" -}}
  {%- if xml_tools or tools -%}
    {%- set ns = namespace(text="<tools>\\n") -%}
    {%- for tool in (xml_tools or tools)[:] -%} {# a list #}
      {%- set ns.text = ns.text ~ (tool | string) ~ "\\n" -%}
    {%- endfor -%}
    {{- ns.text + "</tools>\\n" -}}
    {{- tools | tojson(indent=4) }}{{- controls | default({}) | tojson() }}
  {%- endif -%}
{%- endif -%}
{{- "<|im_end|>\\n" -}}
{%- for document in documents or [] %}
    {{- '<|im_start|>document ' ~ loop.index ~ ' of ' ~ loop.length ~ '\\n' + document['text'] | trim }}
    {{- ', ' if not loop.last else '\\n' }}
{%- endfor %}
{%- for message in messages -%}
  {%- set content = message.content if message.content is string else "" -%}
  {%- if message.role == "user" -%}
    {{ "<|im_start|>" + message.role + "\\n"  + content + "<|im_end|>\\n" }}
  {%- elif message.role == "assistant" -%}
    {% generation %}
    {{ "<|im_start|>assistant\\n" + ("" if mode == "/think" else "<think>\\n\\n</think>\\n") + content.lstrip("\\n") }}
    {%- endgeneration %}
    {{- "<|im_end|>\\n" }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{ "<|im_start|>assistant\\n" + ("" if mode == "/think" else "<think>\\n\\n</think>\\n") }}
{%- endif -%}"""

# As Mistral's and Gemma's: turns that must alternate, neighbours, filters on lists, breaks, JSON in all its forms.
TURNS = """{{- bos_token }}
{%- if messages[0]["role"] == "system" %}
    {%- set first = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set asked = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{%- set described %}
  {%- for tool in tools | default([], true) if tool.function.name != "hidden" %}
    {%- set tool = tool.function -%}
    {"type": "function", "function": {
    {%- for key, value in tool.items() if key != "return" %}
        {%- if value is string %}{{- '"' + key + '": "' + value + '"' }}
        {%- else %}{{- '"' + key + '": ' + value | tojson(separators=(',', ':'), sort_keys=true) }}{%- endif %}
        {%- if not loop.last %}, {% endif %}
    {%- endfor -%} }}
  {%- endfor %}
{%- endset %}
{%- for message in loop_messages %}
    {%- if message.role == "assistant" and message.content is not defined %}{%- continue %}{%- endif %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and message == asked[-1] %}
            {{- "[AVAILABLE]" ~ described ~ "[/AVAILABLE]" }}
        {%- endif %}
        {%- set role = "model" if message.role == "assistant" else message.role %}
        {{- '<start>' + role + '\\n' + (first + '\\n\\n' if loop.first and first is defined else '') }}
        {{- message['content'] | trim + '<end>\\n' }}
    {%- elif message.tool_calls %}
        {{- "[CALLS]" }}
        {%- for call in message.tool_calls %}
            {%- set json = call.function | tojson(ensure_ascii=true) %}
            {{- json[:-1] + ', "id": "' + (call.id or "none") | string | upper + '"}' }}
            {%- if loop.index >= 2 %}{%- break %}{%- endif %}
        {%- endfor %}
    {%- elif message.role == "tool" %}
        {%- if loop.previtem and loop.previtem.role != "tool" %}{{- "[RESULTS]" }}{%- endif %}
        {{- {"content": message.content, "call_id": message.tool_call_id} | tojson }}
        {{- "" if loop.nextitem and loop.nextitem.role == "tool" else "[/RESULTS]" }}
    {%- else %}
        {{- "<start>model\\n" + message.content.strip() + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<start>model\\n" }}{%- endif %}"""

FAMILIES = {"thoughts": THOUGHTS, "channels": CHANNELS, "modes": MODES, "turns": TURNS}
