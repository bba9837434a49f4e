"""ManyTexts: what an LLM does with many texts at once."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ruvllm.batching import texts as work
from ruvllm.batching.answering import Answering, Request
from ruvllm.batching.engine import MOST_SEQUENCES, Engine
from ruvllm.compiling import compile_many
from ruvllm.errors import at
from ruvllm.model.kv_size import chosen_kv
from ruvllm.model.llama import Llama
from ruvllm.options import ChatOptions
from ruvllm.prompt import Prompt
from ruvllm.streaming import Generation


class ManyTexts:
    """The methods of ``LLM`` for many texts, which are computed together."""

    model: Llama
    tokenizer: Any
    encoded: Any  # LLM.encoded
    request: Any  # LLM.request

    def answering(
        self, kv: str = "auto", memory: float | str | None = None, sequences: int = MOST_SEQUENCES
    ) -> Answering:  # fmt: skip
        """An engine that answers many requests together, which may come at any time: for servers, agents and samplers.

        Prefixes that prompts share are computed once, also those of answers that have ended.

        Args:
            kv: precision of keys and values: "f32", "f16" or "int8"; "auto" as in ``new_cache``.
            memory: most bytes for keys and values, or a size such as "2GB"; None: for all sequences at the
                model's context length, but at most half of what is free.
            sequences: the most that are computed together; others wait.

        Raises:
            ValueError: an unknown ``kv``, sequences < 1, or too little memory for 256 tokens.
            InsufficientMemoryError: that much memory is not free.
        """
        return Answering(self._engine(kv, memory, sequences), self.tokenizer)

    def generate_many(
        self, prompts: Iterable[Prompt], *, seed: int | Sequence[int | None] | None = 0, kv: str = "auto",
        memory: float | str | None = None, sequences: int = MOST_SEQUENCES, progress: bool | None = None,
        **options: Any,
    ) -> list[Generation]:  # fmt: skip
        """The continuations of many prompts, computed together, in their order.

        Each is bit-identical to ``generate(prompt, ...)``. What prompts share at their beginning is computed once.

        Args:
            prompts: as ``stream`` takes them.
            seed: of each, or one for each prompt.
            kv, memory, sequences: see ``answering``.
            progress: show a bar; None: where stderr is a terminal or a notebook.
            options: those of ``stream``, for all prompts; not ``cache``.

        Raises:
            TypeError, ValueError: as ``stream`` does; those about a prompt begin with its index, as in "prompts[3]".
            ContextFullError: a prompt, with ``max_tokens`` more, does not fit; nothing is computed then.
        """
        requests = _requests(self, prompts, seed, options)
        return work.answers(self.answering(kv, memory, sequences), requests, progress)

    def stream_many(
        self, prompts: Iterable[Prompt], *, seed: int | Sequence[int | None] | None = 0, kv: str = "auto",
        memory: float | str | None = None, sequences: int = MOST_SEQUENCES, **options: Any,
    ) -> Generator[tuple[int, str], None, None]:  # fmt: skip
        """Pieces of the continuations of many prompts as they come: (number of the prompt, text).

        The arguments and errors are those of ``generate_many``. ``close()`` cancels all answers.
        """
        return work.stream(self.answering(kv, memory, sequences), _requests(self, prompts, seed, options))

    def embed(
        self, texts: str | Sequence[str], pooling: str = "mean", memory: float | str | None = None,
        progress: bool | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Embeddings (N, E) float32 of texts, (E,) of one: pooled hidden states after the model's last norm.

        Args:
            texts: one text, or several, which are computed together.
            pooling: "mean" over all tokens of a text, or "last": its last token, which has seen all others.
            memory: see ``answering``.
            progress: show a bar; None: where stderr is a terminal or a notebook.

        Raises:
            TypeError: something else than text.
            ValueError: an unknown pooling, or a text without tokens.
            ContextFullError: a text does not fit into the model's context.
        """
        if not isinstance(texts, Iterable):
            raise TypeError(f"texts: expected strings, found {type(texts).__name__}")
        several = [texts] if isinstance(texts, str) else list(texts)
        ids = []
        for i, text in enumerate(several):
            if not isinstance(text, str):
                raise TypeError(f"texts[{i}]: expected a string, found {type(text).__name__}")
            ids.append(self.model.checked_ids(self.tokenizer.encode(text), f"texts[{i}]"))
        found = work.embeddings(self._engine("auto", memory, MOST_SEQUENCES), ids, pooling, progress)
        return found[0] if isinstance(texts, str) else found

    def score(
        self, prompt: Prompt, continuations: Iterable[str], kv: str = "auto", memory: float | str | None = None,
        progress: bool | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Log-likelihoods (N,) float64 of continuations of a prompt, which is computed once: sum ln p(token | before).

        Prompt and continuation are split into tokens together; of these, those after the prompt's are scored. Where
        both would be one token, each is split by itself.

        Args:
            prompt: as ``stream`` takes it.
            continuations: texts that may follow it.
            kv, memory: see ``answering``.
            progress: show a bar; None: where stderr is a terminal or a notebook.

        Raises:
            TypeError: a continuation that is not text.
            ValueError: an empty prompt or continuation.
            ContextFullError: the prompt with a continuation does not fit.
        """
        single = isinstance(continuations, str) or not isinstance(continuations, Iterable)
        texts = [] if single else list(continuations)
        if single or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"continuations: expected a list of strings, found {continuations!r:.60}")
        ids = self.encoded(prompt).ids
        pairs = [_continued(self, prompt, ids, text, f"continuations[{i}]") for i, text in enumerate(texts)]
        found = work.scores(self._engine(kv, memory, MOST_SEQUENCES), pairs, progress)
        return np.array([sequence.logprobs.sum(dtype=np.float64) for sequence in found], np.float64)

    def _engine(self, kv: str, memory: float | str | None, sequences: int) -> Engine:
        kv = chosen_kv(kv, self.model.layouts)
        engine = Engine(self.model, kv, memory, sequences)
        compile_many(kv)
        return engine


def _continued(llm: ManyTexts, prompt: Prompt, ids: np.ndarray, text: str, name: str) -> tuple[np.ndarray, int]:
    """Tokens of a prompt, whose own are ids, and its continuation, and where the continuation begins."""
    if not text:
        raise ValueError(f"{name}: expected at least one character, found none")
    if isinstance(prompt, str):
        whole = llm.model.checked_ids(llm.tokenizer.encode(prompt + text, parse_special=True), name)
        if len(whole) > 1:  # one token for both has none before it
            return whole, min(len(ids), len(whole) - 1)
    more = llm.tokenizer.encode(text, add_special=False, parse_special=False)
    return np.concatenate([ids, llm.model.checked_ids(more, name)]), len(ids)


def _requests(
    llm: ManyTexts, prompts: Iterable[Prompt], seed: int | Sequence[int | None] | None, options: Mapping[str, Any]
) -> list[Request]:
    """A request for each prompt, with a seed of its own."""
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts: expected several prompts, found {type(prompts).__name__}")
    prompts, options = list(prompts), dict(options)
    if prompts and isinstance(prompts[0], Mapping):
        raise TypeError("prompts: expected several prompts, found the messages of one chat: put them into a list")
    for name in ("cache", "draft"):
        if options.pop(name, None) is not None:
            raise TypeError(f"{name}: only for one text, not for several that are computed together")
    seeds = list(seed) if isinstance(seed, Sequence | np.ndarray) else [seed] * len(prompts)
    if len(seeds) != len(prompts):
        raise ValueError(f"seed: expected one, or {len(prompts)}, one for each prompt, found {len(seeds)}")
    requests, chat = [], ChatOptions.among(options)
    for i, (prompt, own) in enumerate(zip(prompts, seeds, strict=True)):
        with at(f"prompts[{i}]", "prompt"):
            encoded = llm.encoded(prompt, chat)
        requests.append(llm.request(encoded, seed=own, **options))
    return requests
