"""Bodies of requests, and what they ask of the library: chats, completions, embeddings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ruvllm.model.checks import is_integer
from ruvllm.serving.fields import Fields, unsupported, wrong

# Fields that clients send to OpenAI's own service and that change nothing of an answer here.
_WITHOUT_EFFECT = (
    "user", "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "prediction", "verbosity",
)  # fmt: skip
# Fields that go to the library by the same names.
_SAMPLING = (
    "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "top_k", "min_p", "typical_p",
    "repetition_penalty", "repeat_last_n", "dry", "xtc", "mirostat",
)  # fmt: skip
_FORMS = ("regex", "grammar", "choices")
_MOST_TOP_LOGPROBS = 20
_MOST_STOPS = 64
_MOST_TEXTS = 2048
_USUAL_COMPLETION_TOKENS = 16  # as OpenAI has it


@dataclass
class Call:
    """What a client wants.

    prompts: texts, token ids or messages. max_tokens: None: until the model ends. options: those of ``LLM.request``.
    top_logprobs: alternatives at each token; None: no log-probabilities.
    """

    prompts: list[Any]
    model: str | None
    n: int
    max_tokens: int | None
    options: dict[str, Any]
    top_logprobs: int | None
    stream: bool
    usage_in_stream: bool
    echo: bool = False
    body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def with_tools(self) -> bool:
        """Whether the answer may call tools."""
        return "tools" in self.options


@dataclass
class Embedding:
    """Texts, or their token ids, to embed."""

    texts: list[Any]
    model: str | None
    pooling: str
    as_base64: bool


def chat(body: Mapping[str, Any], most: int) -> Call:
    """A request to /v1/chat/completions; ``most``: answers that it may ask for. Raises ApiError."""
    fields = Fields(body)
    messages = fields.expect("messages", None, _is_messages, "a list of messages, with at least one")
    if messages is None:
        raise wrong("messages", "a list of messages", None)
    limit = fields.integer("max_tokens", None, 1, 2**31)
    limit = fields.integer("max_completion_tokens", limit, 1, 2**31)
    wanted = fields.flag("logprobs")
    top = fields.integer("top_logprobs", None, 0, _MOST_TOP_LOGPROBS)
    if top is not None and not wanted:
        raise wrong("top_logprobs", "logprobs to be true where it is given", top)
    options = {**_tools(fields), **_template(fields)}
    options |= _chat_format(fields, with_tools="tools" in options)
    fields.expect("modalities", None, lambda v: v == ["text"], '["text"]')
    return _call(fields, most, [[_message(m) for m in messages]], limit, (top or 0) if wanted else None, options)


def completion(body: Mapping[str, Any], most: int) -> Call:
    """A request to /v1/completions; ``most``: answers that it may ask for. Raises ApiError."""
    fields = Fields(body)
    prompts = _texts(fields, "prompt", most)
    limit = fields.integer("max_tokens", _USUAL_COMPLETION_TOKENS, 1, 2**31)
    top = fields.integer("logprobs", None, 0, _MOST_TOP_LOGPROBS)
    echo = fields.flag("echo")
    if echo and top is not None:
        raise unsupported("echo", "not together with logprobs")
    if echo and not all(isinstance(prompt, str) for prompt in prompts):
        raise unsupported("echo", "only for prompts that are text")
    best_of = fields.integer("best_of", None, 1, 128)
    if best_of is not None and best_of != body.get("n", 1):
        raise unsupported("best_of", "only the value of n is supported")
    if fields.take("suffix"):
        raise unsupported("suffix", "text cannot be inserted before a suffix")
    call = _call(fields, most, prompts, limit, top, {})
    call.echo = echo
    return call


def embedding(body: Mapping[str, Any]) -> Embedding:
    """A request to /v1/embeddings. Raises ApiError."""
    fields = Fields(body)
    texts = _texts(fields, "input", _MOST_TEXTS)
    kinds = ("float", "base64")
    kind = fields.expect("encoding_format", "float", lambda v: v in kinds, " or ".join(kinds))
    pooling = fields.expect("pooling", "mean", lambda v: v in ("mean", "last"), "mean or last")
    if fields.take("dimensions") is not None:
        raise unsupported("dimensions", "embeddings have the model's own length")
    model = fields.expect("model", None, lambda v: isinstance(v, str), "the name of a model")
    fields.take("user")
    fields.refuse_rest()
    return Embedding(texts, model, pooling, kind == "base64")


def _call(
    fields: Fields, most: int, prompts: list[Any], limit: int | None, top: int | None, options: dict[str, Any]
) -> Call:
    """What chats and completions have in common."""
    n = fields.integer("n", 1, 1, max(1, most // len(prompts)))
    assert n is not None
    options |= {"temperature": 1.0, "seed": None}  # as OpenAI has them
    options |= {name: value for name in _SAMPLING if (value := fields.take(name)) is not None}
    forms = {name: value for name in _FORMS if (value := fields.take(name)) is not None}
    if forms and "tools" in options:
        raise unsupported(next(iter(forms)), "not together with tools")
    options |= forms
    options["stop"] = fields.expect("stop", (), _is_stop, f"a string, or at most {_MOST_STOPS}")
    bias = fields.expect("logit_bias", None, lambda v: isinstance(v, dict), "an object of token ids and numbers")
    if bias:
        options["logit_bias"] = _bias(bias)
    model = fields.expect("model", None, lambda v: isinstance(v, str), "the name of a model")
    stream = fields.flag("stream")
    told = fields.expect("stream_options", {}, lambda v: isinstance(v, dict) and stream, "an object, with stream: true")
    for name in _WITHOUT_EFFECT:
        fields.take(name)
    fields.refuse_rest()
    usage = told.get("include_usage", False) is True
    return Call(prompts, model, n, limit, options, top, stream, usage, body=fields.body)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(message, dict) for message in value)


def _is_stop(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list) and len(texts) <= _MOST_STOPS and all(isinstance(t, str) and t for t in texts)


def _bias(given: dict[str, Any]) -> dict[int, Any]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError:
        raise wrong("logit_bias", "token ids as keys", given) from None


def _message(given: dict[str, Any]) -> dict[str, Any]:
    """A message as templates take it: the arguments of calls are objects, not JSON text."""
    calls = given.get("tool_calls")
    if not isinstance(calls, list):
        return given
    return {**given, "tool_calls": [_tool_call(call) for call in calls]}


def _tool_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(fields: Fields) -> dict[str, Any]:
    """The tools that the model may call, unless tool_choice forbids it."""
    tools = fields.expect("tools", None, lambda v: isinstance(v, list) and all(map(_is_tool, v)), "a list of functions")
    choice = fields.take("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise unsupported("tool_choice", 'only "auto" and "none" are supported: a call cannot be forced')
    return {"tools": tools} if tools and choice == "auto" else {}


def _is_tool(value: Any) -> bool:
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _chat_format(fields: Fields, with_tools: bool) -> dict[str, Any]:
    """The form of an answer."""
    given = fields.expect("response_format", {"type": "text"}, lambda v: isinstance(v, dict), "an object")
    kind = given.get("type")
    if kind == "text":
        return {}
    if kind == "json_object":
        schema: Any = {"type": "object"}
    elif kind == "json_schema":
        named = given.get("json_schema")
        schema = named.get("schema") if isinstance(named, dict) else None
        if not isinstance(schema, dict | bool):
            raise wrong("response_format", 'json_schema: {"name": ..., "schema": {...}}', given)
    else:
        raise wrong("response_format", "a type of text, json_object or json_schema", given)
    if with_tools:
        raise unsupported("response_format", "not together with tools")
    return {"schema": schema}


def _template(fields: Fields) -> dict[str, Any]:
    """Variables of the chat template."""
    variables = dict(fields.expect("chat_template_kwargs", {}, lambda v: isinstance(v, dict), "an object"))
    effort = fields.expect("reasoning_effort", None, lambda v: isinstance(v, str), "a string")
    options: dict[str, Any] = {}
    if effort is not None:
        variables.setdefault("reasoning_effort", effort)
    if "enable_thinking" in variables:  # which has another name in some templates
        options["enable_thinking"] = variables.pop("enable_thinking")
    return {**options, "template_args": variables} if variables else options


def _texts(fields: Fields, name: str, most: int) -> list[Any]:
    """A text, several, token ids, or several lists of them."""
    value = fields.take(name)
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if isinstance(value, list) and 0 < len(value) <= most:
        if all(isinstance(text, str) for text in value) or all(map(_is_ids, value)):
            return value
    raise wrong(name, f"a text, token ids, or at most {most} of them", value)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(is_integer(i) for i in value)
