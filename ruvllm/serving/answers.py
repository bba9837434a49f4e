"""Answers: the life of one request, from its place in the queue to its last event."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ruvllm.batching.answering import Request
from ruvllm.errors import ContextFullError, RuvllmError
from ruvllm.serving.errors import ApiError, failed, of_request, out_of_time, overloaded
from ruvllm.serving.guard import first_of, until_gone
from ruvllm.serving.metrics import Metrics
from ruvllm.serving.replies import Reply
from ruvllm.serving.requests import Call
from ruvllm.serving.settings import Settings
from ruvllm.serving.worker import Event, Ticket, Worker
from ruvllm.streaming import Generation

if TYPE_CHECKING:
    from ruvllm.llm import LLM

_SLOW_READER_SECONDS = 5.0  # after the time limit, in which a client may still read what was sent


class Service:
    """What requests share: the model, the worker, and the places in its queue."""

    def __init__(self, llm: LLM, settings: Settings) -> None:
        self.llm, self.settings = llm, settings
        self.worker, self.metrics = Worker(llm, settings), Metrics()
        self.open = 0  # answers that are computed or wait

    def most_new_tokens(self, tokens: int) -> int:
        """How many tokens can follow so many. Raises ContextFullError where they are too many already."""
        limit = self.worker.context
        if tokens > limit:
            raise ContextFullError(f"context full: the prompt has {tokens} tokens, the server takes {limit}")
        # The last token of an answer need not be computed: it may be one more than the model's context.
        return limit - tokens + (limit == self.llm.config.max_position_embeddings)

    def reserve(self, answers: int) -> None:
        """Count answers as open. Raises ApiError (429) where the queue has no room for them."""
        if self.open + answers > self.settings.most_answers:
            raise overloaded()
        self.open += answers


class Answers:
    """The answers to one call: its tickets, from the reservation to the last event."""

    def __init__(self, service: Service, call: Call, kind: type[Reply]) -> None:
        self.service, self.call, self.kind = service, call, kind
        self.begun = False
        self._reserved = 0
        self._tickets: list[Ticket] = []
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._reply: Reply | None = None

    @property
    def reply(self) -> Reply:
        """What writes the answers."""
        assert self._reply is not None
        return self._reply

    async def begin(self) -> None:
        """Let the worker begin. Raises ApiError where a request cannot be taken."""
        call, service = self.call, self.service
        number = len(call.prompts) * call.n
        service.reserve(number)
        self._reserved = number
        try:
            asked = await run_in_threadpool(self._requests)
            self._tickets = [Ticket(i, one, self._events, call.stream) for i, one in enumerate(asked)]
            await service.worker.submit(self._tickets)
        except (TypeError, ValueError, RuvllmError, ImportError) as error:
            raise of_request(error, call.body) from None
        prompts = [len(one.ids) for one in asked[:: call.n]]
        self._reply = self.kind(call, service.settings.name, service.llm.tokenizer, prompts)
        self.begun = True

    def _requests(self) -> list[Request]:
        """A request for each answer; samples of one prompt have seeds one after the other, as ``LLM.generate``."""
        call, service = self.call, self.service
        seed = call.options["seed"]
        logprobs = 0 if call.top_logprobs is None else max(1, call.top_logprobs)
        found = []
        for prompt in call.prompts:
            for i in range(call.n):
                own = seed + i if isinstance(seed, int) else seed
                request = service.llm.request(prompt, logprobs=logprobs, **{**call.options, "seed": own})
                most = service.most_new_tokens(len(request.ids))
                request.max_tokens = most if call.max_tokens is None else min(call.max_tokens, most)
                if not request.max_tokens:
                    raise ContextFullError(f"context full: the prompt has all {len(request.ids)} tokens of the server")
                found.append(request)
        return found

    async def whole(self) -> dict[str, Any]:
        """The answers, when all have ended."""
        results: list[Generation | None] = [None] * len(self._tickets)
        while None in results:
            number, event = await self._events.get()
            if event.error is not None:
                raise failed(event.error)
            results[number] = event.result
        return self.reply.whole(self._counted(results))

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The answers in pieces, and their usage if the client wants it."""
        reply = self.reply
        for ticket in self._tickets:
            for choice in reply.first(ticket.number):
                yield reply.chunk([choice])
        results: list[Generation | None] = [None] * len(self._tickets)
        while None in results:
            number, event = await self._events.get()
            if event.error is not None:
                raise failed(event.error)
            for choice in reply.deltas(number, event):
                yield reply.chunk([choice])
            results[number] = event.result
        usage = reply.usage(self._counted(results))
        if self.call.usage_in_stream:
            yield reply.chunk([], usage)

    def _counted(self, results: Sequence[Generation | None]) -> list[Generation]:
        done = [result for result in results if result is not None]
        for result in done:
            self.service.metrics.answered(result)
        return done

    def close(self) -> None:
        """Give up what has not ended, and make room for others."""
        self.service.worker.cancel(self._tickets)
        self.service.open -= self._reserved
        self._reserved = 0


class EventStream(Response):
    """Server-sent events of answers, until they end, the client goes away or the time is over."""

    def __init__(self, answers: Answers, deadline: float) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self.answers, self.deadline = answers, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events."""
        left = self.deadline - time.monotonic()
        talk = asyncio.create_task(self._talk(send, left))
        gone = asyncio.create_task(until_gone(receive))
        try:
            await first_of(talk, gone, timeout=left + _SLOW_READER_SECONDS)
            if talk.cancelled():
                self.answers.service.metrics.disconnects += 1
            else:
                talk.result()
        except OSError:  # the connection broke
            self.answers.service.metrics.disconnects += 1
        finally:
            self.answers.close()

    async def _talk(self, send: Send, seconds: float) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with asyncio.timeout(seconds):
                async for chunk in self.answers.chunks():
                    await send(_event(chunk))
                last = b"data: [DONE]\n\n"
        except TimeoutError:
            last = _event(out_of_time(self.answers.service.settings.timeout).body)["body"]
        except ApiError as error:
            last = _event(error.body)["body"]
        await send({"type": "http.response.body", "body": last, "more_body": False})


def _event(data: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return {"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True}
