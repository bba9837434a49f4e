"""The application: routes and endpoints."""

from __future__ import annotations

import asyncio
import base64
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

from ruvllm.errors import RuvllmError, printable
from ruvllm.serving import requests
from ruvllm.serving.answers import Answers, EventStream, Service
from ruvllm.serving.errors import ApiError, failed, of_request, out_of_time
from ruvllm.serving.fields import parse_body
from ruvllm.serving.guard import Guard, answer, first_of, read_body, until_gone
from ruvllm.serving.metrics import CONTENT_TYPE
from ruvllm.serving.replies import ChatReply, CompletionReply, Reply, model_card
from ruvllm.serving.requests import Call
from ruvllm.serving.settings import Settings

if TYPE_CHECKING:
    from ruvllm.llm import LLM

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
        self.service = Service(llm, settings)
        self.llm, self.settings = llm, settings
        self.worker, self.metrics = self.service.worker, self.service.metrics
        self.started = int(time.time())

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
        answers = Answers(self.service, call, kind)
        try:
            await answers.begin()
            if call.stream:
                return EventStream(answers, deadline)
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
        places = min(len(asked.texts), max(1, self.settings.queue))  # more texts take the whole queue
        self.service.reserve(places)
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
            self.service.open -= places
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
            self.service.most_new_tokens(len(ids))
        return found

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.settings.name:
            shown = printable(name, limit=80)
            message = f"the model {shown} does not exist: this server has {self.settings.name}"
            raise ApiError(message, 404, param="model", code="model_not_found")


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
