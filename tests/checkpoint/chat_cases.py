"""Chat templates that go about it in different ways, on a vocabulary whose control tokens are LLaMA-3's."""

from tests.checkpoint.tokenizer_cases import from_metadata, metadata_of

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|eot_id|>system
Be helpful<|eot_id|>
' }}{% endif %}{{'<|start_header_id|>' + message['role'] + '
' + message['content'] + '<|eot_id|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant
' }}{% endif %}"""
LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
STRICT = """{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}{{ bos_token }}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system is defined %}{{- '[IN] ' + system + '\\n\\n' + message['content'] + '[/IN]' }}
        {%- else %}{{- '[IN] ' + message['content'] + '[/IN]' }}{%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token}}
    {%- endif %}
{%- endfor %}"""
COMPOSED = """{% for message in messages %}{{ '<|' ~ {'user': 'start_header', 'assistant': 'end_header'}.get(
message.role, 'start_header') ~ '_id|>' ~ message.role ~ '\\n' ~ message.content ~ eos_token }}{% endfor %}
{{- '<|' + 'start_header' + '_id|>' }}"""
THINKING = """{% for message in messages %}{% set content = message.content %}{% if '</think>' in content %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}<|start_header_id|>{{ message.role }}:
{{- content }}<|eot_id|>{% endfor %}"""
COMPOSED_THINKING = COMPOSED.replace("message.content ~", "message.content.split('</think>')[-1] ~")
LOWER = "{% for message in messages %}<|start_header_id|>{{ message.content | lower }}<|eot_id|>{% endfor %}"
PIECES = "{% for message in messages %}{{ message.content[:-1] }}{{ message.content[-1:] }}{% endfor %}<|eot_id|>"
SQUEEZED = "{% for m in messages %}{{ m.content.replace(' ', '') }}<|eot_id|>{% endfor %}"
TOOLS = """{% macro show(tool) %}{{ tool.function.name }}: {{ tool | tojson(indent=2) }}
{% endmacro %}{% if tools is not none %}{% for tool in tools %}{{ show(tool) }}{% endfor %}{% endif -%}
{% set ns = namespace(found=false, last='') %}{% for message in messages | rejectattr('role', 'equalto', 'system') %}
{%- if message.tool_calls %}{% for call in message.tool_calls %}{{ call.function.arguments | tojson }}{% endfor -%}
{%- set ns.found = true %}{% continue %}{% endif %}{% set ns.last = ns.last ~ message.content[:3] %}
{%- generation %}{{ message.content | trim | replace('a', 'b') }}{% endgeneration %}{% endfor -%}
{{ ns.found }} {{ ns.last }} {{ messages | length }} {{ messages | map(attribute='role') | join(',') }}
{{ '%05.1f' % 2 }} {{ "{0}-{b}".format(1, b=2) }}
{%- if messages[-1].role == 'user' and loop is undefined %} {{ ['x'] + ['y'] }}{% endif %}"""
TEMPLATES = {
    "chatml": CHATML, "llama3": LLAMA3, "strict": STRICT, "composed": COMPOSED, "thinking": THINKING,
    "composed_thinking": COMPOSED_THINKING, "lower": LOWER, "pieces": PIECES, "squeezed": SQUEEZED, "tools": TOOLS,
}  # fmt: skip
USER = [{"role": "user", "content": "Hello, world!"}]


def tokenizer_with(template, name="llama3", **changes):
    return from_metadata(metadata_of(name, **{"tokenizer.chat_template": template}, **changes))


def llama3_with(template):
    tokens = metadata_of("llama3")["tokenizer.ggml.tokens"]
    bos, eos = tokens.index("<|begin_of_text|>"), tokens.index("<|eot_id|>")
    return tokenizer_with(template, bos_token_id=bos, eos_token_id=eos)


TOKENIZERS = {name: llama3_with(template) for name, template in TEMPLATES.items()}
