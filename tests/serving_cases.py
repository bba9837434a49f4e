"""A server on loopback in a thread of the test's process, and samplers that say what a test wants."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import openai

from ruvllm.llm import LLM
from ruvllm.serving.server import listen, make_server
from ruvllm.serving.settings import Settings
from tests.llm_cases import END


@dataclass
class Running:
    """A server that runs: its address, and what is inside it."""

    url: str
    server: Any
    thread: threading.Thread

    def client(self, **options: Any) -> openai.OpenAI:
        """OpenAI's own client of it."""
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})


@contextmanager
def running(llm: LLM, grace: int = 5, **settings: Any) -> Iterator[Running]:
    """A server with these settings; it ends with the block."""
    server = make_server(llm, Settings(**{"name": "bytes", **settings}), grace)
    with listen("127.0.0.1", 0) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        try:
            yield Running(url, server, thread)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def wait_for(true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


class Scripted:
    """A sampler that says a text, byte by byte, and ends."""

    def __init__(self, text: str, pause: Callable[[], object] = lambda: None) -> None:
        self._ids, self._pause = [*text.encode(), END], pause
        self._next = 0

    def choose(self, logits: np.ndarray, ids: np.ndarray) -> int:
        """The next byte."""
        self._pause()
        self._next += 1
        return self._ids[self._next - 1]
