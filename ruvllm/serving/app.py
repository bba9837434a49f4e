"""The application: routes, and the life of a request from its body to its last event."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ruvllm.batching.answering import Request as Asked
from ruvllm.errors import ContextFullError, RuvllmError, printable
from ruvllm.serving import requests
from ruvllm.serving.errors import ApiError, failed, of_request, out_of_time, overloaded
from ruvllm.serving.fields import parse_body
from ruvllm.serving.guard import Guard, answer, first_of, read_body, until_gone
from ruvllm.serving.metrics import CONTENT_TYPE, Metrics
from ruvllm.serving.replies import ChatReply, CompletionReply, Reply, model_card
from ruvllm.serving.requests import Call
from ruvllm.serving.settings import Settings
from ruvllm.serving.worker import Event, Ticket, Worker
from ruvllm.streaming import Generation

if TYPE_CHECKING:
    from ruvllm.llm import LLM

_SLOW_READER_SECONDS = 5.0  # after the time limit, in which a client may still read what was sent
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
}  # fmt: skip
_GONE = Response(status_code=499)  # to a client that has gone away


def application(llm: LLM, settings: Settings) -> Starlette:
    """An ASGI application that answers with one model."""
    server = _Server(llm, settings)
    routes = [
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/completions", server.completion, methods=["POST"]),
        Route("/v1/embeddings", server.embedding, methods=["POST"]),
        Route("/v1/models", server.models),
        Route("/health", server.health),
        Route("/metrics", server.metrics_page),
        Route("/", server.page),
    ]
    paths = tuple(route.path for route in routes)
    routes.append(Route("/v1/models/{name:path}", server.model_of_name))
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, settings=settings, metrics=server.metrics, paths=paths)],
        exception_handlers={ApiError: _refused, HTTPException: _no_such_page, Exception: _broken},
        lifespan=server.lifespan,
    )


class _Server:
    """The endpoints. All of this runs in one event loop; the worker computes in its own thread."""

    def __init__(self, llm: LLM, settings: Settings) -> None:
        self.llm, self.settings = llm, settings
        self.worker, self.metrics = Worker(llm, settings), Metrics()
        self.started = int(time.time())
        self.open = 0  # answers that are computed or wait

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """The worker runs as long as the server."""
        self.worker.start(asyncio.get_running_loop())
        try:
            yield
        finally:
            await run_in_threadpool(self.worker.close)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._in_time(request, self._answered(request, requests.chat, ChatReply))

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._in_time(request, self._answered(request, requests.completion, CompletionReply))

    async def embedding(self, request: Request) -> Response:
        """POST /v1/embeddings."""
        return await self._in_time(request, self._embedded(request))

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        card = model_card(self.settings.name, self.started, self.worker.context)
        return JSONResponse({"object": "list", "data": [card]})

    async def model_of_name(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        self._check_model(request.path_params["name"])
        return JSONResponse(model_card(self.settings.name, self.started, self.worker.context))

    async def health(self, request: Request) -> Response:
        """GET /health."""
        alive = self.worker.alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    async def metrics_page(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self.metrics.text(self.worker.answering.engine), media_type=CONTENT_TYPE)

    async def page(self, request: Request) -> Response:
        """GET /: a page to talk to the model."""
        html = resources.files("ruvllm.serving").joinpath("page.html").read_bytes()
        return Response(html, media_type="text/html; charset=utf-8", headers=_PAGE_HEADERS)

    async def _in_time(self, request: Request, work: Awaitable[Response]) -> Response:
        """The response, unless it takes too long or the client goes away before its body is read."""
        try:
            async with asyncio.timeout(self.settings.timeout):
                return await work
        except TimeoutError:
            raise out_of_time(self.settings.timeout) from None
        except ClientDisconnect:
            return _GONE

    async def _answered(
        self, request: Request, parse: Callable[[Any, int], Call], kind: type[Reply]
    ) -> Response:  # fmt: skip
        deadline = time.monotonic() + self.settings.timeout
        body = parse_body(await read_body(request, self.settings.body_bytes))
        call = parse(body, self.settings.most_answers)
        self._check_model(call.model)
        answers = _Answers(self, call, kind)
        try:
            await answers.begin()
            if call.stream:
                return _EventStream(answers, deadline)
            whole = asyncio.create_task(answers.whole())
            gone = asyncio.create_task(until_gone(request.receive))
            await first_of(whole, gone, timeout=self.settings.timeout)
            if whole.cancelled():
                self.metrics.disconnects += 1
                return _GONE
            return JSONResponse(whole.result())
        finally:
            if not call.stream or not answers.begun:
                answers.close()

    async def _embedded(self, request: Request) -> Response:
        asked = requests.embedding(body := parse_body(await read_body(request, self.settings.body_bytes)))
        self._check_model(asked.model)
        self.reserve(1)
        try:
            ids = await run_in_threadpool(self._ids, asked.texts)
            reading = asyncio.create_task(self.worker.embed(ids, asked.pooling))
            gone = asyncio.create_task(until_gone(request.receive))
            await first_of(reading, gone, timeout=self.settings.timeout)
            if reading.cancelled():
                self.metrics.disconnects += 1
                return _GONE
            rows = reading.result()
        except (TypeError, ValueError, RuvllmError) as error:
            raise of_request(error, body) from None
        finally:
            self.open -= 1
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        data = [
            {"object": "embedding", "index": i, "embedding": _encoded(row, asked.as_base64)}
            for i, row in enumerate(rows.astype("<f4"))
        ]
        tokens = sum(map(len, ids))
        self.metrics.prompt_tokens += tokens
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": self.settings.name, "usage": usage})

    def _ids(self, texts: Sequence[Any]) -> list[np.ndarray]:
        found = []
        for text in texts:
            ids = self.llm.tokenizer.encode(text) if isinstance(text, str) else text
            found.append(self.llm.model.checked_ids(ids, "input"))
            self.room(len(ids))
        return found

    def room(self, tokens: int) -> int:
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

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.settings.name:
            shown = printable(name, limit=80)
            message = f"the model {shown} does not exist: this server has {self.settings.name}"
            raise ApiError(message, 404, param="model", code="model_not_found")


class _Answers:
    """The answers to one call: its tickets, from the reservation to the last event."""

    def __init__(self, server: _Server, call: Call, kind: type[Reply]) -> None:
        self.server, self.call, self.kind = server, call, kind
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
        call, server = self.call, self.server
        number = len(call.prompts) * call.n
        server.reserve(number)
        self._reserved = number
        try:
            asked = await run_in_threadpool(self._requests)
            self._tickets = [Ticket(i, one, self._events, call.stream) for i, one in enumerate(asked)]
            await server.worker.submit(self._tickets)
        except (TypeError, ValueError, RuvllmError, ImportError) as error:
            raise of_request(error, call.body) from None
        prompts = [len(one.ids) for one in asked[:: call.n]]
        self._reply = self.kind(call, server.settings.name, server.llm.tokenizer, prompts)
        self.begun = True

    def _requests(self) -> list[Asked]:
        """A request for each answer; samples of one prompt have seeds one after the other, as ``LLM.generate``."""
        call, server = self.call, self.server
        seed = call.options["seed"]
        logprobs = 0 if call.top_logprobs is None else max(1, call.top_logprobs)
        found = []
        for prompt in call.prompts:
            for i in range(call.n):
                own = seed + i if isinstance(seed, int) else seed
                request = server.llm.request(prompt, logprobs=logprobs, **{**call.options, "seed": own})
                room = server.room(len(request.ids))
                request.max_tokens = room if call.max_tokens is None else min(call.max_tokens, room)
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
        """The answers in pieces, and their usage if it was asked for."""
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
            self.server.metrics.answered(result)
        return done

    def close(self) -> None:
        """Give up what has not ended, and make room for others."""
        self.server.worker.cancel(self._tickets)
        self.server.open -= self._reserved
        self._reserved = 0


class _EventStream(Response):
    """Server-sent events of answers, until they end, the client goes away or the time is over."""

    def __init__(self, answers: _Answers, deadline: float) -> None:
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
                self.answers.server.metrics.disconnects += 1
            else:
                talk.result()
        except OSError:  # the connection broke
            self.answers.server.metrics.disconnects += 1
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
            last = _event(out_of_time(self.answers.server.settings.timeout).body)["body"]
        except ApiError as error:
            last = _event(error.body)["body"]
        await send({"type": "http.response.body", "body": last, "more_body": False})


def _event(data: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return {"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True}


def _encoded(row: np.ndarray, as_base64: bool) -> str | list[float]:
    return base64.b64encode(row.tobytes()).decode("ascii") if as_base64 else row.tolist()


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return answer(error)


async def _no_such_page(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {printable(request.url.path, limit=80)}: {error.detail}"
    return answer(ApiError(message, error.status_code, code="not_found", headers=error.headers))


async def _broken(request: Request, error: Exception) -> Response:
    return answer(failed(error))
