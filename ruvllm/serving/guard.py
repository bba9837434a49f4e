"""Guard: refuses requests for another host, without the key, or too large, before anything reads them."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ruvllm.errors import printable
from ruvllm.serving.errors import ApiError
from ruvllm.serving.metrics import Metrics
from ruvllm.serving.settings import Settings

OPEN_PATHS = ("/", "/health")  # no key is needed
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Guard:
    """Refuses requests for other hosts and requests without the key, and counts all of them.

    A page of the web can make its reader's browser send requests to this machine. It cannot read a server that only
    answers to its own names, and it cannot send JSON, since browsers ask first and get no permission.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, paths: tuple[str, ...]) -> None:
        self.app, self.settings, self.metrics, self.paths = app, settings, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests[path, message["status"]] += 1
            await send(message)

        try:
            self._admit(Headers(scope=scope), scope["path"])
        except ApiError as error:
            await answer(error)(scope, receive, counted)
            return
        await self.app(scope, receive, counted)

    def _admit(self, headers: Headers, path: str) -> None:
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.settings.local_only and name.lower() not in _LOCAL_NAMES:
            shown = printable(host, limit=80)
            raise ApiError(f"this server answers to localhost, found {shown}; see --host", 421, code="wrong_host")
        key = self.settings.api_key
        if key is None or path in OPEN_PATHS:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("utf-8"), key.encode("utf-8"))
        if scheme.lower() != "bearer" or not same:
            found = "a wrong one" if given else "none"
            raise ApiError(
                f"an API key is needed as a bearer token, found {found}", 401, code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request of JSON. Raises ApiError where it is not JSON, or has more than ``most`` bytes."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        shown = printable(kind, limit=80) or "none"
        raise ApiError(f"content-type: expected application/json, found {shown}", 415, code="invalid_content_type")
    too_large = ApiError(f"the body has more than {most} bytes", 413, code="body_too_large", headers=_LAST)
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most:
        raise too_large
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > most:
            raise too_large
    return bytes(content)


_LAST: Mapping[str, str] = {"Connection": "close"}  # what follows on this connection was not read


def answer(error: ApiError) -> JSONResponse:
    """An error as a response."""
    return JSONResponse(error.body, error.status, error.headers)


async def until_gone(receive: Receive) -> None:
    """Return when the client has gone away; its body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def first_of(*tasks: asyncio.Task[Any], timeout: float) -> None:
    """Wait until one of these tasks has ended, or for so many seconds; then end them all."""
    try:
        await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
