"""What an LLM does with many texts at once: answers, embeddings, scores; each over an engine of its own."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

import ruvllm.kernels as K
from ruvllm.batching.answering import Answering, Request
from ruvllm.batching.engine import Engine
from ruvllm.batching.sequence import Embedded, Scored
from ruvllm.model.hooks import recording
from ruvllm.model.llama import Llama
from ruvllm.model.names import Point
from ruvllm.progress import tqdm
from ruvllm.streaming import Generation

POOLINGS = ("mean", "last")
_SLOW_SECONDS = 1.0  # a progress bar appears when something takes longer


@contextmanager
def bar(what: str, unit: str, total: int, progress: bool | None) -> Iterator[Any]:
    """A progress bar; None: where stderr is a terminal or a notebook, if it takes longer than a second."""
    hidden = None if progress is None else not progress
    with tqdm(total=total, desc=what, unit=unit, leave=False, delay=_SLOW_SECONDS, disable=hidden) as shown:
        yield shown


def answers(answering: Answering, requests: list[Request], progress: bool | None) -> list[Generation]:
    """The answers to all requests, in their order."""
    results: list[Generation] = [Generation()] * len(requests)
    with bar("answers", "answer", len(requests), progress) as shown:
        tokens = 0
        for i, job, _ in answering.run(requests):
            results[i] = job.result
            tokens += 1
            if job.done:
                seconds = max(shown.format_dict["elapsed"], 1e-9)
                shown.set_postfix_str(f"{tokens / seconds:.0f} tokens/s", refresh=False)
                shown.update()
    return results


def stream(answering: Answering, requests: list[Request]) -> Generator[tuple[int, str], None, None]:
    """Pieces of all answers as they come: (number of the request, text without reasoning)."""
    for i, _, pieces in answering.run(requests):
        for piece in pieces:
            if not piece.reasoning:
                yield i, piece.text


def scores(engine: Engine, texts: Sequence[tuple[np.ndarray, int]], progress: bool | None) -> list[Scored]:
    """For each (ids, start) the log-probabilities of the tokens from ``start`` on; what begins alike is computed once.

    Raises:
        ContextFullError: a text does not fit; nothing is computed.
        ValueError: the logits hold NaN.
    """
    sequences = [Scored(ids, start) for ids, start in texts]
    _compute(engine, sequences, "scoring", progress)
    return sequences


def embeddings(engine: Engine, texts: Sequence[np.ndarray], pooling: str, progress: bool | None) -> np.ndarray:
    """(N, E) float32: of each text the mean of the model's last hidden states (after its last norm), or the last one.

    Raises:
        ContextFullError: a text does not fit; nothing is computed.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, found {pooling!r}")
    sequences = [Embedded(ids, pooling) for ids in texts]
    with reading(engine):
        _compute(engine, sequences, "embedding", progress)
    found = np.array([sequence.pooled for sequence in sequences], np.float32)
    return found.reshape(len(sequences), engine.model.config.hidden_size)


def reading(engine: Engine) -> AbstractContextManager[None]:
    """Inside the block ``Embedded`` sequences get their hidden states in this thread's passes."""
    return recording(engine.model, _Reader(engine))


def _compute(engine: Engine, sequences: Sequence[Any], what: str, progress: bool | None) -> None:
    """Run sequences to their end."""
    with bar(what, "text", len(sequences), progress) as shown:
        try:
            for sequence in sequences:
                engine.submit(sequence)
            while engine.busy:
                for done in engine.step():
                    if done.sequence.error is not None:
                        raise done.sequence.error
                    shown.update()
        finally:
            for sequence in sequences:
                engine.cancel(sequence)


class _Reader:
    """Hands hidden states to the sequences that they are of: a ``Recording`` of the residual stream."""

    def __init__(self, engine: Engine) -> None:
        self.edits: list[Any] = []
        self.engine = engine

    def wants(self, point: Point) -> bool:
        """The residual stream after the last layer, of all tokens."""
        return point.name == "final.residual"

    def begin(self, cache: object, ids: np.ndarray) -> None:
        """Nothing: the engine knows whose tokens a pass has."""

    def see(self, point: Point, x: np.ndarray) -> None:
        """x (T, E) of one pass."""
        row = 0
        for sequence, tokens in self.engine.runs:
            if isinstance(sequence, Embedded):
                sequence.read(last_norm(self.engine.model, x[row : row + tokens]))
            row += tokens


def last_norm(model: Llama, x: np.ndarray) -> np.ndarray:
    """The model's last hidden states of a residual stream (T, E): after the norm before its head."""
    return K.rms_norm(np.ascontiguousarray(x), model.decoder.norm, model.decoder.eps)
