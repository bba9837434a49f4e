"""ruvllm as a model of the LM Evaluation Harness (https://github.com/EleutherAI/lm-evaluation-harness).

    python -m ruvllm.lm_eval --model ruvllm --model_args path=smollm2-135m --tasks arc_easy --limit 100

is the harness's own command line (``lm_eval``) with the model "ruvllm" in it. From Python, importing this module
registers it: ``lm_eval.simple_evaluate(model="ruvllm", model_args="path=smollm2-135m", tasks=[...])``.

Install it with ``pip install 'ruvllm[lm_eval]'``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ruvllm.batching import texts
from ruvllm.batching.engine import MOST_SEQUENCES
from ruvllm.checkpoint.chat import chosen_template, render_chat
from ruvllm.loading import load

_MAX_NEW = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")


@register_model("ruvllm")
class RuvllmLM(LM):
    """Scores and continues the texts of tasks; what they share at their beginning is computed once.

    Args:
        path, weights, threads: see ``ruvllm.load``.
        kv: precision of the KV cache.
        memory_gb: most gigabytes for keys and values; None: see ``LLM.answering``.
        batch_size: sequences computed together; "auto" for the default.
        max_length: tokens of one text; None: the model's context length. Longer ones lose their beginning.
        max_gen_toks: tokens of an answer, where a task does not say.
        max_batch_size, device: of the harness's command line; without effect.
    """

    def __init__(
        self, path: str, weights: str = "auto", threads: int | None = None, kv: str = "auto",
        memory_gb: float | None = None, batch_size: int | str = "auto", max_length: int | None = None,
        max_gen_toks: int = 256, max_batch_size: int | None = None, device: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.llm = load(path, weights=weights, threads=threads)
        limit = self.llm.config.max_position_embeddings
        self.max_length = limit if max_length is None else min(limit, max_length)
        self.max_gen_toks = max_gen_toks
        sequences = int(batch_size) if str(batch_size).isdecimal() and int(batch_size) > 1 else MOST_SEQUENCES
        self.answering = self.llm.answering(kv, None if memory_gb is None else memory_gb * 1e9, sequences)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        tokenizer = self.llm.tokenizer
        found = tokenizer.bos_id if tokenizer.bos_id is not None else next(iter(sorted(tokenizer.eos_ids)), None)
        if found is None:
            raise ValueError("this model has neither a token that begins nor one that ends a text")
        return int(found)

    @property
    def tokenizer_name(self) -> str:
        """What cached requests are told apart by."""
        return str(self.llm.path)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What the harness logs of the template."""
        return "the model's own" if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text, in the model's format."""
        tokenizer = self.llm.tokenizer
        template, _ = chosen_template(tokenizer, None, False)
        named = tokenizer.special_tokens
        return render_chat(template, chat_history, add_generation_prompt=add_generation_prompt, special_tokens=named)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log-likelihood, and whether greedy sampling would give it."""
        pairs = [self._pair(*request.args) for request in requests]
        found = texts.scores(self.answering.engine, pairs, None)
        results = [(float(s.logprobs.sum(dtype=np.float64)), s.greedy) for s in found]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """For each text: the sum of the log-likelihoods of its tokens, in windows of ``max_length``."""
        pairs, owners = [], []
        for i, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self._encode(request.args[0], add_special=False), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            for context, continuation in map(make_disjoint_window, windows):
                pairs.append((np.array([*context, *continuation]), len(context)))
                owners.append(i)
        found = texts.scores(self.answering.engine, pairs, None)
        results = [0.0] * len(requests)
        for i, scored in zip(owners, found, strict=True):
            results[i] += float(scored.logprobs.sum(dtype=np.float64))
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """For each (context, options): the continuation up to one of the strings ``until``."""
        asked = [self._request(*request.args) for request in requests]
        results = [answer.text for answer in texts.answers(self.answering, asked, None)]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, result)
        return results

    def _encode(self, text: str, add_special: bool = True) -> list[int]:
        return list(self.llm.tokenizer.encode(text, add_special=add_special, parse_special=True))

    def _pair(self, context: str, continuation: str) -> tuple[np.ndarray, int]:
        """Tokens of both, and where the continuation begins; as much of the context as fits.

        Spaces at the end of the context belong to the continuation, as in the harness's own models.
        """
        if not context:
            before, whole = [self.prefix_token_id], [self.prefix_token_id, *self._encode(continuation, False)]
        else:
            stripped = context.rstrip()
            before, whole = self._encode(stripped), self._encode(context + continuation)
        start = max(1, min(len(before), len(whole) - 1))
        dropped = max(0, len(whole) - 1 - self.max_length)
        return np.array(whole[dropped:]), max(1, start - dropped)

    def _request(self, context: str, options: dict[str, Any]) -> Any:
        until = options.get("until") or []
        most = next((options[name] for name in _MAX_NEW if options.get(name) is not None), self.max_gen_toks)
        most = max(1, min(int(most), self.max_length - 1))
        sampling = {name: options[name] for name in _SAMPLING if options.get(name) is not None}
        if options.get("do_sample", False) or options.get("temperature", 0):
            sampling["temperature"] = float(options.get("temperature", 1.0))
        ids = self._encode(context)[-(self.max_length - most) :]
        stop = [until] if isinstance(until, str) else [text for text in until if text]
        return self.llm.request(ids, max_tokens=most, stop=stop, **sampling)


def main() -> None:
    """The harness's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
