"""The worker of a server: texts to embed are computed together with answers, in the same bounded memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from ruvllm.batching.engine import Engine
from ruvllm.llm import LLM
from ruvllm.model.kv_pool import block_bytes
from ruvllm.serving.settings import Settings
from ruvllm.serving.worker import Event, Ticket, Worker

TEXTS = [f"{i} brown foxes" * (1 + i % 4) for i in range(12)]


def run(llm: LLM, use: Callable[[Worker], Coroutine[Any, Any, None]]) -> None:
    """Use a worker for two sequences in four blocks."""
    memory = 4 * block_bytes(llm.config, "f32")
    worker = Worker(llm, Settings("bytes", kv="f32", memory=memory, sequences=2))

    async def started() -> None:
        worker.start(asyncio.get_running_loop())
        try:
            await asyncio.wait_for(use(worker), 60)
        finally:
            worker.close()

    asyncio.run(started())
    assert not worker.answering.engine.prefixes.used  # nothing is lost


def ids_of(llm: LLM, texts: list[str]) -> list[np.ndarray]:
    return [np.array(llm.tokenizer.encode(text)) for text in texts]


def test_texts_are_computed_with_answers(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[Engine, int]] = []
    step = Engine.step

    def counted(self: Engine) -> Any:
        found = step(self)
        passes.append((self, len(self.runs)))
        return found

    monkeypatch.setattr(Engine, "step", counted)

    async def use(worker: Worker) -> None:
        engine = worker.answering.engine
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        ticket = Ticket(0, llm.request("The quick", max_tokens=30, temperature=0.9), events, streams=False)
        await worker.submit([ticket])
        mean, last = await asyncio.gather(
            worker.embed(ids_of(llm, TEXTS), "mean"), worker.embed(ids_of(llm, TEXTS[:5]), "last")
        )
        _, event = await events.get()
        assert max(sequences for used, sequences in passes if used is engine) == 2
        assert event.result is not None
        assert event.result.text == llm.generate("The quick", max_tokens=30, temperature=0.9).text
        np.testing.assert_array_equal(mean, llm.embed(TEXTS, progress=False))
        np.testing.assert_array_equal(last, llm.embed(TEXTS[:5], pooling="last", progress=False))

    run(llm, use)


def test_texts_that_nobody_waits_for_are_given_up(llm: LLM) -> None:
    async def use(worker: Worker) -> None:
        many = asyncio.create_task(worker.embed(ids_of(llm, TEXTS * 1000), "mean"))
        await asyncio.sleep(0.05)
        many.cancel()
        np.testing.assert_array_equal(await worker.embed(ids_of(llm, TEXTS[:1]), "mean"), llm.embed(TEXTS[:1]))
        assert worker.answering.engine.computed_tokens < sum(map(len, TEXTS)) * 1000

    run(llm, use)


def test_an_error_of_a_step_is_told(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(worker: Worker) -> None:
        with monkeypatch.context() as broken:
            broken.setattr(worker.answering.engine, "step", lambda: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                await worker.embed(ids_of(llm, TEXTS), "mean")
        np.testing.assert_array_equal(await worker.embed(ids_of(llm, TEXTS), "mean"), llm.embed(TEXTS))

    run(llm, use)
