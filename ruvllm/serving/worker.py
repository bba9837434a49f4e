"""Worker: the one thread that computes. It steps the engine while there is work, and sleeps otherwise."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ruvllm.batching.answering import Job, Request
from ruvllm.batching.sequence import Embedded
from ruvllm.batching.texts import reading
from ruvllm.checkpoint.reasoning import Piece
from ruvllm.serving.settings import Settings
from ruvllm.streaming import Generation

if TYPE_CHECKING:
    from ruvllm.llm import LLM

logger = logging.getLogger(__name__)

Logprob = tuple[int, float, tuple[tuple[int, float], ...]]  # token id, its log-probability, the likeliest ones


@dataclass
class Event:
    """What came of an answer: pieces of text, and at the end the result, or what ended it."""

    pieces: Sequence[Piece] = ()
    logprobs: Sequence[Logprob] = ()
    result: Generation | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Ticket:
    """An answer that a client waits for.

    number: of it, among those of a request. events: where its events go, as (number, event). streams: whether pieces
    are wanted as they come, and not the result alone.
    """

    number: int
    request: Request
    events: asyncio.Queue[tuple[int, Event]]
    streams: bool
    job: Job | None = None
    seen: int = 0  # tokens whose log-probabilities have gone out
    ended: bool = False

    def news(self, pieces: Sequence[Piece]) -> Event | None:
        """What to send after a step; None: nothing."""
        job = self.job
        assert job is not None
        if job.done:
            self.ended = True
        elif not self.streams:
            return None
        known = job.result.logprobs or []
        fresh = [(job.result.ids[i], *known[i]) for i in range(self.seen, len(known))] if self.streams else []
        self.seen += len(fresh)
        if not (pieces or fresh or job.done):
            return None
        return Event(pieces, fresh, job.result if job.done and job.error is None else None, job.error)


@dataclass(eq=False)
class _Reading:
    """Texts to embed. Only some are in the engine at a time, so that answers need not wait for all of them."""

    texts: list[Embedded]
    future: asyncio.Future[np.ndarray]
    begun: int = 0


class Worker:
    """Computes the answers of all clients in a thread of its own.

    Its methods are called from the event loop; what they ask for is done between two steps.
    """

    def __init__(self, llm: LLM, settings: Settings) -> None:
        self.llm, self.settings = llm, settings
        self.answering = llm.answering(settings.kv, settings.memory, settings.sequences)
        whole = llm.config.max_position_embeddings
        self.context = min(self.answering.engine.max_tokens, settings.context or whole)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked: deque[Callable[[], None]] = deque()
        self._tickets: dict[Job, Ticket] = {}
        self._readings: deque[_Reading] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="ruvllm engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to compute for clients of this event loop."""
        self._loop = loop
        self._thread.start()

    def close(self, seconds: float = 10.0) -> None:
        """Give up what is left and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)

    async def submit(self, tickets: Sequence[Ticket]) -> None:
        """Begin to compute answers.

        Raises:
            ContextFullError: one does not fit; none is begun.
        """
        accepted = self._future()

        def begin() -> None:
            jobs: list[Job] = []
            try:
                for ticket in tickets:
                    jobs.append(self.answering.submit(ticket.request))
            except Exception as error:
                for job in jobs:
                    self.answering.cancel(job)
                self._tell(_set_error, accepted, error)
                return
            for ticket, job in zip(tickets, jobs, strict=True):
                ticket.job = job
                self._tickets[job] = ticket
            self._tell(_set_result, accepted, None)

        self._ask(begin)
        await accepted

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Give answers up: their memory is free before the next step."""

        def end() -> None:
            for ticket in tickets:
                if ticket.job is not None and self._tickets.pop(ticket.job, None) is not None:
                    self.answering.cancel(ticket.job)

        self._ask(end)

    async def embed(self, ids: list[np.ndarray], pooling: str) -> np.ndarray:
        """Embeddings (N, E) float32, computed together with answers.

        Raises:
            ContextFullError: a text does not fit.
        """
        asked = _Reading([Embedded(own, pooling) for own in ids], self._future())
        self._ask(lambda: self._readings.append(asked))
        try:
            found: np.ndarray = await asked.future
        except asyncio.CancelledError:
            self._ask(lambda: self._give_up(asked))
            raise
        return found

    def _future(self) -> asyncio.Future[Any]:
        assert self._loop is not None
        return self._loop.create_future()

    def _ask(self, what: Callable[[], None]) -> None:
        with self._changed:
            self._asked.append(what)
            self._changed.notify()

    # What the thread does.

    def _run(self) -> None:
        while self._wait():
            self._listen()
            if self._readings:
                with reading(self.answering.engine):  # not for each step: what is recorded for hooks ends with them
                    while self._readings and not self._closing:
                        self._begin_texts()
                        self._step()
                        self._end_texts()
                        self._listen()
            elif self.answering.busy:
                self._step()

    def _listen(self) -> None:
        while self._asked:
            self._asked.popleft()()

    def _wait(self) -> bool:
        """Sleep until there is something to do. Returns False at the end."""
        with self._changed:
            while not (self._closing or self._asked or self._readings or self.answering.busy):
                self._changed.wait()
            return not self._closing

    def _step(self) -> None:
        try:
            came = self.answering.step()
        except Exception as error:  # not of one answer alone: none can go on
            logger.exception("a step failed")
            for job, ticket in list(self._tickets.items()):
                self.answering.cancel(job)
                self._send([(ticket, Event(error=error))])
            self._tickets.clear()
            for asked in list(self._readings):
                self._give_up(asked, error)
            return
        news = []
        for job, pieces in came:
            ticket = self._tickets[job]
            if job.done:
                del self._tickets[job]
            if (event := ticket.news(pieces)) is not None:
                news.append((ticket, event))
        if news:
            self._send(news)

    def _begin_texts(self) -> None:
        """Let texts join the answers: as many as there are sequences, and others when these have ended."""
        free = self.settings.sequences
        for asked in list(self._readings):
            free -= sum(not text.done for text in asked.texts[: asked.begun])
            try:
                for text in asked.texts[asked.begun : asked.begun + max(0, free)]:
                    self.answering.engine.submit(text)
                    asked.begun, free = asked.begun + 1, free - 1
            except Exception as error:
                self._give_up(asked, error)

    def _end_texts(self) -> None:
        """Tell the requests whose texts are all read."""
        for done in [one for one in self._readings if all(text.done for text in one.texts)]:
            self._readings.remove(done)
            self._tell(_set_result, done.future, np.array([text.pooled for text in done.texts]))

    def _give_up(self, asked: _Reading, error: Exception | None = None) -> None:
        for text in asked.texts:
            self.answering.engine.cancel(text)
        if asked in self._readings:
            self._readings.remove(asked)
        if error is not None:
            self._tell(_set_error, asked.future, error)

    def _send(self, news: list[tuple[Ticket, Event]]) -> None:
        self._tell(_deliver, news)

    def _tell(self, function: Callable[..., None], *args: Any) -> None:
        """Call a function in the event loop."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: nobody waits any longer
            logger.debug("an event came after the end of the server")


def _deliver(news: list[tuple[Ticket, Event]]) -> None:
    for ticket, event in news:
        ticket.events.put_nowait((ticket.number, event))


def _set_result(future: asyncio.Future[Any], value: object) -> None:
    if not future.done():
        future.set_result(value)


def _set_error(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
