"""Answering: text in and text out over an engine; what ``generate_many`` and a server use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ruvllm.batching.engine import Engine
from ruvllm.batching.sequence import Generated, Sequence
from ruvllm.brief import brief
from ruvllm.checkpoint.reasoning import Piece, Separator
from ruvllm.errors import at
from ruvllm.model.sampling.sampler import Sampler
from ruvllm.streaming import Answer, Generation, Timings


@dataclass
class Request:
    """A prompt to answer, and how; made by ``LLM.request``.

    ids: (T,) the prompt. max_tokens: None: until the model ends or its context is full. stop: strings that end the
    text. separator: tells reasoning from the answer, in chats. with_tools: whether the answer may call tools.
    """

    ids: np.ndarray
    sampler: Sampler
    max_tokens: int | None
    logprobs: int
    stop: tuple[str, ...]
    separator: Separator | None
    with_tools: bool = False

    __repr__ = brief


class Job:
    """An answer in the making: ``result`` is the Generation so far, ``done`` whether it has ended."""

    def __init__(self, sequence: Generated, answer: Answer) -> None:
        self.sequence, self.answer = sequence, answer

    @property
    def result(self) -> Generation:
        """The answer so far."""
        return self.answer.result

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.answer.done

    @property
    def error(self) -> Exception | None:
        """What ended it before its time: an error of its own sampler or processors."""
        return self.sequence.error

    def __repr__(self) -> str:
        state = f"ended: {self.result.finish_reason}" if self.done else "running"
        return f"Job({self.result.timings.tokens} tokens, {state})"


class Answering:
    """Answers many requests together: submit them at any time, step, and read the pieces of text that came.

        answering = llm.answering(sequences=16)
        job = answering.submit(llm.request("Once upon a time", max_tokens=40))
        while not job.done:
            for job, pieces in answering.step():
                ...

    One thread at a time may step; a request whose client went away is given up with ``cancel``.
    """

    def __init__(self, engine: Engine, tokenizer: Any) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self._jobs: dict[Sequence, Job] = {}

    @property
    def busy(self) -> bool:
        """Whether an answer is still to be finished."""
        return self.engine.busy

    def submit(self, request: Request) -> Job:
        """Add a request; its answer begins with one of the next steps.

        Raises:
            ContextFullError: the prompt, with ``max_tokens`` more, does not fit; nothing is changed.
            TypeError: something else than what ``LLM.request`` makes.
        """
        if not isinstance(request, Request):
            raise TypeError(f"request: expected what llm.request(...) returns, found {type(request).__name__}")
        limit = self.engine.model.config.max_position_embeddings
        if request.max_tokens is None:
            capacity = most = self.engine.max_tokens
        else:
            capacity, most = min(limit, len(request.ids) + request.max_tokens), request.max_tokens
        sequence = Generated(request.ids, request.sampler, most, capacity, request.logprobs)
        self.engine.submit(sequence)
        timings = Timings(prompt_tokens=len(request.ids))
        job = Job(sequence, Answer(self.tokenizer, timings, request.stop, request.separator, request.with_tools))
        self._jobs[sequence] = job
        return job

    def step(self) -> list[tuple[Job, list[Piece]]]:
        """Compute one pass; returns each answer that got a token or ended, with its new pieces of text."""
        came = []
        for sequence, token in self.engine.step():
            job = self._jobs.get(sequence)
            if job is None:  # a text that is embedded
                continue
            pieces = [] if token is None else list(job.answer.push(token))
            job.result.timings.reused_tokens = sequence.reused_tokens
            if job.done or sequence.done:
                pieces += job.answer.finish()
                self.engine.cancel(sequence)
                del self._jobs[sequence]
            came.append((job, pieces))
        return came

    def cancel(self, job: Job) -> None:
        """Give an answer up: it keeps the text that it has, and its blocks are free for others.

        Its ``finish_reason`` is "cancelled". One that has ended already stays as it is.

        Raises TypeError for something else than what ``submit`` returned.
        """
        if not isinstance(job, Job):
            raise TypeError(f"job: expected what submit(...) returned, found {type(job).__name__}")
        if self._jobs.pop(job.sequence, None) is not None:
            self.engine.cancel(job.sequence)
            job.answer.finish("cancelled")

    def run(self, requests: list[Request]) -> Iterator[tuple[int, Job, list[Piece]]]:
        """Answer requests; yields (number of the request, its job, new pieces), as they come.

        Raises the error that ended an answer before its time. Where the iteration is given up, so are the answers.
        """
        numbers: dict[Job, int] = {}
        try:
            for request in requests:
                with at(f"prompts[{len(numbers)}]"):
                    numbers[self.submit(request)] = len(numbers)
            while any(not job.done for job in numbers):
                for job, pieces in self.step():
                    if job not in numbers:
                        continue
                    if job.error is not None:
                        raise job.error
                    yield numbers[job], job, pieces
        finally:
            for job in numbers:
                if not job.done:
                    self.cancel(job)

    def __repr__(self) -> str:
        return f"Answering({self.engine!r})"
