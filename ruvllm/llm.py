"""LLM: a model with its tokenizer: text in, text out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np

from ruvllm.batching.answering import Request
from ruvllm.batching.facade import ManyTexts
from ruvllm.compiling import compile_cache
from ruvllm.errors import ContextFullError, printable
from ruvllm.learning import Learning
from ruvllm.model.cache_file import load_cache
from ruvllm.model.checks import is_integer
from ruvllm.model.config import ModelConfig
from ruvllm.model.generate import generate, undisturbed
from ruvllm.model.kv_cache import KVCache
from ruvllm.model.llama import Llama
from ruvllm.model.lora import MicroLora
from ruvllm.model.perplexity import Divergence, Perplexity, divergence, perplexity
from ruvllm.model.ranks import ranks_of
from ruvllm.model.sampling.sampler import Sampler
from ruvllm.model.speculation.costs import PassCosts
from ruvllm.model.speculation.draft_model import DraftModel
from ruvllm.model.speculation.lookup import Lookup
from ruvllm.model.speculation.speculate import Drafter, Speculation, speculate
from ruvllm.options import AnswerOptions, ChatOptions
from ruvllm.progress import hidden, tqdm
from ruvllm.prompt import Encoded, Message, Prompt
from ruvllm.streaming import Answer, Generation, Stream, Timings
from ruvllm.tracing.facade import Inspection

if TYPE_CHECKING:
    from ruvllm.checkpoint.reasoning import Separator

DEFAULT_MAX_TOKENS = 256
_THINKING = ("enable_thinking", "thinking")  # names that templates have for it: Qwen3's and SmolLM3's, Granite's
_SCORED_TOKENS = 512  # of one window, by default
_COMPARED_TOKENS = 1000  # of the vocabularies of a model and its draft model
_NO_CHAT_OPTIONS = ChatOptions()
_SLOW_SECONDS = 1.0  # a progress bar appears when something takes longer


def _is_chat(prompt: Prompt) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], dict)


@contextmanager
def _bar(what: str, progress: bool | None) -> Iterator[Callable[[int, int], None]]:
    """A bar of windows, and the function that advances it."""
    with tqdm(desc=what, unit="window", leave=False, delay=_SLOW_SECONDS, disable=hidden(progress)) as bar:

        def advance(done: int, windows: int) -> None:
            bar.total = windows
            bar.update(done - bar.n)

        yield advance


class LLM(ManyTexts, Inspection, Learning):
    """A model and its tokenizer, made by ``ruvllm.load``.

    Several threads may use one LLM at once; each generation has a KV cache of its own unless one is given.
    """

    def __init__(self, model: Llama, tokenizer: Any, path: Path) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.path = path
        self.lora = MicroLora(model)  # the adapters over the model
        self.costs = PassCosts()  # seconds of passes of several tokens, for speculation

    @property
    def config(self) -> ModelConfig:
        """Sizes and variants of the model."""
        return self.model.whole_config

    def follow(self) -> None:
        """On every rank but 0 of a model that is split over ranks: compute this rank's share until rank 0 ends.

        It returns when rank 0 calls ``close`` or its program ends. An error ends all ranks.

        Raises:
            RuntimeError: on rank 0, after rank 0 has closed the model, or where it is not split.
        """
        from ruvllm.model.split import SplitLlama

        if not isinstance(self.model, SplitLlama):
            raise RuntimeError("follow: this model is not split over ranks; see the argument comm of ruvllm.load")
        self.model.follow()

    def close(self) -> None:
        """On rank 0 of a model that is split over ranks: let the others return from ``follow``. Else nothing."""
        from ruvllm.model.split import SplitLlama

        if isinstance(self.model, SplitLlama):
            self.model.end()

    def new_cache(self, max_tokens: int | None = None, kv: str = "auto") -> KVCache:
        """An empty KV cache for ``max_tokens`` (the model's context length if None).

        kv: its precision, "f32", "f16" or "int8"; "auto" is "f32" for a model with float32 weights alone, else "f16".
        """
        cache = self.model.new_cache(self.config.max_position_embeddings if max_tokens is None else max_tokens, kv)
        compile_cache(self.model.layouts, cache.dtype, config=self.model.config)
        return cache

    def load_cache(self, path: str | os.PathLike[str], max_tokens: int | None = None) -> KVCache:
        """The KV cache that ``cache.save(path)`` wrote: a text that need not be computed again.

        Args:
            path: the file.
            max_tokens: of the cache; None: as many as it had.

        Raises:
            FileNotFoundError: there is no such file.
            ModelFormatError: it is unsound or cut off, or was written by another model or with other adapters.
            ValueError: max_tokens is too small for it, or would change the model's rotary embedding.
        """
        cache = load_cache(self.model, path, max_tokens)
        compile_cache(self.model.layouts, cache.dtype, config=self.model.config)
        return cache

    def logits(
        self, ids: Sequence[int] | np.ndarray, cache: KVCache | None = None, last_only: bool = False
    ) -> np.ndarray:
        """Logits of the next token after each of ``ids`` (T,): float32 (T, V), or (V,) after the last one only.

        With ``cache``, ids continue what it holds, and are appended to it.

        Raises:
            ValueError: no ids, or one outside the vocabulary.
            ContextFullError: they do not fit; the cache stays as it was.
        """
        ids = self.model.checked_ids(ids)
        return self.model.forward(ids, self.new_cache(len(ids)) if cache is None else cache, last_only)

    def stream(
        self,
        prompt: Prompt,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        *,
        stop: str | Sequence[str] | None = (),
        logprobs: int = 0,
        cache: KVCache | None = None,
        kv: str = "auto",
        draft: str | LLM | None = None,
        **options: Any,
    ) -> Stream:
        """Pieces of the continuation of ``prompt`` as they are generated; ``Stream.parts`` has the reasoning, too.

        Args:
            prompt: text, token ids, or chat messages ({"role": ..., "content": ...}), which are formatted by
                the model's template, or by ``template``.
            max_tokens: the most tokens; None: until the model ends or its context is full.
            stop: strings that end the text; they are not part of it. The model's files may name more. They do not
                apply to reasoning.
            logprobs: how many alternatives to report at each token (0: no log-probabilities).
            cache: reused if it begins with the same tokens, so that a conversation is not computed again each turn.
            kv: precision of the KV cache if none is given: "f32", "f16" or "int8"; "auto" as in ``new_cache``.
            draft: what guesses the next tokens, so that one pass of the model makes several where they are right; the
                text stays the same. "lookup": the text so far, where it read alike; a smaller LLM of the same
                vocabulary. Guesses are as many as pay, by the time that passes take; ``timings`` counts them.
            options: how tokens are chosen, the fields of ``Sampling``: temperature, top_k, top_p, min_p, typical_p,
                repetition_penalty, presence_penalty, frequency_penalty, repeat_last_n, dry, xtc, mirostat,
                logit_bias, logits_processors, seed; or ``sampling``, a Sampling that holds them. And of chats:

                - template: a chat template (Jinja) in place of the model's, or the name of one that it has.
                - tools: functions that the model may call: Python functions with type hints and a docstring, or JSON
                  schemas as OpenAI has them. The model writes its calls into the text, in its own format, of which
                  ``Generation.tool_calls`` are read; pass them on in the messages, as {"role": "assistant",
                  "tool_calls": [...]}, and their results with the role "tool".
                - enable_thinking: whether a model that can do both thinks before it answers; None: its template's
                  default.
                - template_args: additional variables of the template, such as {"reasoning_effort": "low"}.

                And of the form of the answer, one of these, which need ``pip install 'ruvllm[structured]'``; reasoning
                is free: schema (a JSON schema or pydantic model), regex, grammar (Lark or GBNF), choices (strings).

        Raises:
            TypeError: the prompt is neither text, integers nor messages, or an option is unknown.
            ValueError: an option outside its range, an empty prompt, a template that cannot be used, an option of chats
                with a prompt that is not a chat, or a form that cannot be compiled or followed.
            ContextFullError: the prompt does not fit.
            ImportError: a form is given, and llguidance is not installed.
            RuntimeError: while reading the stream: something else has used ``cache`` since its last token.
        """
        request = self.request(prompt, max_tokens, stop=stop, logprobs=logprobs, **options)
        ids, limit = request.ids, self.config.max_position_embeddings
        if cache is None:
            cache = self.new_cache(min(limit, len(ids) + (limit if max_tokens is None else max_tokens)), kv)
        if not isinstance(cache, KVCache):
            raise TypeError(f"cache: expected a KVCache, found {type(cache).__name__}")
        if kv != "auto" and kv != cache.dtype:
            raise ValueError(f"kv: expected 'auto', or {cache.dtype!r} as the given cache has it, found {kv!r}")
        cache.claim(self.model)
        held = cache.keep_common_prefix(ids, self.model.filling)
        cache.require_free(len(ids) - held)
        timings = Timings(prompt_tokens=len(ids), reused_tokens=held)
        most = cache.max_tokens if max_tokens is None else max_tokens
        if draft is None:
            tokens = generate(self.model, cache, ids[held:], request.sampler, most, logprobs)
        else:
            guessing = Speculation(self._drafter(draft, cache.max_tokens), self.costs, timings)
            tokens = speculate(self.model, cache, ids[held:], request.sampler, most, logprobs, guessing)
        answer = Answer(self.tokenizer, timings, request.stop, request.separator, request.with_tools)
        return Stream(answer, undisturbed(tokens, cache, most))

    def request(
        self, prompt: Prompt | Encoded, max_tokens: int | None = DEFAULT_MAX_TOKENS, *,
        stop: str | Sequence[str] | None = (), logprobs: int = 0, **options: Any,
    ) -> Request:  # fmt: skip
        """A prompt with checked options, for ``Answering.submit``; see ``stream`` for the options and errors."""
        given = AnswerOptions.of(options)
        stop = (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable | None) else tuple(stop or ())
        if any(not isinstance(s, str) or not s for s in stop):
            raise ValueError(f"stop: expected non-empty strings, found {stop!r}")
        stop += tuple(getattr(self.tokenizer, "stop_strings", ()))
        if max_tokens is not None and (not is_integer(max_tokens) or max_tokens < 1):
            raise ValueError(f"max_tokens: expected a positive integer or None, found {max_tokens!r}")
        if not is_integer(logprobs) or not 0 <= logprobs <= self.config.vocab_size:
            raise ValueError(f"logprobs: expected 0 to {self.config.vocab_size}, found {logprobs!r}")
        found = self.encoded(prompt, given.chat)
        sampler = self.sampler(given, found.ids if found.is_chat else None)
        thoughts = self._separator(found.ids, given.chat) if found.is_chat else None
        return Request(found.ids, sampler, max_tokens, logprobs, stop, thoughts, given.chat.tools is not None)

    def encoded(self, prompt: Prompt | Encoded, chat: ChatOptions = _NO_CHAT_OPTIONS) -> Encoded:
        """The tokens of a prompt, for ``request``; its errors are those of ``stream`` that a prompt can cause."""
        if isinstance(prompt, Encoded):
            return prompt
        ids, limit = self._ids(prompt, chat), self.config.max_position_embeddings
        if len(ids) > limit:
            raise ContextFullError(f"context full: the prompt has {len(ids)} tokens, the model takes {limit}")
        return Encoded(ids, _is_chat(prompt))

    def sampler(self, options: AnswerOptions, chat: np.ndarray | None = None) -> Sampler:
        """What chooses the tokens of one sequence.

        chat: token ids of the prompt, if it is a chat: its answer may have to begin with reasoning.

        Raises:
            ValueError: a token id outside the vocabulary, or a form that cannot be compiled or followed.
            ImportError: a form is given, and llguidance is not installed.
        """
        for token in options.sampling.logit_bias:
            if token >= self.config.vocab_size:
                raise ValueError(f"logit_bias: expected token ids up to {self.config.vocab_size - 1}, found {token}")
        constraint = None
        if options.form.name is not None:
            from ruvllm.structured.constraint import constraint_of

            thoughts = None if chat is None else self._separator(chat, options.chat)
            end = None if thoughts is None else thoughts.end_of_reasoning
            constraint = constraint_of(options.form, self.tokenizer, self.config.vocab_size, end)
        return Sampler(options.sampling, self.tokenizer.token_bytes, constraint)

    @overload
    def generate(self, prompt: Prompt, *, n: int, **options: Any) -> list[Generation]: ...

    @overload
    def generate(self, prompt: Prompt, **options: Any) -> Generation: ...

    def generate(self, prompt: Prompt, *, n: int | None = None, **options: Any) -> Generation | list[Generation]:
        """The whole continuation of ``prompt`` at once; the options are those of ``stream``.

        n: a list of so many continuations, computed together as ``generate_many`` does, and the prompt once. Their
        seeds are ``seed``, ``seed + 1`` ...
        """
        if n is not None:
            if not is_integer(n) or n < 1:
                raise ValueError(f"n: expected a positive integer, found {n!r}")
            seed = options.pop("seed", 0)
            seeds = [seed + i if is_integer(seed) else seed for i in range(n)]
            encoded: Any = self.encoded(prompt, ChatOptions.among(options))
            return self.generate_many([encoded] * n, seed=seeds, **options)
        stream = self.stream(prompt, **options)
        for _ in stream:
            pass
        return stream.result

    def chat(self, messages: Sequence[Message], **options: Any) -> Generation:
        """The answer to a conversation, through the model's chat template or ``template=``; options as in ``stream``.

        messages: [{"role": "user", "content": "..."}, ...]; answers of the model may have "tool_calls" and
        "reasoning_content", the ``reasoning`` of a Generation: the template decides which of them the model sees again.
        Raises TypeError for anything else.
        """
        if isinstance(messages, str | Mapping) or not messages or not all(isinstance(m, Mapping) for m in messages):
            raise TypeError(f"messages: expected [{{'role': 'user', 'content': '...'}}, ...], found {messages!r:.60}")
        return self.generate(list(messages), **options)

    def perplexity(
        self, text: str | Sequence[int] | np.ndarray, context: int | None = None, progress: bool | None = None,
        kv: str = "auto", comm: Any = None,
    ) -> Perplexity:  # fmt: skip
        """Perplexity of a text: e^(mean negative log-likelihood); see ``model.perplexity`` for the protocol.

        Args:
            text: text, or token ids (T,).
            context: tokens of one window, of which the second half is scored; None: 512, or the model's context
                if it is shorter.
            progress: show a bar; None: where stderr is a terminal or a notebook.
            kv: precision of the KV cache.
            comm: an MPI communicator (mpi4py) whose ranks have all loaded the whole model and call this with the same
                text: each scores some of the windows, and all get the same result.

        Raises:
            TypeError: ids that are not integers.
            ValueError: a context outside of 4 .. the model's, a text shorter than one window, or an unknown ``kv``.
        """
        ids, bos, nbytes = self._scored(text, kv)
        context = min(_SCORED_TOKENS, self.config.max_position_embeddings) if context is None else context
        with _bar("perplexity", progress) as advance:
            return perplexity(self.model, ids, context, bos, nbytes, advance, kv, ranks_of(comm))

    def divergence(
        self, text: str | Sequence[int] | np.ndarray, baseline: LLM, context: int | None = None,
        progress: bool | None = None, kv: str = "auto",
    ) -> Divergence:  # fmt: skip
        """How far this model's predictions of a text are from another's: mean KL divergence, same top token.

        To see what quantisation costs, load the same file a second time with ``weights="f32"`` and give it as
        ``baseline``. ``kv`` is the precision of this model's KV cache, the baseline's is float32; the other arguments
        are those of ``perplexity``.

        Raises:
            TypeError, ValueError: as perplexity does; also where the vocabularies differ in size.
        """
        ids, bos, nbytes = self._scored(text, kv)
        context = min(_SCORED_TOKENS, self.config.max_position_embeddings) if context is None else context
        with _bar("divergence", progress) as advance:
            return divergence(self.model, baseline.model, ids, context, bos, nbytes, advance, kv)

    def _scored(self, text: str | Sequence[int] | np.ndarray, kv: str) -> tuple[np.ndarray, int | None, int | None]:
        """Token ids of a text, the token that begins each window, the text's bytes; compiles what is needed."""
        compile_cache(self.model.layouts, kv, config=self.model.config)
        bos = self.tokenizer.bos_id if bool(getattr(self.tokenizer, "add_bos", False)) else None
        if not isinstance(text, str):
            return np.asarray(text), bos, None
        ids = self.tokenizer.encode(text, add_special=False, parse_special=False)
        return np.array(ids, np.int64), bos, len(text.encode())

    def _ids(self, prompt: Prompt, chat: ChatOptions = _NO_CHAT_OPTIONS) -> np.ndarray:
        if _is_chat(prompt):
            from ruvllm.checkpoint.chat import encode_chat

            if not isinstance(chat.enable_thinking, bool | None):
                raise ValueError(f"enable_thinking: expected True, False or None, found {chat.enable_thinking!r}")
            if not isinstance(chat.template_args, Mapping | None):
                raise ValueError(f"template_args: expected a dict, found {type(chat.template_args).__name__}")
            thinking = {} if chat.enable_thinking is None else dict.fromkeys(_THINKING, chat.enable_thinking)
            messages, variables = cast("Sequence[Message]", prompt), {**thinking, **(chat.template_args or {})}
            ids: Any = encode_chat(
                self.tokenizer, messages, tools=chat.tools, variables=variables, template=chat.template
            )
            return self.model.checked_ids(ids, "prompt")
        for name in chat.given:
            raise ValueError(f"{name}: only for messages, found a prompt of type {type(prompt).__name__}")
        if isinstance(prompt, str):
            return self.model.checked_ids(self.tokenizer.encode(prompt, parse_special=True), "prompt")
        if isinstance(prompt, Sequence) and len(prompt) and isinstance(prompt[0], str):
            raise TypeError(f"prompt: expected one text, found several, {prompt!r:.60}: see generate_many")
        if isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
            raise TypeError(f"prompt: expected text, token ids or messages, found {prompt!r:.60}")
        return self.model.checked_ids(prompt, "prompt")

    def _drafter(self, draft: str | LLM, max_tokens: int) -> Drafter:
        if isinstance(draft, str) and draft == "lookup":
            return Lookup()
        if not isinstance(draft, LLM):
            raise ValueError(f"draft: expected 'lookup', an LLM or None, found {draft!r:.60}")
        ours, theirs = self.tokenizer, draft.tokenizer
        shared = min(ours.vocab_size, theirs.vocab_size)
        sample = range(0, shared, max(1, shared // _COMPARED_TOKENS))
        if any(ours.token_bytes(i) != theirs.token_bytes(i) for i in sample):
            raise ValueError(f"draft: expected a model of the same vocabulary, found {draft!r}")
        return DraftModel(draft.model, self.config.vocab_size, max_tokens)

    def _separator(self, ids: np.ndarray, chat: ChatOptions) -> Separator:
        from ruvllm.checkpoint.chat import chosen_template
        from ruvllm.checkpoint.reasoning import separator

        template, _ = chosen_template(self.tokenizer, chat.template, chat.tools is not None)
        return separator(self.tokenizer, template, ids.tolist())

    def __repr__(self) -> str:
        return f"LLM({printable(self.path.name)}: {self.model!r})"
