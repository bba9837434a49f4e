"""A server under load: clients that stream chats, against ``generate_many`` with the same prompts.

    python -m benchmarks.serving [MODEL] [--clients 16] [--seconds 120] [--threads N] [--memory 512MB]

``ruvllm serve`` runs as a process of its own. Each client asks, reads its answer to the end and asks again; after so
many seconds it asks no more. No answer ends by itself, so that all have the same number of tokens. A part of the
prompts is answered by ``generate_many`` before and after, with as many sequences at once: it must give the same texts,
and its tokens per second are the measure. The clients run on the same processors as the server.

The server's memory is sampled four times: keys and values fill what ``--memory`` allows, and then it should stay.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import ruvllm
from ruvllm.llm import LLM
from ruvllm.model.checks import parse_size
from ruvllm.prompt import Prompt

TOKENS = 128  # of each answer
WORDS = 5, 200  # of each question, from and to
ROUNDS = 8  # answers of each client that ``generate_many`` repeats
VOCABULARY = "river stone winter engine paper orange signal garden number quiet window market letter silver".split()


@dataclass
class Answer:
    """An answer that a client read: its number, text, tokens, and seconds to the first event and to the end."""

    number: int
    text: str
    tokens: int
    first: float
    whole: float


def question(number: int) -> list[dict[str, str]]:
    """The chat of an answer."""
    rng = np.random.default_rng(number)
    words = rng.choice(VOCABULARY, rng.integers(*WORDS))
    return [{"role": "user", "content": f"{number}: tell a story with {' '.join(words)}"}]


class Server:
    """``ruvllm serve`` on a free port."""

    def __init__(self, model: str, options: list[str]) -> None:
        command = [sys.executable, "-m", "ruvllm", "serve", model, "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        said = ""
        for line in self.process.stderr:
            said += line
            if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
                self.url = found[0]
                return
        raise RuntimeError(f"the server did not start: {said}")

    def resident(self) -> float:
        """MB that its process holds, without mapped files."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) / 1024

    def metric(self, name: str) -> float:
        """A value of its page of metrics."""
        with urllib.request.urlopen(f"{self.url}metrics") as page:
            return float(re.findall(rf"^ruvllm_{name} (\S+)$", page.read().decode(), re.MULTILINE)[0])

    def close(self) -> None:
        """End it."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


class Load:
    """Clients of one server, and what they found."""

    def __init__(self, server: Server, biases: dict[str, int]) -> None:
        self.server, self.biases = server, biases
        self.answers: list[Answer] = []
        self.errors: list[str] = []
        self.memory: list[tuple[float, float]] = []  # seconds since the start, MB
        self.seconds = 0.0

    async def run(self, clients: int, seconds: float) -> None:
        """Ask for so many seconds, and wait for the last answers."""
        limits = httpx.Limits(max_connections=clients)
        start = time.perf_counter()
        async with httpx.AsyncClient(base_url=self.server.url, timeout=300, limits=limits) as http:
            sampling = asyncio.create_task(self._sample(start, seconds))
            numbers = iter(range(10**9))
            await asyncio.gather(*(self._client(http, numbers, start + seconds) for _ in range(clients)))
            self.seconds = time.perf_counter() - start
            await sampling

    async def _sample(self, start: float, seconds: float) -> None:
        for part in (0.25, 0.5, 0.75, 1.0):
            await asyncio.sleep(start + part * seconds - time.perf_counter())
            self.memory.append((part * seconds, self.server.resident()))

    async def _client(self, http: httpx.AsyncClient, numbers: Any, until: float) -> None:
        while time.perf_counter() < until:
            number = next(numbers)
            try:
                self.answers.append(await self._answer(http, number))
            except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
                self.errors.append(f"{number}: {type(error).__name__}: {error}")

    async def _answer(self, http: httpx.AsyncClient, number: int) -> Answer:
        body = {
            "messages": question(number), "max_tokens": TOKENS, "temperature": 0.8, "seed": number, "stream": True,
            "logit_bias": self.biases, "stream_options": {"include_usage": True},
        }  # fmt: skip
        start = time.perf_counter()
        first, content = 0.0, bytearray()
        async with http.stream("POST", "v1/chat/completions", json=body) as response:
            async for piece in response.aiter_raw():
                first = first or time.perf_counter() - start
                content += piece
            if response.status_code != 200:
                raise ValueError(content.decode("utf-8", "replace"))
        whole = time.perf_counter() - start
        events = [event.removeprefix("data: ") for event in content.decode().split("\n\n")]
        if events[-2:] != ["[DONE]", ""]:
            raise ValueError(f"the stream ends with {events[-2:]}")
        chunks = [json.loads(event) for event in events[:-2]]
        if error := next((chunk["error"] for chunk in chunks if "error" in chunk), None):
            raise ValueError(error["message"])
        text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
        return Answer(number, text, chunks[-1]["usage"]["completion_tokens"], first, whole)


def together(llm: LLM, numbers: range, sequences: int, memory: float) -> tuple[float, list[str]]:
    """Tokens per second of ``generate_many`` for these answers, and their texts."""
    prompts: list[Prompt] = [question(number) for number in numbers]
    start = time.perf_counter()
    found = llm.generate_many(
        prompts, seed=numbers, sequences=sequences, memory=memory, max_tokens=TOKENS, temperature=0.8,
        logit_bias=dict.fromkeys(llm.tokenizer.eos_ids, -100), progress=False,
    )  # fmt: skip
    return sum(answer.timings.tokens for answer in found) / (time.perf_counter() - start), [a.text for a in found]


def main() -> None:
    """Print what was measured; the exit status is 1 where an answer failed or differs."""
    parser = argparse.ArgumentParser(description="A server under load, against generate_many.")
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--clients", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=120, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(default: %(default)s)")
    parser.add_argument("--memory", default="512MB", help="of keys and values (default: %(default)s)")
    arguments = parser.parse_args()
    clients, numbers = arguments.clients, range(ROUNDS * arguments.clients)
    memory = parse_size("--memory", arguments.memory)
    llm = ruvllm.load(arguments.model, threads=arguments.threads)
    together(llm, range(clients), clients, memory)
    before, expected = together(llm, numbers, clients, memory)
    options = ["--threads", str(arguments.threads), "--sequences", str(clients), "--memory", arguments.memory]
    server = Server(arguments.model, options)
    try:
        load = Load(server, {str(i): -100 for i in llm.tokenizer.eos_ids})
        asyncio.run(load.run(clients, arguments.seconds))
        left = server.metric("running_sequences") + server.metric("waiting_sequences")
    finally:
        server.close()
    after, _ = together(llm, numbers, clients, memory)
    wrong = sum(t.number in numbers and t.text != expected[t.number] for t in load.answers)
    speed = sum(t.tokens for t in load.answers) / load.seconds
    first, whole = (np.percentile([getattr(t, name) for t in load.answers], (50, 99)) for name in ("first", "whole"))
    print(f"{llm}, {arguments.threads} threads, {clients} clients, {load.seconds:.0f} s")
    print(f"answers            {len(load.answers)}; {len(load.errors)} failed, {wrong} differ, {left:.0f} left over")
    print(f"server             {speed:8.1f} tokens/s")
    print(f"generate_many      {before:8.1f} before, {after:.1f} after: x {2 * speed / (before + after):.3f}")
    print(f"first event        {1e3 * first[0]:8.0f} ms, the slowest hundredth {1e3 * first[1]:.0f} ms")
    print(f"answer             {whole[0]:8.2f} s, the slowest hundredth {whole[1]:.2f} s")
    print("memory             " + ", ".join(f"{mb:.1f} MB after {at:.0f} s" for at, mb in load.memory))
    for error in load.errors[:10]:
        print(error)
    sys.exit(bool(load.errors or wrong or left))


if __name__ == "__main__":
    main()
