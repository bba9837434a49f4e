"""Metrics in the text format of Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ruvllm.batching.engine import Engine
from ruvllm.streaming import Generation

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """What a server has done, counted in its event loop."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # by path and status
        self.disconnects = 0
        self.answers: Counter[str] = Counter()  # by finish_reason
        self.prompt_tokens = self.reused_tokens = self.tokens = 0
        self.first_token_seconds = self.decoding_seconds = 0.0

    def answered(self, result: Generation) -> None:
        """Count an answer that has ended."""
        times = result.timings
        self.answers[result.finish_reason] += 1
        self.prompt_tokens += times.prompt_tokens
        self.reused_tokens += times.reused_tokens
        self.tokens += times.tokens
        self.first_token_seconds += times.prompt_seconds
        self.decoding_seconds += times.seconds

    def text(self, engine: Engine) -> str:
        """All metrics."""
        return "\n".join(self._lines(engine)) + "\n"

    def _lines(self, engine: Engine) -> Iterator[str]:
        yield from _metric("requests_total", "counter", "HTTP requests by path and status.")
        for (path, status), count in sorted(self.requests.items()):
            yield f'ruvllm_requests_total{{path="{path}",status="{status}"}} {count}'
        yield from _metric("answers_total", "counter", "Answers that ended, by reason.")
        for reason, count in sorted(self.answers.items()):
            yield f'ruvllm_answers_total{{reason="{reason}"}} {count}'
        for name, kind, what, value in (
            ("disconnects_total", "counter", "Clients that went away before their answer ended.", self.disconnects),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens),
            ("reused_tokens_total", "counter", "Of these, found in the cache.", self.reused_tokens),
            ("generated_tokens_total", "counter", "Tokens of answers.", self.tokens),
            ("decoding_seconds_total", "counter", "From first to last tokens, of all answers.", self.decoding_seconds),
            ("preemptions_total", "counter", "Answers that gave their memory back and wait.", engine.preemptions),
            ("running_sequences", "gauge", "Sequences that are computed together.", len(engine.running)),
            ("waiting_sequences", "gauge", "Sequences that wait.", len(engine.waiting)),
            ("kv_bytes", "gauge", "Most bytes of the KV cache.", engine.pool.memory),
            ("kv_bytes_in_use", "gauge", "Of these, bytes of blocks that a sequence uses.", engine.prefixes.used),
        ):
            yield from _metric(name, kind, what)
            yield f"ruvllm_{name} {value}"
        yield from _metric("first_token_seconds", "summary", "From the beginning of an answer to its first token.")
        yield f"ruvllm_first_token_seconds_sum {self.first_token_seconds}"
        yield f"ruvllm_first_token_seconds_count {self.answers.total()}"


def _metric(name: str, kind: str, what: str) -> Iterator[str]:
    yield f"# HELP ruvllm_{name} {what}"
    yield f"# TYPE ruvllm_{name} {kind}"
