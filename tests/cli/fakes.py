"""A model that records what the command line asks of it, and answers from a script."""

from types import SimpleNamespace

from ruvllm.checkpoint.reasoning import Piece
from ruvllm.model.perplexity import Perplexity
from ruvllm.streaming import Generation, Timings

ALONE = {"comm": None, "shares": None, "wire": "auto"}
DEFAULTS = {"max_tokens": 256, "temperature": 0.0, "seed": None, "cache": None, "kv": "auto"}


class FakeStream:
    """What `llm.stream` returns: pieces of text, then the result."""

    def __init__(self, pieces, error=None):
        self.pieces = pieces
        self.error = error
        self.result = Generation(
            text="",
            finish_reason="stop",
            timings=Timings(prompt_tokens=7, prompt_seconds=0.25, tokens=26, seconds=2.0),
        )

    def parts(self):
        for piece in self.pieces:
            reasoning = isinstance(piece, Thought)
            if reasoning:
                self.result.reasoning += piece
            else:
                self.result.text += piece
            yield Piece(str(piece), reasoning)
        if self.error is not None:
            raise self.error


class Thought(str):
    """A piece of a FakeStream that is no part of the answer."""


class FakeCache(str):
    """What was asked for, in words; ``max_tokens`` as the length of the words makes a full one."""

    max_tokens = 1000


class FakeLLM:
    """Records what it is asked and answers from a script; the last answer serves ever after."""

    def __init__(self):
        self.config = SimpleNamespace(name="fake", max_position_embeddings=10000)
        self.tokenizer = SimpleNamespace(chat_template="{{ messages }}", named_templates={}, missing=None)
        self.loaded = None
        self.asked = []
        self.answers = [FakeStream(["Hello", " world é"])]

    def load(self, model, **options):
        self.loaded = (model, options)
        return self

    def new_cache(self, max_tokens, kv):
        return FakeCache(f"a cache of {max_tokens} tokens in {kv}")

    def stream(self, prompt, **options):
        self.asked.append((prompt, options))
        if isinstance(self.answers[0], Exception):
            raise self.answers.pop(0)
        if len(self.answers) > 1:
            return self.answers.pop(0)
        return FakeStream(self.answers[0].pieces, self.answers[0].error)

    def perplexity(self, text, **options):
        self.asked.append((text, options))
        return Perplexity(12.345678, 0.5, 2.5, 100, 2, options["context"], 1.25)


def user(text):
    return [{"role": "user", "content": text}]
