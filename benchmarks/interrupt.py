"""How soon does Ctrl-C take effect, and is the model usable afterwards?

    python -m benchmarks.interrupt [MODEL] [--tokens 1024] [--times 10]     (MODEL: a name, file or directory; seven-b)

A timer sends this process SIGINT at some moment of a long prompt; the time from the signal to KeyboardInterrupt is
measured. Afterwards the same tokens must give the same logits as before. ``seven-b`` is the file of
``benchmarks.make_7b`` (3.8 GB).
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import threading
import time

import numpy as np

import ruvllm
from benchmarks.make_7b import seven_b
from ruvllm.llm import LLM


def seconds_until_answered(llm: LLM, ids: np.ndarray, after: float) -> float | None:
    """From SIGINT, ``after`` seconds into the prompt, to KeyboardInterrupt; None if the prompt was done before."""
    sent = [0.0]

    def send() -> None:
        sent[0] = time.perf_counter()
        os.kill(os.getpid(), signal.SIGINT)

    cache = llm.new_cache(len(ids) + 1)
    timer = threading.Timer(after, send)
    timer.start()
    try:
        llm.logits(ids, cache, last_only=True)
        timer.join()
        time.sleep(1)  # the signal is answered here, if the prompt was too short
    except KeyboardInterrupt:
        return time.perf_counter() - sent[0] if cache.length < len(ids) else None
    return None


def main() -> None:
    """Print the median and the longest time."""
    parser = argparse.ArgumentParser(description="How soon Ctrl-C answers during a long prompt.")
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=1024, help="of the prompt (default: %(default)s)")
    parser.add_argument("--times", type=int, default=10, help="how often (default: %(default)s)")
    arguments = parser.parse_args()
    llm = ruvllm.load(str(seven_b()) if arguments.model == "seven-b" else arguments.model)
    rng = np.random.default_rng(0)
    ids = rng.integers(3, llm.config.vocab_size, arguments.tokens)
    few = ids[:8]
    before = llm.logits(few)
    found = []
    for after in rng.uniform(0.05, 1.0, arguments.times):
        seconds = seconds_until_answered(llm, ids, float(after))
        if seconds is None:
            print(f"the prompt took less than {after:.2f} s: not counted", file=sys.stderr)
        else:
            found.append(seconds)
    if not np.array_equal(before, llm.logits(few)):
        sys.exit("after Ctrl-C the model gives other logits")
    if not found:
        sys.exit("the prompt is too short: more --tokens")
    median, longest = statistics.median(found), max(found)
    print(f"{llm}, prompt of {len(ids)} tokens, {llm.model.threads} threads")
    print(f"Ctrl-C answered after {1e3 * median:.0f} ms (median of {len(found)}), {1e3 * longest:.0f} ms at most")


if __name__ == "__main__":
    main()
