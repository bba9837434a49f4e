"""What ``draft="lookup"`` gains, and what a form of the answer costs, in tokens per second.

    python -m benchmarks.guessing [MODEL] [--threads 1] [--rounds 5]

Answers with and without are made by turns; the ratio is the median of those of the rounds. An editing task repeats most
of its prompt, a free answer does not. The schema is compared with the same answer without one, whose first tokens are
prescribed, so that both say the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import ruvllm
from ruvllm.llm import LLM
from ruvllm.structured.constraint import FormConstraint

CODE = '''def area(width, height):
    """The area of a rectangle."""
    return width * height


def perimeter(width, height):
    """The perimeter of a rectangle."""
    return 2 * (width + height)


def diagonal(width, height):
    """The diagonal of a rectangle."""
    return math.sqrt(width * width + height * height)


def describe(width, height):
    """A description of a rectangle."""
    print("area", area(width, height))
    print("perimeter", perimeter(width, height))
    print("diagonal", diagonal(width, height))
'''
TASKS = {
    "editing": f"Repeat this Python file, but rename the argument width to w.\n\n{CODE}",
    "free, short": "Explain in three sentences why the sky is blue.",
    "free, long": "Tell me about the history of Rome and why it fell.",
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "likes": {"type": "array", "items": {}}},
    "required": ["name", "age", "likes"],
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 3, "maxItems": 3}


def speeds(llm: LLM, prompt: str, tokens: int, **options: Any) -> tuple[float, ruvllm.Generation]:
    """Tokens per second of one answer, and the answer."""
    answer = llm.chat([{"role": "user", "content": prompt}], max_tokens=tokens, **options)
    return answer.timings.tokens_per_second, answer


def lookup(llm: LLM, rounds: int, tokens: int) -> None:
    """Each task with and without guesses."""
    for name, prompt in TASKS.items():
        without, ratios = list[float](), list[float]()
        for _ in range(rounds):
            plain, expected = speeds(llm, prompt, tokens)
            guessed, answer = speeds(llm, prompt, tokens, draft="lookup")
            if answer.ids != expected.ids:
                raise AssertionError(f"{name}: guesses changed the text")
            without.append(plain)
            ratios.append(guessed / plain)
        t = answer.timings
        print(
            f"{name:12} {statistics.median(without):7.1f} tok/s  x {statistics.median(ratios):.2f}  "
            f"({min(ratios):.2f} to {max(ratios):.2f}); {t.tokens} tokens in {t.passes} passes, "
            f"{t.accepted} of {t.drafted} guesses right",
            flush=True,
        )


class _Saying:
    """A processor of logits that makes an answer say these tokens."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = iter(ids)

    def __call__(self, _: Any, logits: Any) -> None:
        logits[next(self._ids)] += 1e6


def schema(llm: LLM, rounds: int, tokens: int) -> None:
    """An answer that follows a schema, and the same tokens without one."""
    prompt, ratios = "Invent three people, as JSON.", list[float]()
    for _ in range(rounds):
        followed, answer = speeds(llm, prompt, tokens, schema=SCHEMA)
        plain, _ = speeds(llm, prompt, len(answer.ids), logits_processors=[_Saying(answer.ids)])
        ratios.append(followed / plain)
    print(f"schema       x {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    names, spent, made = ("mask", "advance"), [0.0], 0
    told = {name: getattr(FormConstraint, name) for name in names}

    def timed(name: str) -> Any:
        def call(self: FormConstraint, *arguments: Any) -> None:
            started = time.perf_counter()
            told[name](self, *arguments)
            spent[0] += time.perf_counter() - started

        return call

    try:
        for name in names:
            setattr(FormConstraint, name, timed(name))
        for _ in range(rounds):
            made += speeds(llm, prompt, tokens, schema=SCHEMA)[1].timings.tokens
    finally:
        for name in names:
            setattr(FormConstraint, name, told[name])
    print(f"outside the passes: {1e6 * spent[0] / made:.0f} us a token for masks and what follows them")


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description="What guesses gain, and what a form of the answer costs.")
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--threads", type=int, help="(default: physical cores)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=150, help="of an answer, at most (default: %(default)s)")
    parser.add_argument("--only", choices=("lookup", "schema"), help="one of the two")
    arguments = parser.parse_args()
    llm = ruvllm.load(arguments.model, threads=arguments.threads)
    llm.generate("Hello", max_tokens=3)
    for name, measure in (("lookup", lookup), ("schema", schema)):
        if arguments.only in (None, name):
            measure(llm, arguments.rounds, arguments.tokens)


if __name__ == "__main__":
    main()
