"""Does decoding slow down when NumPy's BLAS (or PyTorch) has threads of its own in the same process?

    python -m benchmarks.other_threads [--model smollm2-135m] [--tokens 48] [--rounds 7]

Rounds are interleaved: decoding alone; decoding where BLAS multiplies matrices between the tokens, on all its threads,
which then wait, perhaps spinning, while ours run; and the same with PyTorch, if it is installed. Only the decoding is
timed. A ratio near 1 means that the threads do not disturb each other. OpenBLAS's threads spin for
2^OPENBLAS_THREAD_TIMEOUT clock ticks, a variable that NumPy reads at import. Here NumPy is imported first, as in most
programs, so the exponent is 26 or 28; a program that imports ruvllm first behaves as with OPENBLAS_THREAD_TIMEOUT=18.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable

import numpy as np

import ruvllm
from ruvllm.llm import LLM

REST_SECONDS = 0.5  # before each round, until the threads of the last one stop spinning


def seconds_per_token(llm: LLM, tokens: int, between: Callable[[], object]) -> float:
    """Seconds of greedy decoding after a short prompt, without the time between tokens."""
    cache = llm.new_cache(tokens + 8)
    logits = llm.logits([1, 2, 3, 4], cache, last_only=True)
    spent = 0.0
    for _ in range(tokens):
        between()
        token = int(logits.argmax())
        started = time.perf_counter()
        logits = llm.logits([token], cache, last_only=True)
        spent += time.perf_counter() - started
    return spent / tokens


def neighbours() -> dict[str, Callable[[], object]]:
    """The work that runs between two tokens."""
    a = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    found: dict[str, Callable[[], object]] = {"alone": lambda: None, "NumPy": lambda: a @ a}
    if importlib.util.find_spec("torch"):
        torch = importlib.import_module("torch")
        t = torch.from_numpy(a)
        found["PyTorch"] = lambda: t @ t
    return found


def main() -> None:
    """Print a line for each neighbour."""
    parser = argparse.ArgumentParser(description="Decoding next to the threads of other libraries.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    llm = ruvllm.load(arguments.model, threads=arguments.threads)
    others = neighbours()
    times: dict[str, list[float]] = {name: [] for name in others}
    for between in others.values():
        seconds_per_token(llm, 4, between)
    for _ in range(arguments.rounds):
        for name, between in others.items():
            time.sleep(REST_SECONDS)
            times[name].append(seconds_per_token(llm, arguments.tokens, between))
    alone = statistics.median(times["alone"])
    print(f"{llm}, {llm.model.threads} threads, medians of {arguments.rounds} rounds of {arguments.tokens} tokens")
    for name, values in times.items():
        median = statistics.median(values)
        ratios = [value / first for value, first in zip(values, times["alone"], strict=True)]
        spread = f"rounds {min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{name:8s} {1e3 * median:7.3f} ms/token  {median / alone:5.3f} of alone ({spread})")


if __name__ == "__main__":
    main()
