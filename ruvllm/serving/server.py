"""Run a server: bind its address, answer requests, and at the end let running answers finish within a grace period."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ruvllm.serving.settings import Settings

if TYPE_CHECKING:
    from ruvllm.llm import LLM

logger = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "::1", "localhost")
GRACE_SECONDS = 30  # in which answers may end after SIGTERM or Ctrl-C
_MOST_CONNECTIONS = 512
_KEEP_ALIVE_SECONDS = 15


def make_server(llm: LLM, settings: Settings, grace: int = GRACE_SECONDS) -> Any:
    """A uvicorn.Server; its ``run(sockets=[...])`` answers until ``should_exit`` is set, or a signal comes.

    grace: seconds in which answers may end then.

    Raises:
        ImportError: Starlette or uvicorn is not installed.
    """
    try:
        import uvicorn

        from ruvllm.serving.app import application
    except ImportError as error:
        raise ImportError(f"a server needs pip install 'ruvllm[serve]' ({error})") from None
    config = uvicorn.Config(
        application(llm, settings), lifespan="on", log_config=None, server_header=False, ws="none",
        limit_concurrency=_MOST_CONNECTIONS, timeout_keep_alive=_KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=grace,
    )  # fmt: skip
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes a free one. Raises OSError, which names the address."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=_MOST_CONNECTIONS)
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from None


def serve(
    llm: LLM, settings: Settings, host: str = "127.0.0.1", port: int = 8080,
    ready: Callable[[str], None] = lambda url: None,
) -> None:  # fmt: skip
    """Answer requests until SIGTERM or Ctrl-C. Running answers may end, for 30 seconds; a second Ctrl-C ends all.

    ready: called with the URL before the first request.

    Raises:
        OSError: the address cannot be used.
        ImportError: Starlette or uvicorn is not installed.
    """
    server = make_server(llm, settings)
    with listen(host, port) as listening:
        bound, number = listening.getsockname()[:2]
        ready(f"http://{f'[{bound}]' if ':' in bound else bound}:{number}/")
        before = signal.signal(signal.SIGTERM, lambda number, frame: None)  # uvicorn raises it again at its end
        try:
            with suppress(KeyboardInterrupt):
                asyncio.run(server.serve(sockets=[listening]))
        finally:
            signal.signal(signal.SIGTERM, before)
