"""Answers as OpenAI writes them: whole ones, and the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import ruvllm
from ruvllm.serving.requests import Call
from ruvllm.serving.tool_texts import Shown, content_without_calls, numbered
from ruvllm.serving.worker import Event, Logprob
from ruvllm.streaming import Generation

JSON = dict[str, Any]


@dataclass
class Reply(ABC):
    """The answers to one request; chats and completions differ in ``first``, ``deltas`` and ``_choice``.

    prompts: numbers of tokens of the prompts.
    """

    call: Call
    model: str
    tokenizer: Any
    prompts: Sequence[int]
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    prefix: ClassVar[str]
    whole_kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def whole(self, results: Sequence[Generation]) -> JSON:
        """The answer to a request that does not stream."""
        choices = [self._choice(i, result) for i, result in enumerate(results)]
        return {**self._head(self.whole_kind), "choices": choices, "usage": self.usage(results)}

    def usage(self, results: Sequence[Generation]) -> JSON:
        """Tokens; a prompt that is answered several times counts once."""
        prompt = sum(self.prompts)
        made = sum(result.timings.tokens for result in results)
        reused = sum(result.timings.reused_tokens for result in results[:: self.call.n])
        return {
            "prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": reused},
        }  # fmt: skip

    def chunk(self, choices: list[JSON], usage: JSON | None = None) -> JSON:
        """One event of a stream."""
        told = {"usage": usage} if self.call.usage_in_stream else {}
        return {**self._head(self.chunk_kind), "choices": choices, **told}

    @abstractmethod
    def first(self, number: int) -> list[JSON]:
        """The chunks before the first token of an answer."""

    @abstractmethod
    def deltas(self, number: int, event: Event) -> list[JSON]:
        """The chunks that an event makes."""

    @abstractmethod
    def _choice(self, number: int, result: Generation) -> JSON: ...

    def _head(self, kind: str) -> JSON:
        return {
            "id": f"{self.prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model,
            "system_fingerprint": f"ruvllm-{ruvllm.__version__}",
        }  # fmt: skip

    def _logprobs_of(self, result: Generation) -> list[Logprob]:
        return [(i, *known) for i, known in zip(result.ids, result.logprobs or [], strict=True)]

    def _text_of(self, token: int) -> str:
        return str(self.tokenizer.token_bytes(token).decode("utf-8", "replace"))


@dataclass
class ChatReply(Reply):
    """Answers to /v1/chat/completions."""

    _shown: dict[int, Shown] = field(default_factory=dict)  # by number of the answer

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self, number: int) -> list[JSON]:
        """Whose answer it is."""
        return [self._delta(number, {"role": "assistant", "content": ""})]

    def deltas(self, number: int, event: Event) -> list[JSON]:
        """Text, reasoning and, at the end, calls of tools."""
        text = "".join(piece.text for piece in event.pieces if not piece.reasoning)
        thoughts = "".join(piece.text for piece in event.pieces if piece.reasoning)
        result = event.result
        if self.call.with_tools:
            shown = self._shown.setdefault(number, Shown())
            text = shown.push(text)
            if result is not None:
                text += shown.finish(result.tool_calls)
        delta: JSON = {}
        if thoughts:
            delta["reasoning_content"] = thoughts
        if text:
            delta["content"] = text
        logprobs = self._logprobs(event.logprobs) if event.logprobs else None
        chunks = [self._delta(number, delta, logprobs=logprobs)] if delta or logprobs else []
        if result is not None:
            calls = [{"index": i, **call} for i, call in enumerate(numbered(result.tool_calls))]
            if calls:
                chunks.append(self._delta(number, {"tool_calls": calls}))
            chunks.append(self._delta(number, {}, _reason(result)))
        return chunks

    def _delta(self, number: int, delta: JSON, reason: str | None = None, logprobs: JSON | None = None) -> JSON:
        return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _choice(self, number: int, result: Generation) -> JSON:
        content = content_without_calls(result.text, result.tool_calls)
        message: JSON = {"role": "assistant", "content": content, "refusal": None}
        if result.reasoning:
            message["reasoning_content"] = result.reasoning
        if result.tool_calls:
            message["tool_calls"] = numbered(result.tool_calls)
        told = self.call.top_logprobs is not None
        logprobs = self._logprobs(self._logprobs_of(result)) if told else None
        return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": _reason(result)}

    def _logprobs(self, tokens: Sequence[Logprob]) -> JSON:
        most = self.call.top_logprobs or 0
        content = []
        for token, logprob, likeliest in tokens:
            top = [self._entry(i, value) for i, value in likeliest[:most]]
            content.append({**self._entry(token, logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> JSON:
        return {
            "token": self._text_of(token), "logprob": _finite(logprob),
            "bytes": list(self.tokenizer.token_bytes(token)),
        }  # fmt: skip


@dataclass
class CompletionReply(Reply):
    """Answers to /v1/completions."""

    _lengths: dict[int, int] = field(default_factory=dict)  # characters of tokens that are out, by number of the answer

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def first(self, number: int) -> list[JSON]:
        """The prompt, if it is to be part of the answer."""
        return [self._piece(number, self._echoed(number))] if self.call.echo else []

    def deltas(self, number: int, event: Event) -> list[JSON]:
        """Text, and why it ended."""
        text = "".join(piece.text for piece in event.pieces)
        logprobs = self._logprobs(number, event.logprobs) if event.logprobs else None
        reason = None if event.result is None else event.result.finish_reason
        return [self._piece(number, text, reason, logprobs)] if text or logprobs or reason else []

    def _piece(self, number: int, text: str, reason: str | None = None, logprobs: JSON | None = None) -> JSON:
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _choice(self, number: int, result: Generation) -> JSON:
        told = self.call.top_logprobs is not None
        logprobs = self._logprobs(number, self._logprobs_of(result)) if told else None
        text = self._echoed(number) + result.text if self.call.echo else result.text
        return self._piece(number, text, result.finish_reason, logprobs)

    def _echoed(self, number: int) -> str:
        return str(self.call.prompts[number // self.call.n])

    def _logprobs(self, number: int, tokens: Sequence[Logprob]) -> JSON:
        texts = [self._text_of(token) for token, _, _ in tokens]
        offsets, length = [], self._lengths.get(number, 0)
        for text in texts:
            offsets.append(length)
            length += len(text)
        self._lengths[number] = length
        most = self.call.top_logprobs or 0
        top = [{self._text_of(i): _finite(value) for i, value in likeliest[:most]} for _, _, likeliest in tokens]
        values = [_finite(logprob) for _, logprob, _ in tokens]
        shown = top if most else None
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": shown, "text_offset": offsets}


def _reason(result: Generation) -> str:
    return "tool_calls" if result.tool_calls else result.finish_reason


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what cannot come."""
    return max(float(logprob), -9999.0)


def model_card(name: str, created: int, context: int) -> Mapping[str, Any]:
    """A model, as /v1/models lists it."""
    return {"id": name, "object": "model", "created": created, "owned_by": "ruvllm", "context_length": context}
