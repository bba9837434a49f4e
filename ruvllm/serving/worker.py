"""Worker: the one thread that computes. It steps the engine while there is work, and sleeps otherwise."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ruvllm.batching.answering import Job, Request
from ruvllm.batching.texts import embeddings
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
    """Texts to embed, one after the other."""

    ids: list[np.ndarray]
    pooling: str
    future: asyncio.Future[np.ndarray]
    rows: list[np.ndarray] = field(default_factory=list)


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
        self._reader: Any = None  # the engine that embeds, made when it is needed
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
        """Embeddings (N, E) float32, one text after the other, between the steps of answers.

        Raises:
            ContextFullError: a text does not fit.
        """
        reading = _Reading(ids, pooling, self._future())
        self._ask(lambda: self._readings.append(reading))
        found: np.ndarray = await reading.future  # if it is cancelled, what is left is not read
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
            while self._asked:
                self._asked.popleft()()
            if self.answering.busy:
                self._step()
            if self._readings:
                self._read()

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

    def _read(self) -> None:
        """Embed one text."""
        reading = self._readings[0]
        try:
            if not reading.future.cancelled():
                if self._reader is None:
                    self._reader = self.llm.answering(self.settings.kv, sequences=1).engine
                ids = reading.ids[len(reading.rows)]
                reading.rows.append(embeddings(self._reader, [ids], reading.pooling, False)[0])
                if len(reading.rows) < len(reading.ids):
                    return
                self._tell(_set_result, reading.future, np.array(reading.rows))
        except Exception as error:
            self._tell(_set_error, reading.future, error)
        self._readings.popleft()

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
